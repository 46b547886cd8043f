# SPDX-License-Identifier: Apache-2.0
"""Pages with the tables and the images side by side. They need no server: all links are relative."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import jinja2

from .tables import NOTHING, Table


# Smaller images are shown enlarged, with sharp pixels.
_SMALL = 128


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = _number
    return environment


def summary_page(settings: dict[str, Any], tables: Sequence[Table]) -> str:
    """The page with the tables and the way to the images."""
    template = _environment().get_template("index.html")
    return template.render(title="Evaluation", benchmarks=settings["benchmarks"], tables=tables)


def gallery_page(settings: dict[str, Any], benchmark: str, images: Sequence[dict[str, Any]]) -> str:
    """
    The page with the images of a benchmark, those of a prompt side by side.

    Args:
        settings (`dict`):
            Settings of the evaluation.
        benchmark (`str`):
            Name of the benchmark.
        images (`Sequence[dict]`):
            A row per image, those of a prompt one after the other.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for image in images:
        number = image["file_name"].rpartition("/")[2].partition(".")[0].lstrip("0")
        groups.setdefault(number, []).append(image)
    size = settings["resolution"]
    return (
        _environment()
        .get_template("gallery.html")
        .render(
            title=settings["benchmarks"][benchmark]["title"],
            groups=groups,
            size=size,
            small=size < _SMALL,
            widest=max(map(len, groups.values()), default=1),
        )
    )


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"
