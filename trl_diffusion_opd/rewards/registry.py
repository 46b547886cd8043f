# SPDX-License-Identifier: Apache-2.0
"""The built-in rewards by name. Their modules are imported when they are asked for, since torch takes seconds."""

import importlib
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch

    from .base import Reward

# Name -> "module:Class", imported by `reward_class`.
REWARDS = {
    "geneval": "geneval:GenEvalReward",
    "ocr": "ocr:OCRReward",
    "pickscore": "pickscore:PickScoreReward",
    "clipscore": "clipscore:ClipScoreReward",
    "hpsv2": "hpsv2:HPSv2Reward",
    "aesthetic": "aesthetic:AestheticReward",
    "imagereward": "imagereward:ImageRewardReward",
    "unifiedreward": "unifiedreward:UnifiedRewardReward",
    "hpsv3": "hpsv3:HPSv3Reward",
    "geneval2": "geneval2:GenEval2Reward",
}


def reward_class(name: str) -> "type[Reward]":
    """
    The class of a reward by name.

    Raises:
        `ValueError`: there is no reward of this name.
    """
    if name not in REWARDS:
        close = get_close_matches(name, REWARDS, n=2)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"There is no reward {name!r}.{hint} The rewards are {', '.join(REWARDS)}.")
    module, class_name = REWARDS[name].split(":")
    return getattr(importlib.import_module(f".{module}", __package__), class_name)


def load_reward(
    name: str,
    *,
    device: "torch.device | str | None" = None,
    dtype: "torch.dtype | str | None" = None,
    batch_size: int | None = None,
    **options: Any,
) -> "Reward":
    """
    Builds a reward by name. Its models are loaded at the first score, or by [`~rewards.base.Reward.load`].

    Args:
        name (`str`):
            One of [`REWARDS`].
        device (`torch.device` or `str`, *optional*):
            Where its models run; by default the current accelerator, or the CPU.
        dtype (`torch.dtype` or `str`, *optional*):
            Precision of its models; by default that of the published scores.
        batch_size (`int`, *optional*):
            Images scored at once; the default depends on the reward.
        options:
            What the reward takes itself, such as `model_name_or_path`.

    Raises:
        `ValueError`: there is no reward of this name.
        `ImportError`: a package that the reward needs is not installed.
    """
    return reward_class(name)(device=device, dtype=dtype, batch_size=batch_size, **options)
