# SPDX-License-Identifier: Apache-2.0
"""Measuring the images of an evaluation, those of a prompt together: what they look like, beside how they score."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ..statistics import diversity, measure
from .folder import ResultsFolder


# Images whose statistics are written at once.
IMAGES_AT_ONCE = 64
# Model, benchmark and positions of images of one prompt.
Group = tuple[str, str, list[int]]


def unmeasured(
    folder: ResultsFolder,
    models: Iterable[str],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    places: Mapping[str, Sequence[int]],
) -> list[Group]:
    """
    The images whose statistics are not known, with all others of their prompt.

    Args:
        folder ([`ResultsFolder`]):
            Where they are.
        models (`Iterable[str]`):
            Who drew them.
        rows (`Mapping[str, Sequence[Mapping]]`), places (`Mapping[str, Sequence[int]]`):
            The prompts of each benchmark, and the positions of its images.
    """
    missing = []
    for model in models:
        for benchmark, own in places.items():
            known = folder.statistics(model, benchmark)
            groups: dict[str, list[int]] = {}
            for place in own:
                groups.setdefault(rows[benchmark][place % len(rows[benchmark])]["prompt"], []).append(place)
            missing += [(model, benchmark, group) for group in groups.values() if not known.keys() >= set(group)]
    return missing


def measure_images(
    folder: ResultsFolder, groups: Sequence[Group], *, process: int = 0, show_progress: bool = True
) -> None:
    """
    Measures images and writes their statistics as they come.

    Args:
        folder ([`ResultsFolder`]):
            Where they are.
        groups (`Sequence[Group]`):
            From [`unmeasured`].
        process (`int`, *optional*, defaults to `0`):
            Number of this process, which has files of its own.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
    """
    total = sum(len(places) for *_, places in groups)
    with tqdm(total=total, desc="Measuring", disable=not show_progress) as progress:
        found: dict[tuple[str, str], dict[int, dict[str, float | None]]] = {}
        for model, benchmark, places in groups:
            found.setdefault((model, benchmark), {}).update(
                _measured(folder.load_images(model, benchmark, places), places)
            )
            progress.update(len(places))
            if sum(map(len, found.values())) >= IMAGES_AT_ONCE:
                _write(folder, found, process)
        _write(folder, found, process)


def _measured(images: torch.Tensor, places: Sequence[int]) -> Iterator[tuple[int, dict[str, float | None]]]:
    columns = {name: values.tolist() for name, values in measure(images).items()}
    columns["diversity"] = diversity(images).tolist() if len(images) > 1 else [None]
    for place, values in zip(places, zip(*columns.values(), strict=True), strict=True):
        yield place, dict(zip(columns, values, strict=True))


def _write(
    folder: ResultsFolder, found: dict[tuple[str, str], dict[int, dict[str, float | None]]], process: int
) -> None:
    for (model, benchmark), statistics in found.items():
        folder.add_statistics(model, benchmark, process, statistics)
    found.clear()
