# SPDX-License-Identifier: Apache-2.0
"""
Prompts of GenEval from its rules. With the defaults these are the 553 of the benchmark, in their order: the random
draws are made in the same order as by its authors.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from .geneval_rules import CLASSES, COLORS, RELATIONS, TAGS


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
MAX_COUNT = 4


def geneval_prompts(
    num_per_tag: int | Mapping[str, int] = 100, *, seed: int = 43, unique: bool = True, without: Collection[str] = ()
) -> list[dict[str, Any]]:
    """
    Draws prompts with what they demand of an image.

    Args:
        num_per_tag (`int` or `Mapping[str, int]`, *optional*, defaults to `100`):
            Number of draws, of every tag or by tag (`single_object`, `two_object`, `counting`, `colors`, `position`,
            `color_attr`; a tag left out is not drawn). `single_object` holds each of the 80 classes once at most.
        seed (`int`, *optional*, defaults to `43`):
            Seed of the draws. 43 is the benchmark's.
        unique (`bool`, *optional*, defaults to `True`):
            Whether to drop what was drawn before. There are 240 prompts that count, so a large training set needs
            repetition.
        without (`Collection[str]`, *optional*):
            Prompts to leave out, such as those of the benchmark in a training set.

    Returns:
        `list[dict]`: rows with `prompt`, `tag`, `include` and, if they count, `exclude`. See [`metadata_column`] for a
        dataset.

    Example:

    ```python
    >>> test = geneval_prompts()
    >>> held_out = {row["prompt"] for row in test}
    >>> train = geneval_prompts({"position": 7000, "counting": 5000, "color_attr": 3000}, seed=0, unique=False, without=held_out)
    ```
    """
    nums = dict(num_per_tag) if isinstance(num_per_tag, Mapping) else dict.fromkeys(TAGS, num_per_tag)
    if unknown := set(nums) - set(TAGS):
        raise ValueError(f"`num_per_tag` names {sorted(unknown)}, but GenEval's tags are {TAGS}.")
    rng = np.random.default_rng(seed)
    seen = set(without)
    rows = []
    for tag in TAGS:
        for row in _DRAWS[tag](rng, nums.get(tag, 0)):
            if row["prompt"] in seen:
                continue
            if unique:
                seen.add(row["prompt"])
            rows.append({"prompt": row.pop("prompt"), "tag": tag, **row})
    return rows


def metadata_column(rows: list[dict[str, Any]]) -> list[str]:
    """The `metadata` column of a dataset: what each row demands, as JSON text, which Arrow can hold."""
    return [json.dumps({key: row[key] for key in ("tag", "include", "exclude") if key in row}) for row in rows]


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _plural(name: str) -> str:
    # Only the ending "s" is looked at: "benchs" and "toothbrushs" are prompts of the benchmark.
    return f"{name}es" if name.endswith("s") else f"{name}s"


def _clause(index: int, count: int = 1, **extra: Any) -> dict[str, Any]:
    return {"class": CLASSES[index], "count": count, **extra}


def _not_person(draw: int) -> int:
    # Nobody is asked to paint a person green: `person` is class 0, and draws are over the others.
    return int(draw) + 1


def _draw_single(rng: np.random.Generator, num: int) -> Iterator[dict[str, Any]]:
    for index in rng.choice(len(CLASSES), size=min(num, len(CLASSES)), replace=False) if num else ():
        yield {"prompt": f"a photo of {_article(CLASSES[index])}", "include": [_clause(index)]}


def _draw_two(rng: np.random.Generator, num: int) -> Iterator[dict[str, Any]]:
    for _ in range(num):
        a, b = rng.choice(len(CLASSES), size=2, replace=False)
        text = f"a photo of {_article(CLASSES[a])} and {_article(CLASSES[b])}"
        yield {"prompt": text, "include": [_clause(a), _clause(b)]}


def _draw_counting(rng: np.random.Generator, num: int) -> Iterator[dict[str, Any]]:
    for _ in range(num):
        index = rng.choice(len(CLASSES))
        count = int(rng.integers(2, MAX_COUNT, endpoint=True))
        yield {
            "prompt": f"a photo of {NUMBERS[count]} {_plural(CLASSES[index])}",
            "include": [_clause(index, count)],
            "exclude": [_clause(index, count + 1)],
        }


def _draw_colors(rng: np.random.Generator, num: int) -> Iterator[dict[str, Any]]:
    for _ in range(num):
        index = _not_person(rng.choice(len(CLASSES) - 1))
        color = COLORS[rng.choice(len(COLORS))]
        yield {
            "prompt": f"a photo of {_article(color)} {CLASSES[index]}",
            "include": [_clause(index, color=color)],
        }


def _draw_position(rng: np.random.Generator, num: int) -> Iterator[dict[str, Any]]:
    for _ in range(num):
        a, b = rng.choice(len(CLASSES), size=2, replace=False)
        relation = RELATIONS[rng.choice(len(RELATIONS))]
        yield {
            "prompt": f"a photo of {_article(CLASSES[a])} {relation} {_article(CLASSES[b])}",
            "include": [_clause(b), _clause(a, position=[relation, 0])],
        }


def _draw_color_attr(rng: np.random.Generator, num: int) -> Iterator[dict[str, Any]]:
    for _ in range(num):
        a, b = map(_not_person, rng.choice(len(CLASSES) - 1, size=2, replace=False))
        color_a, color_b = (COLORS[i] for i in rng.choice(len(COLORS), size=2, replace=False))
        yield {
            "prompt": f"a photo of {_article(color_a)} {CLASSES[a]} and {_article(color_b)} {CLASSES[b]}",
            "include": [_clause(a, color=color_a), _clause(b, color=color_b)],
        }


_DRAWS = {
    "single_object": _draw_single,
    "two_object": _draw_two,
    "counting": _draw_counting,
    "colors": _draw_colors,
    "position": _draw_position,
    "color_attr": _draw_color_attr,
}
