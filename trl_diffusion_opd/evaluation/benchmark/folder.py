# SPDX-License-Identifier: Apache-2.0
"""What an evaluation keeps on disk: images, scores, prompts and settings, none of which counts before it is whole."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from ...utils.figures import to_pil
from ...utils.serialization import write_json, write_text


# Beside the files of the scores, which are called by the rewards.
STATISTICS_FILE = "statistics"
# Where something came from is not what it is: a folder may be moved.
_NOT_COMPARED = ("origin", "origins", "title")


class ResultsFolder:
    """
    The folder of an evaluation.

    Args:
        path (`str` or `Path`):
            The folder, which need not be there yet.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    # Images

    def image_file(self, model: str, benchmark: str, position: int) -> Path:
        """The file of an image, numbered from 1."""
        return self.path / model / benchmark / f"{position + 1:05d}.png"

    def save_image(self, image: torch.Tensor, model: str, benchmark: str, position: int) -> None:
        """Writes an image `[3, H, W]` in `[0, 1]`."""
        file = self.image_file(model, benchmark, position)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        to_pil(image).save(part, format="PNG")
        part.replace(file)

    def load_images(self, model: str, benchmark: str, positions: Sequence[int]) -> torch.Tensor:
        """Images as a float tensor `[B, 3, H, W]` in `[0, 1]`."""
        images = []
        for position in positions:
            with PIL.Image.open(self.image_file(model, benchmark, position)) as image:
                pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
                images.append(pixels.view(image.height, image.width, 3).permute(2, 0, 1))
        return torch.stack(images).float() / 255

    # Scores and statistics: lines of files, one file for each process

    def scores(self, model: str, benchmark: str, reward: str) -> dict[int, float]:
        """Scores by position; NaN where scoring failed."""
        lines = self._lines(model, benchmark, reward)
        return {place: math.nan if row["score"] is None else row["score"] for place, row in lines.items()}

    def parts(self, model: str, benchmark: str, reward: str) -> dict[int, list[float]]:
        """What scores were made of by position, as far as the reward tells."""
        lines = self._lines(model, benchmark, reward)
        return {place: row["parts"] for place, row in lines.items() if row.get("parts")}

    def add_scores(
        self,
        model: str,
        benchmark: str,
        reward: str,
        process: int,
        scores: Mapping[int, float],
        parts: Sequence[list[float] | None] = (),
    ) -> None:
        """Adds scores to the file of this process, with what each of them was made of if that is known."""
        lines: dict[int, dict[str, Any]] = {
            place: {"score": score if math.isfinite(score) else None} for place, score in scores.items()
        }
        if parts:
            for line, own in zip(lines.values(), parts, strict=True):
                line["parts"] = own
        self._add_lines(model, benchmark, reward, process, lines)

    def statistics(self, model: str, benchmark: str) -> dict[int, dict[str, float | None]]:
        """Statistics of images by position; `diversity` is `None` where no other image has the same prompt."""
        return self._lines(model, benchmark, STATISTICS_FILE)

    def add_statistics(
        self, model: str, benchmark: str, process: int, statistics: Mapping[int, Mapping[str, float | None]]
    ) -> None:
        """Adds statistics to the file of this process."""
        self._add_lines(model, benchmark, STATISTICS_FILE, process, statistics)

    def _lines(self, model: str, benchmark: str, name: str) -> dict[int, dict[str, Any]]:
        lines = {}
        for file in sorted((self.path / model / benchmark).glob(f"{name}.*.jsonl")):
            for line in file.read_text(encoding="utf-8").split("\n"):
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # empty, or cut off where a process was killed
                    continue
                lines[int(row.pop("image").partition(".")[0]) - 1] = row
        return lines

    def _add_lines(
        self, model: str, benchmark: str, name: str, process: int, lines: Mapping[int, Mapping[str, Any]]
    ) -> None:
        rows = [{"image": self.image_file(model, benchmark, place).name, **row} for place, row in lines.items()]
        with open(self.path / model / benchmark / f"{name}.{process}.jsonl", "a", encoding="utf-8") as file:
            # In front of each line, so that it does not go on where a killed process stopped.
            file.write("".join(f"\n{json.dumps(row)}" for row in rows))

    # Prompts

    def prompts_file(self, benchmark: str) -> Path:
        return self.path / "prompts" / f"{benchmark}.jsonl"

    def save_prompts(self, benchmark: str, rows: Sequence[Mapping[str, Any]]) -> None:
        write_text(self.prompts_file(benchmark), "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))

    def load_prompts(self, benchmark: str) -> list[dict[str, Any]]:
        # Not `splitlines`, which takes other characters of Unicode for ends of lines too.
        return [json.loads(line) for line in self.prompts_file(benchmark).read_text(encoding="utf-8").split("\n")[:-1]]

    # Settings and results

    def load_settings(self) -> dict[str, Any]:
        """The settings of what is in the folder; empty if there is nothing."""
        file = self.path / "settings.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """
        Checks that what is in the folder was made with the same settings.

        Raises:
            `ValueError`: it was not; the message names the differences.
        """
        if found := list(_differences(self.load_settings(), settings)):
            raise ValueError(
                f"The results in {str(self.path)!r} were made with other settings: {'; '.join(found)}. Choose another "
                "`--output_dir`, or remove what is there."
            )

    def save_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Adds settings to those of what is there, and returns all."""
        merged = _merged(self.load_settings(), settings)
        self.save_json("settings.json", merged)
        return merged

    def save_json(self, name: str, content: Any) -> None:
        write_json(self.path / name, content, sort_keys=False)

    def save_text(self, name: str, content: str) -> None:
        write_text(self.path / name, content)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> Iterator[str]:
    for key in new:
        if key not in old or key in _NOT_COMPARED or old[key] == new[key]:
            continue
        if isinstance(old[key], Mapping) and isinstance(new[key], Mapping):
            yield from _differences(old[key], new[key], f"{where}{key}: ")
        else:
            yield f"{where}{key} was {_short(old[key])} and is {_short(new[key])} now"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " + ".join(map(_short, value)) or "nothing"
    text = str(value)
    return text[:8] if re.fullmatch("[0-9a-f]{40,}", text) else text


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = {k: _merged(old[k], new[k]) for k in old if isinstance(old[k], dict) and isinstance(new.get(k), dict)}
    return {**old, **new, **both}
