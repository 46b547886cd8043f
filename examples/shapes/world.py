# SPDX-License-Identifier: Apache-2.0
"""
What can be said in the Shapes world: its words, its prompts, and the split into training and held-out prompts.

Run as a script, it writes the prompt files: `python examples/shapes/world.py`.
"""

import random
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple


SIZE = 32  # height and width of every picture, in pixels

TASKS = ("geneval", "ocr", "aesthetic")
Task = Literal["geneval", "ocr", "aesthetic"]
Split = Literal["train", "test"]

COLOURS = {
    "red": (0.88, 0.16, 0.14),
    "yellow": (0.94, 0.80, 0.12),
    "green": (0.16, 0.68, 0.26),
    "blue": (0.14, 0.36, 0.94),
    "purple": (0.64, 0.20, 0.84),
}
SHAPES = ("circle", "square", "triangle")
COUNTS = ("one", "two", "three", "four")
RELATIONS = ("left of", "above")
LETTERS = "ACEHJLNPSTVX"
NOUNS = ("house", "tree", "boat", "mountain", "flower", "tower")
TIMES = ("dawn", "noon", "sunset", "night")

TEST_SHARE = 0.2  # of the prompts of every family
SPLIT_SEED = 2026


class Counting(NamedTuple):
    """Some objects of one kind: "three red squares"."""

    count: int
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{COUNTS[self.count - 1]} {self.colour} {self.shape}{'s' if self.count > 1 else ''}"


class Relation(NamedTuple):
    """Two objects, one beside or over the other: "a red circle left of a blue square"."""

    colour: str
    shape: str
    relation: str
    other_colour: str
    other_shape: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} {self.relation} a {self.other_colour} {self.other_shape}"


class Text(NamedTuple):
    """Two written letters: 'text "HX"'."""

    first: str
    second: str

    def __str__(self) -> str:
        return f'text "{self.first}{self.second}"'


class Scene(NamedTuple):
    """A landscape with one thing in it: "a boat at sunset"."""

    noun: str
    time: str

    def __str__(self) -> str:
        return f"a {self.noun} at {self.time}"


Subject = Counting | Relation | Text | Scene


def _families(task: Task) -> list[list[Subject]]:
    """All subjects of a task, in the groups from each of which the same share is held out."""
    if task == "geneval":
        objects = list(product(COLOURS, SHAPES))
        counting = [[Counting(n, *obj) for obj in objects] for n in range(1, len(COUNTS) + 1)]
        pairs = [(a, b) for a, b in product(objects, objects) if a[0] != b[0]]
        return counting + [[Relation(*a, relation, *b) for a, b in pairs] for relation in RELATIONS]
    if task == "ocr":
        return [[Text(a, b) for a, b in product(LETTERS, LETTERS)]]
    if task == "aesthetic":
        return [[Scene(noun, time) for noun, time in product(NOUNS, TIMES)]]
    raise ValueError(f"`task` must be one of {TASKS} but is {task!r}.")


@lru_cache
def _subjects() -> dict[str, tuple[Task, Split, Subject]]:
    """Every prompt with its task, its side of the split and what it means."""
    table: dict[str, tuple[Task, Split, Subject]] = {}
    for task in TASKS:
        for index, family in enumerate(_families(task)):
            rng = random.Random(f"{SPLIT_SEED} {task} {index}")
            held_out = set(rng.sample(family, round(TEST_SHARE * len(family))))
            for subject in family:
                table[str(subject)] = (task, "test" if subject in held_out else "train", subject)
    return table


def prompts(task: Task, split: Split = "train") -> list[str]:
    """
    The prompts of one task on one side of the split. The base, the teachers and the student are trained on prompts of
    the "train" side only.
    """
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {TASKS} but is {task!r}.")
    return [prompt for prompt, entry in _subjects().items() if entry[:2] == (task, split)]


def parse(prompt: str) -> Subject:
    """What a prompt asks for."""
    try:
        return _subjects()[prompt][2]
    except KeyError:
        raise ValueError(f"{prompt!r} is no prompt of the Shapes world. `prompts(task, split)` lists them.") from None


def split_of(prompt: str) -> Split:
    """The side of the split that a prompt is on."""
    return _subjects()[prompt][1]


def sample_prompts(task: Task, split: Split, num_prompts: int, seed: int = 0) -> list[str]:
    """
    Prompts drawn at random: for `geneval`, counting and relations are equally likely, although there are far more
    relations.
    """
    rng = random.Random(seed)
    pools: dict[type, list[str]] = {}
    for prompt in prompts(task, split):
        pools.setdefault(type(parse(prompt)), []).append(prompt)
    return [rng.choice(rng.choice(list(pools.values()))) for _ in range(num_prompts)]


def vocabulary() -> list[str]:
    """The tokens of the world: all words, the quotation mark, and the letters."""
    words = {word for prompt in _subjects() for word in prompt.split('"')[0].split()}
    return sorted(words) + ['"'] + list(LETTERS)


def write_prompt_files(directory: Path) -> None:
    """Write `<task>_train.txt` and `<task>_test.txt`, one prompt a line."""
    directory.mkdir(parents=True, exist_ok=True)
    for task, split in product(TASKS, ("train", "test")):
        (directory / f"{task}_{split}.txt").write_text("\n".join(prompts(task, split)) + "\n")


if __name__ == "__main__":
    write_prompt_files(Path(__file__).parent / "prompts")
