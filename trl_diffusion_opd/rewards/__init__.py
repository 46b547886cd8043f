# SPDX-License-Identifier: Apache-2.0
"""Rewards of images by name: the eight of the paper and later ones, and the class that your own can be built on."""

import importlib
from typing import TYPE_CHECKING

from .registry import REWARDS, load_reward, reward_class


if TYPE_CHECKING:
    from .base import Reward
    from .sums import WeightedSum, weighted_sum

__all__ = ["REWARDS", "Reward", "WeightedSum", "load_reward", "reward_class", "weighted_sum"]
# torch takes seconds to import, and the command line needs only the names.
_LAZY = {"Reward": "base", "WeightedSum": "sums", "weighted_sum": "sums"}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
