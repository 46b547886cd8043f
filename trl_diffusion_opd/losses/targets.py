# SPDX-License-Identifier: Apache-2.0
"""
What a student is to predict: a sum of the velocities of models, `v* = sum_k w_k v_k`, with `sum_k w_k = 1`.

The product of Gaussians of one covariance to powers that sum to 1 is a Gaussian with that mean, so every solver and
every objective stays what it is.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


BASE, AVERAGE = "base", "average"
RESERVED = (BASE, AVERAGE)


@dataclass(frozen=True)
class Term:
    """
    A model in a target.

    Args:
        weight (`float`):
            `w_k`.
        model (`str`):
            The task whose teacher it is; `"base"`; or `"average"`, the moving average of the student.
    """

    weight: float
    model: str


Target = tuple[Term, ...]


def make_targets(
    tasks: Iterable[str],
    teachers: Iterable[str],
    mixtures: Mapping[str, Mapping[str, float]] | None = None,
    extrapolation: float = 1.0,
    reference: str = BASE,
) -> dict[str, Target]:
    """
    The target of each task: its teacher, if nothing else is asked for.

    Args:
        tasks (`Iterable[str]`), teachers (`Iterable[str]`):
            Tasks that have prompts, and tasks that have teachers.
        mixtures (`Mapping`, *optional*):
            By task, the weights of models that take the place of its teacher.
        extrapolation (`float`, *optional*, defaults to `1.0`):
            `l` in `v* = l v + (1 - l) v_reference`: beyond 1 the student is to go further than its target (G-OPD).
        reference (`str`, *optional*, defaults to `"base"`):
            The model from which to extrapolate.

    Raises:
        `ValueError`: a task without a target, an unknown model, or weights that do not sum to 1.
    """
    tasks, teachers, targets = list(tasks), list(teachers), {}
    known = [*teachers, *RESERVED]
    mixtures = dict(mixtures or {})
    if unknown := sorted(set(mixtures) - set(tasks)):
        raise ValueError(f"`targets` names tasks without prompts: {unknown}.")
    if reference not in known:
        raise ValueError(f"`extrapolation_reference` must be one of {', '.join(known)}, but is {reference!r}.")
    for task in tasks:
        weights = mixtures.get(task, {task: 1.0})
        if task not in mixtures and task not in teachers:
            raise ValueError(
                f"Task {task!r} has prompts but no teacher and no entry of `targets`. Add one, or leave the prompts out."
            )
        _check_weights(task, weights, known)
        totals = {model: extrapolation * weight for model, weight in weights.items()}
        if extrapolation != 1:
            if all(model == reference for model, weight in weights.items() if weight != 0):
                raise ValueError(
                    f"`teacher_extrapolation` of task {task!r} would go from {reference!r} to itself. Choose another "
                    "`extrapolation_reference`."
                )
            totals[reference] = totals.get(reference, 0.0) + 1 - extrapolation
        targets[task] = tuple(Term(weight, model) for model, weight in totals.items() if weight != 0)
    return targets


def _check_weights(task: str, weights: Mapping[str, Any], known: list[str]) -> None:
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(f"`targets[{task!r}]` must map models to weights, as in {{'base': 1.0}}, but is {weights!r}.")
    if unknown := [model for model in weights if model not in known]:
        raise ValueError(f"`targets[{task!r}]` names unknown models {unknown}. There are: {', '.join(known)}.")
    for model, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"`targets[{task!r}][{model!r}]` must be a finite number, but is {weight!r}.")
    if not math.isclose(math.fsum(weights.values()), 1, abs_tol=1e-6):
        raise ValueError(
            f"The weights of `targets[{task!r}]` must sum to 1, but sum to {math.fsum(weights.values()):g}. Else the "
            "target would be a velocity of another scale."
        )


def check_models(teachers: Iterable[str], used: Iterable[str | None], anchor: str | None) -> None:
    """
    Raises a `ValueError` for a teacher that nothing follows, an anchor that there is not, and a teacher with a name that
    means something else.
    """
    teachers, used = list(teachers), set(used)
    if idle := [task for task in teachers if task not in used]:
        raise ValueError(f"There are teachers that no task follows: {idle}. Give them prompts, or leave them out.")
    if anchor is not None and anchor not in (*teachers, *RESERVED):
        raise ValueError(f"`anchor` must be one of {', '.join([*teachers, *RESERVED])}, but is {anchor!r}.")
    if taken := [task for task in teachers if task in RESERVED]:
        raise ValueError(
            f"A teacher is called {taken[0]!r}, which is the name of another model here. Rename its task."
        )


def describe(target: Target) -> str:
    """A target in short: `1.25 ocr - 0.25 base`."""
    if len(target) == 1:
        return target[0].model
    first, *others = target
    rest = "".join(f" {'+' if term.weight > 0 else '-'} {abs(term.weight):g} {term.model}" for term in others)
    return f"{first.weight:g} {first.model}{rest}"
