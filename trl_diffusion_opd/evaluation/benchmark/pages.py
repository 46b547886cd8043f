# SPDX-License-Identifier: Apache-2.0
"""Pages with the tables and the images side by side. They need no server: all links are relative."""

from collections.abc import Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from .tables import NOTHING, Table


# Smaller images are shown enlarged, with sharp pixels.
_SMALL = 128
_STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 90rem; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
nav { display: flex; flex-wrap: wrap; gap: .5rem 1rem; }
p { margin: .5rem 0; max-width: 60rem; }
small, figcaption { opacity: .75; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #8885; padding: .3rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { background: Canvas; left: 0; position: sticky; text-align: left; }
section { border-top: 1px solid #8885; contain-intrinsic-size: auto 20rem; content-visibility: auto; padding: .75rem 0; }
section p { margin: 0 0 .5rem; overflow-wrap: anywhere; }
.row { display: grid; gap: .5rem; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }
figure { margin: 0; }
img { aspect-ratio: 1; background: #8883; border-radius: .25rem; display: block; height: auto; width: 100%; }
.small img { image-rendering: pixelated; }
figcaption { font-size: .8rem; overflow-wrap: anywhere; }
""".strip()


def summary_page(settings: dict[str, Any], tables: Sequence[Table]) -> str:
    """The page with the tables and the way to the images."""
    links = " ".join(
        f'<a href="{quote(name)}.html">{escape(about["title"])}</a>' for name, about in settings["benchmarks"].items()
    )
    body = ["<h1>Evaluation</h1>", f"<nav>Images: {links}</nav>", *map(_table, tables)]
    return _page("Evaluation", "\n".join(body))


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
    title = settings["benchmarks"][benchmark]["title"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for image in images:
        groups.setdefault(image["file_name"].rpartition("/")[2], []).append(image)
    size, widest = settings["resolution"], max(map(len, groups.values()), default=1)
    sections = [_section(file.partition(".")[0].lstrip("0"), group, size) for file, group in groups.items()]
    body = [
        '<nav><a href="index.html">Tables</a></nav>',
        f"<h1>{escape(title)}</h1>",
        "<p>The same noise in all images of a row.</p>",
        f'<div{" class=small" if size < _SMALL else ""} style="max-width: {16 * widest}rem">{"".join(sections)}</div>',
    ]
    return _page(title, "\n".join(body))


def _section(number: str, images: Sequence[dict[str, Any]], size: int) -> str:
    figures = []
    for image in images:
        scores = ", ".join(f"{reward} {_number(value)}" for reward, value in image["scores"].items())
        caption = f"<b>{escape(image['model'])}</b> {escape(scores)}"
        element = (
            f'<img loading="lazy" src="{quote(image["file_name"])}" width="{size}" height="{size}" '
            f'alt="{escape(image["model"])}: {escape(image["prompt"])}">'
        )
        figures.append(f"<figure>{element}<figcaption>{caption}</figcaption></figure>")
    prompt = f"{escape(images[0]['prompt'])} <small>{number}, seed {images[0]['seed']}</small>"
    return f'<section><p>{prompt}</p><div class="row">{"".join(figures)}</div></section>\n'


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    notes = "".join(f"<p><small>{escape(note)}</small></p>" for note in table.notes)
    return (
        f'<h2>{escape(table.title)}</h2>\n<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>\n{notes}"
    )


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"


def _page(title: str, body: str) -> str:
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>\n{_STYLE}\n</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
