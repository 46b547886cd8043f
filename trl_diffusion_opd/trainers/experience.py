# SPDX-License-Identifier: Apache-2.0
"""Images of a rollout that are trained on together."""

from dataclasses import dataclass
from typing import Any

import torch

from ..data.rounds import TaskBatch


@dataclass
class Experience:
    """
    Images of a rollout that are trained on together.

    Args:
        batch ([`TaskBatch`]):
            Their task, prompts and seeds.
        trajectory (`Any`):
            What the method keeps of how they were drawn.
        rewards (`dict[str, list[float]]`):
            `reward`, and with several reward functions each of them; NaN where one failed.
        advantages (`torch.Tensor`):
            Of shape `[B]`.
        taken (`torch.Tensor`):
            Which of them are learned from; boolean, of shape `[B]`.
    """

    batch: TaskBatch
    trajectory: Any
    rewards: dict[str, list[float]] | None = None
    advantages: torch.Tensor | None = None
    taken: torch.Tensor | None = None


def zero_unselected(taken: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """
    What was kept of images, `[B, ...]`, 0 for those that are not learned from: in the backward their NaN would be NaN
    even with a weight of 0. The batch keeps its size, on which rounding depends.
    """
    return torch.where(taken.view(-1, *[1] * (kept.ndim - 1)), kept, 0.0)
