# SPDX-License-Identifier: Apache-2.0
"""`trl-diffusion-opd eval`: image statistics beside the scores, once for each image."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.support.benchmark_world import SIZE, World, synthetic_results
from trl_diffusion_opd.evaluation.benchmark import measuring
from trl_diffusion_opd.evaluation.benchmark.average import paper_table
from trl_diffusion_opd.evaluation.benchmark.report import write_report
from trl_diffusion_opd.evaluation.benchmark.tables import DIVERSITY_NOTE, STATISTICS_NOTES


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("statistics"))


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """Numbers of images that were measured at once."""
    numbers: list[int] = []
    measure = measuring.measure
    monkeypatch.setattr(measuring, "measure", lambda images: (numbers.append(len(images)), measure(images))[1])
    return numbers


def pixels(file: Path) -> np.ndarray:
    return np.asarray(PIL.Image.open(file), dtype=np.float64) / 255


def expected(image: np.ndarray) -> dict[str, float]:
    y = image @ [0.299, 0.587, 0.114]
    largest = image.max(2)
    laplacian = y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:] - 4 * y[1:-1, 1:-1]
    gray = (largest - image.min(2)) / np.where(largest > 0, largest, 1)
    return {
        "image_brightness": y.mean(),
        "image_contrast": y.std(),
        "image_saturation": gray.mean(),
        "image_sharpness": laplacian.std(),
    }


def test_statistics_are_those_of_the_files_and_measured_once(world, asked, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cat\na bird\na cat\n")
    arguments = {"loras": {"student": world.loras["student"]}, "prompts": {"words": str(tmp_path / "prompts.txt")}}
    summary = world.evaluate("measured", **arguments)
    out = world.folder / "measured"
    assert asked == [3, 1, 1] * 2 and world.calls == [5, 5]
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    images = {row["file_name"]: pixels(out / row["file_name"]) for row in rows}
    assert SIZE < 32  # the images are compared as they are
    for row in rows:
        found = {name: value for name, value in row.items() if name.startswith("image_")}
        distance = found.pop("image_diversity")
        assert found == pytest.approx(expected(images[row["file_name"]]), abs=1e-6)
        # Not the reward of this name, which is the plain mean of all values.
        assert row["brightness"] == pytest.approx(images[row["file_name"]].mean(), abs=1e-6)
        assert row["brightness"] != pytest.approx(row["image_brightness"], abs=1e-6)
        others = [
            images[other["file_name"]]
            for other in rows
            if other["model"] == row["model"] and other["prompt"] == row["prompt"] and other is not row
        ]
        if row["prompt"] != "a cat":
            assert distance is None and not others
        else:
            distances = [np.sqrt(((images[row["file_name"]] - other) ** 2).mean()) for other in others]
            assert len(distances) == 2 and distance == pytest.approx(np.mean(distances), abs=1e-6)
    base, student = summary["statistics"]
    assert (base["model"], base["benchmark"], base["num_images"], base["num_repeated"]) == ("base", "words", 5, 3)
    for summed in (base, student):
        own = [row for row in rows if row["model"] == summed["model"]]
        assert summed["sharpness"] == pytest.approx(np.mean([row["image_sharpness"] for row in own]))
        assert summed["diversity"] == pytest.approx(
            np.mean([row["image_diversity"] for row in own if row["image_diversity"]])
        )

    table = (out / "table.md").read_text()
    assert "## Image statistics\n\n| model | brightness | contrast | saturation | sharpness | diversity |\n" in table
    cells = " | ".join(
        f"{base[name]:.3f}" for name in ("brightness", "contrast", "saturation", "sharpness", "diversity")
    )
    assert f"| base | {cells} |" in table
    page = (out / "index.html").read_text()
    assert "<h2>Image statistics</h2>" in page and f"<td>{base['diversity']:.3f}</td>" in page
    for note in (*STATISTICS_NOTES, DIVERSITY_NOTE):
        assert f"\n{note}\n" in table and note.replace("'", "&#39;") in page

    # Going on: nothing is measured again, and where a line is gone, the images of its prompt.
    asked.clear()
    assert world.evaluate("measured", **arguments) == summary and asked == []
    file = out / "student" / "words" / "statistics.0.jsonl"
    lines = file.read_text().split("\n")
    assert [json.loads(line)["image"] for line in lines[1:]] == [f"0000{number}.png" for number in (1, 3, 5, 2, 4)]
    file.write_text("\n".join(lines)[:-9])
    assert world.evaluate("measured", **arguments) == summary and asked == [1]
    file.write_text("\n".join([*lines[:2], *lines[3:]]))
    assert world.evaluate("measured", **arguments) == summary and asked == [1, 3]
    assert world.calls == []


def test_more_images_than_prompts_have_a_diversity_and_no_repeats_have_no_column(world):
    summary = world.evaluate("seven", loras={}, num_images=7)
    assert [(row["num_images"], row["num_repeated"]) for row in summary["statistics"]] == [(7, 4)]
    assert 0 < summary["statistics"][0]["diversity"] < 1
    summary = world.evaluate("five", loras={})
    assert summary["statistics"][0]["diversity"] is None
    table = (world.folder / "five" / "table.md").read_text()
    assert "| model | brightness | contrast | saturation | sharpness |\n" in table and DIVERSITY_NOTE not in table


def test_several_benchmarks_and_results_of_before_statistics(tmp_path):
    folder = synthetic_results(tmp_path, {"student": paper_table().rows["DiffusionOPD"], "base": {"OCR": 0.5}})
    summary = write_report(folder)
    assert summary["statistics"] == [] and "Image statistics" not in (tmp_path / "table.md").read_text()
    row = {"brightness": 0.5, "contrast": 0.1, "saturation": 0.25, "sharpness": 0.0625, "diversity": None}
    folder.add_statistics("base", "geneval", 0, {0: row})
    folder.add_statistics("student", "ocr", 1, {0: {**row, "diversity": 0.75}})
    write_report(folder)
    table = (tmp_path / "table.md").read_text()
    assert "| model | benchmark | brightness | contrast | saturation | sharpness | diversity |\n" in table
    assert "| base | GenEval | 0.500 | 0.100 | 0.250 | 0.062 | – |\n" in table
    assert "| student | OCR | 0.500 | 0.100 | 0.250 | 0.062 | 0.750 |\n" in table
    assert (
        table.index("## The paper's Table 1") < table.index("## Image statistics") < table.index("## The paper's rows")
    )


def test_a_reward_with_the_name_of_their_files_is_refused(world, tmp_path):
    (tmp_path / "mine.py").write_text("def statistics(images, prompts, **columns):\n    return [0.0] * len(prompts)\n")
    with pytest.raises(ValueError, match="A reward cannot be called 'statistics', .*Rename it"):
        world.evaluate("named", loras={}, rewards={None: [f"{tmp_path / 'mine.py'}:statistics"]})
