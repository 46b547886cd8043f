# SPDX-License-Identifier: Apache-2.0
"""Images for people: grids of images, and curves of a run."""

import math
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch


_MARGIN = 6
_MIN_TILE = 96  # pixels: smaller images are enlarged to be seen
_MAX_TILE = 384


def to_pil(image: torch.Tensor) -> PIL.Image.Image:
    """A float image `[3, H, W]` in `[0, 1]` as a PIL image."""
    return PIL.Image.fromarray((image * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())


def enlarge(image: PIL.Image.Image, at_least: int = 256) -> PIL.Image.Image:
    """A small image enlarged by a whole factor, its pixels kept sharp; a large one as it is."""
    factor = math.ceil(at_least / min(image.size))
    return image.resize((image.width * factor, image.height * factor), PIL.Image.Resampling.NEAREST)


def image_grid(columns: dict[str, list[torch.Tensor]], rows: list[str]) -> PIL.Image.Image:
    """
    A labeled grid of images.

    Args:
        columns (`dict[str, list[torch.Tensor]]`):
            Title and images `[3, H, W]` in `[0, 1]` of each column, one image per row.
        rows (`list[str]`):
            Label of each row, written above it.
    """
    height, width = next(iter(columns.values()))[0].shape[-2:]
    scale = max(1, math.ceil(_MIN_TILE / min(height, width)))
    shrink = min(1.0, _MAX_TILE / (scale * max(height, width)))
    tile = (round(width * scale * shrink), round(height * scale * shrink))
    font = PIL.ImageFont.load_default(size=max(11, min(18, tile[0] // 9)))
    line = font.getbbox("Ag")[3] + _MARGIN
    titles = {name: "\n".join(_wrap(name, font, tile[0])) for name in columns}
    head = line * max(text.count("\n") + 1 for text in titles.values())

    full_width = len(columns) * (tile[0] + _MARGIN) + _MARGIN
    labels = [_wrap(label, font, full_width - 2 * _MARGIN) for label in rows]
    full_height = head + _MARGIN + sum(len(label) * line + tile[1] + _MARGIN for label in labels)
    canvas = PIL.Image.new("RGB", (full_width, full_height), "white")
    draw = PIL.ImageDraw.Draw(canvas)
    for column, text in enumerate(titles.values()):
        draw.multiline_text((_MARGIN + column * (tile[0] + _MARGIN), _MARGIN), text, fill="black", font=font)
    top = head + _MARGIN
    for row, label in enumerate(labels):
        for text in label:
            draw.text((_MARGIN, top), text, fill="#555555", font=font)
            top += line
        for column, images in enumerate(columns.values()):
            resample = PIL.Image.Resampling.NEAREST if shrink == 1.0 else PIL.Image.Resampling.LANCZOS
            image = to_pil(images[row]).resize(tile, resample)
            canvas.paste(image, (_MARGIN + column * (tile[0] + _MARGIN), top))
        top += tile[1] + _MARGIN
    return canvas


def _wrap(text: str, font: PIL.ImageFont.ImageFont, width: int) -> list[str]:
    """Splits a text into lines of at most `width` pixels, between words where that is possible."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(candidate) > width:
            lines.append(word)
        else:
            lines[-1] = candidate
    return lines


def draw_curves(log_history: list[dict[str, Any]], path: Path) -> bool:
    """
    Draws the course of a run: loss and divergence of each task, divergence of each denoising step, rewards.

    Args:
        log_history (`list[dict]`):
            `trainer.state.log_history`.
        path (`Path`):
            Where the PNG goes.

    Returns:
        `bool`: whether there was anything to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series: dict[str, tuple[list[float], list[float]]] = {}
    for entry in log_history:
        for name, value in entry.items():
            if isinstance(value, (int, float)) and name != "step":
                steps, values = series.setdefault(name, ([], []))
                steps.append(entry["step"])
                values.append(value)
    panels = [
        ("training divergence", ("loss", "kl/"), True),
        ("held-out divergence", ("eval_kl/", "eval_raw_kl/"), True),
        ("divergence by denoising step", ("kl_step/",), True),
        ("training reward", ("reward/",), False),
        ("held-out reward", ("eval_reward/", "eval_raw_reward/"), False),
    ]
    panels = [
        (title, names, logarithmic)
        for title, prefixes, logarithmic in panels
        if (names := [name for name in series if name.startswith(prefixes)])
    ]
    if not panels:
        return False
    figure = Figure(figsize=(5 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, names, logarithmic) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for index, name in enumerate(names):
            steps, values = series[name]
            label = name.removeprefix("eval_").removeprefix("kl/").removeprefix("reward/").removeprefix("kl_step/")
            color = f"C{index}" if len(names) <= 10 else None
            axes.plot(steps, values, label=label, color=color, marker="." if len(steps) < 30 else None)
        axes.set(title=title, xlabel="round")
        if logarithmic and all(value > 0 for name in names for value in series[name][1]):
            axes.set_yscale("log")
        axes.legend(fontsize="small", ncols=2 if len(names) > 5 else 1)
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return True
