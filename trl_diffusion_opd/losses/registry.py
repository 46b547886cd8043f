# SPDX-License-Identifier: Apache-2.0
"""The objectives by name."""

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .distances import KL, BranchMatching, CleanMatching, MeanMatching, VelocityMatching
from .distribution_matching import DMD, TDM
from .objective import Objective
from .policy_gradient import PolicyGradient
from .supervised import SFT


OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective
    for objective in (
        KL,
        MeanMatching,
        VelocityMatching,
        CleanMatching,
        BranchMatching,
        PolicyGradient,
        DMD,
        TDM,
        SFT,
    )
}


def make_objective(name: str, settings: Mapping[str, Any] | None = None) -> Objective:
    """
    The objective of a name.

    Args:
        name (`str`):
            A name of `OBJECTIVES`, or `"package.module:Class"`.
        settings (`Mapping`, *optional*):
            Fields in which it differs from its defaults.

    Raises:
        `ValueError`: there is none of that name, or it has no such setting, or the setting is out of its range.
    """
    objective = OBJECTIVES.get(name) or _import(name)
    known = [item.name for item in fields(objective)]
    if unknown := sorted(set(settings or {}) - set(known)):
        has = f"has only {', '.join(known)}" if known else "has no settings"
        raise ValueError(f"`objective_kwargs` has {', '.join(unknown)}, but the objective {name!r} {has}.")
    return objective(**(settings or {}))


def _import(name: str) -> type[Objective]:
    module, _, attribute = str(name).partition(":")
    if attribute and module and not module.startswith("."):
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"`objective` {name!r} cannot be imported: {error}.") from error
        if isinstance(found, type) and issubclass(found, Objective) and not inspect.isabstract(found):
            return found
    raise ValueError(
        f"`objective` must be one of {', '.join(OBJECTIVES)}, or 'package.module:Class' of an `Objective`, but is {name!r}."
    )
