# SPDX-License-Identifier: Apache-2.0
"""Tables, lists and foreign text in Markdown."""

import re
from collections.abc import Iterable
from urllib.parse import quote


_CODE = re.compile(r"(`[^`\n]+`)")
# What may begin or end emphasis, code, a link, an image, a formula or a tag; "_" only at the edge of a word.
_MARKS = re.compile(r"[\\`*\[\]~$]|(?<![^\W_])_|_(?![^\W_])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# What makes a line a heading, a list item or a rule.
_STARTS = re.compile(r"(\d*)(?:(?<=\d)[.)]|(?<!\d)[-#+=])")


def escape(text: str) -> str:
    """
    Foreign text, such as the name of a task, as one line of Markdown that shows it as it is: nothing in it hides a link
    behind other words or makes an image, a tag or a line of its own. `Code` in backticks stays code.
    """
    parts = _CODE.split(" ".join(text.split()))
    return "".join(part if index % 2 else _escape(part, index == 0) for index, part in enumerate(parts))


def _escape(text: str, starts_line: bool) -> str:
    if starts_line and (start := _STARTS.match(text)):
        return f"{start[1]}\\{text[start.end() - 1]}{_escape(text[start.end() :], False)}"
    text = re.sub("[&<>]", lambda found: _ENTITIES[found[0]], text)
    return _MARKS.sub(r"\\\g<0>", text)


def code(text: str) -> str:
    """Foreign text as code in a line."""
    return f"`{' '.join(text.split()).replace('`', ' ').strip() or ' '}`"


def fenced(text: str, language: str = "") -> str:
    """Lines of code, between fences that none of them can close."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 0)
    return f"{fence}{language}\n{text}\n{fence}"


def hyperlink(text: str, url: str) -> str:
    """A link with a foreign text, and address if that is one of the web; else the text alone."""
    if not re.match("https?://", url):
        return escape(text)
    return f"[{escape(text)}]({quote(url, safe=':/?#@!$&*+,;=%~-._')})"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table. Its cells are Markdown: see [`escape`] for foreign text."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        f"| {' | '.join(' '.join(cell.split()).replace('|', '&#124;') for cell in line)} |" for line in lines
    )


def enumeration(parts: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
