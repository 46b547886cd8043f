# SPDX-License-Identifier: Apache-2.0
"""Checks of settings: each is of the kind that its annotation names, and within its bounds."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, get_args, get_type_hints


@dataclass(frozen=True)
class Rule:
    """
    What a setting must be, if it is set.

    Args:
        holds (`Callable`):
            Whether a value is so.
        text (`str`):
            What it must be, in words.
    """

    holds: Callable[[Any], bool]
    text: str


AT_LEAST_1 = Rule(lambda value: value >= 1, "at least 1")
NOT_NEGATIVE = Rule(lambda value: value >= 0, "0 or more")
POSITIVE = Rule(lambda value: value > 0, "positive")
BELOW_1 = Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")
_MAY_BE_INFINITE = ("max_grad_norm",)  # then nothing is clipped, and the norm is logged


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, of which `True` is none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_kinds(settings: Any) -> None:
    """
    Raises a `ValueError` for a field of a dataclass that is annotated as a number or a switch and holds something else.
    Whole numbers must be whole, and others finite.
    """
    hints = get_type_hints(type(settings))
    for name in (field.name for field in fields(settings)):
        value, kinds = getattr(settings, name), set(get_args(hints[name])) or {hints[name]}
        if value is None and type(None) in kinds:
            continue
        kinds.discard(type(None))
        if kinds == {int} and not (isinstance(value, Integral) and not isinstance(value, bool)):
            raise ValueError(f"`{name}` must be a whole number, but is {value!r}.")
        if kinds == {float} and not (is_number(value) or name in _MAY_BE_INFINITE and value == math.inf):
            raise ValueError(f"`{name}` must be a finite number, but is {value!r}.")
        if kinds == {bool} and not isinstance(value, bool):
            raise ValueError(f"`{name}` must be true or false, but is {value!r}.")


def check_rules(settings: Any, rules: Mapping[str, Rule]) -> None:
    """Raises a `ValueError` for a field that is set and does not follow its rule."""
    for name, rule in rules.items():
        value = getattr(settings, name)
        if value is not None and not rule.holds(value):
            raise ValueError(f"`{name}` must be {rule.text}, but is {value!r}.")
