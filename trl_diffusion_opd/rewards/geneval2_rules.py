# SPDX-License-Identifier: Apache-2.0
"""GenEval 2's rules (Soft-TIFA): the questions about an image, their right answers, and means of probabilities."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


# What an atom of a prompt is about, in the order of tables.
SKILLS = ("object", "attribute", "count", "position", "verb")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_COUNTING = "How many"


@dataclass(frozen=True)
class Question:
    """
    A question about an image.

    Args:
        text (`str`):
            What the judge is asked.
        answers (`tuple[str, ...]`):
            The right answers, as the first token of the judge's answer.
    """

    text: str
    answers: tuple[str, ...]


def parse_questions(vqa_list: str | Sequence[Sequence[str]]) -> list[Question]:
    """
    The questions of a prompt.

    Args:
        vqa_list (`str` or `Sequence[Sequence[str]]`):
            Pairs of a question and its answer, as in GenEval 2's `geneval2_data.jsonl`, or these as JSON text: a number
            in words for a question that begins with "How many", and "Yes" for any other.

    Raises:
        `ValueError`: anything else.
    """
    pairs = json.loads(vqa_list) if isinstance(vqa_list, str) else vqa_list
    if not isinstance(pairs, Sequence) or not pairs:
        raise ValueError(f"GenEval 2's `vqa_list` must be a list of pairs of question and answer, but is {pairs!r}.")
    return [_question(pair) for pair in pairs]


def _question(pair: Any) -> Question:
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise ValueError(f"GenEval 2's `vqa_list` must hold pairs of a question and its answer, but one is {pair!r}.")
    question, answer = pair
    known = NUMBERS if question.startswith(_COUNTING) else ("Yes",)
    if answer not in known:
        raise ValueError(f"GenEval 2 knows the answers {', '.join(known)} to {question!r}, but not {answer!r}.")
    words = [answer.lower(), answer.capitalize()]
    if known is NUMBERS:
        words.append(str(NUMBERS.index(answer) + 1))
    return Question(
        f"{question} Answer in one word.", tuple(f"{space}{word}" for word in words for space in ("", " "))
    )


def arithmetic_mean(values: Sequence[float]) -> float:
    """Soft-TIFA AM of an image, from the probabilities of its right answers."""
    return math.fsum(values) / len(values)


def geometric_mean(values: Sequence[float]) -> float:
    """Soft-TIFA GM of an image, from the probabilities of its right answers; 0 if one of them is 0."""
    if min(values) <= 0:
        return 0.0
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def summarize(
    images: Iterable[tuple[Sequence[float], Sequence[str] | None, int | None]],
) -> dict[str, Any]:
    """
    Means over images.

    Args:
        images (`Iterable[tuple]`):
            For each image the probabilities of its right answers, the skill that each of them is about, and the number
            of atoms of its prompt; `None` where the prompts do not tell these.

    Returns:
        `dict`: `gm` and `am`, the means over the images; `skills`, the mean over all answers that are about a skill, by
        skill; and `atoms`, the mean GM over the images of prompts with so many atoms, by this number as text. All are
        from 0 to 1; they were published times 100.

    Raises:
        `ValueError`: a skill that is not known, or as many skills as there are not answers.
    """
    ams, gms, skills, atoms = [], [], {}, {}
    for values, names, count in images:
        ams.append(arithmetic_mean(values))
        gms.append(geometric_mean(values))
        if names is not None:
            if len(names) != len(values) or not set(names) <= set(SKILLS):
                raise ValueError(
                    f"GenEval 2's `skills` must name one of {', '.join(SKILLS)} for each of {len(values)} questions, "
                    f"but is {list(names)}."
                )
            for name, value in zip(names, values, strict=True):
                skills.setdefault(name, []).append(value)
        if count is not None:
            atoms.setdefault(count, []).append(gms[-1])
    return {
        "gm": _mean(gms),
        "am": _mean(ams),
        "skills": _means(skills, sorted(skills, key=SKILLS.index)),
        "atoms": {str(count): mean for count, mean in _means(atoms, sorted(atoms)).items()},
    }


def _mean(values: Sequence[float]) -> float | None:
    return arithmetic_mean(values) if values else None


def _means(groups: Mapping[Any, Sequence[float]], order: Iterable[Any]) -> dict[Any, float]:
    return {name: arithmetic_mean(groups[name]) for name in order}
