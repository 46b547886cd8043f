# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of rewards."""

import math
from collections.abc import Mapping

import torch

from .base import Reward
from .registry import load_reward


class WeightedSum(Reward):
    """
    The sum of rewards times their weights, not divided by anything; `nan` where one of them failed.

    Args:
        rewards (`list[tuple[Reward, float]]`):
            The rewards and their weights.

    Attributes:
        rewards (`dict[str, Reward]`), weights (`dict[str, float]`):
            By name.
    """

    def __init__(self, rewards: list[tuple[Reward, float]]):
        if others := [reward for reward, _ in rewards if not isinstance(reward, Reward)]:
            raise ValueError(
                f"A weighted sum is made of rewards by name or built on `Reward`, but one is {others[0]!r}. Give the "
                "task a list of functions, and set their `reward_weights`."
            )
        self.rewards = {reward.name: reward for reward, _ in rewards}
        self.weights = {reward.name: float(weight) for reward, weight in rewards}
        if not rewards or len(self.rewards) < len(rewards):
            names = [reward.name for reward, _ in rewards]
            raise ValueError(f"A weighted sum needs one or more rewards of different names, but has {names}.")
        self.name = "+".join(self.rewards)
        self.columns_needed = tuple(dict.fromkeys(c for r in self.rewards.values() for c in r.columns_needed))
        super().__init__()

    def complete(self, columns: dict[str, list]) -> dict[str, list]:
        for reward in self.rewards.values():
            columns = reward.complete(columns)
        return columns

    def components(self, images: torch.Tensor, prompts: list[str], **columns: list) -> dict[str, list[float]]:
        """The scores of every reward by name, before the weights."""
        columns = self._check(images, prompts, columns)
        return {name: reward(images, prompts, **columns) for name, reward in self.rewards.items()}

    def combine(self, components: Mapping[str, list[float]]) -> list[float]:
        """The weighted sum of what `components` returned."""
        rows = zip(*(components[name] for name in self.weights), strict=True)
        # Not `sum(weight * score)` alone: a weight of 0 does not hide a score that failed, 0 * nan is nan.
        scores = [math.fsum(w * s for w, s in zip(self.weights.values(), row, strict=True)) for row in rows]
        with self._lock:
            self._count(scores)
        return scores

    def __call__(self, images: torch.Tensor, prompts: list[str], **columns: list) -> list[float]:
        return self.combine(self.components(images, prompts, **columns))

    def load(self) -> "WeightedSum":
        for reward in self.rewards.values():
            reward.load()
        return self

    def free(self) -> "WeightedSum":
        for reward in self.rewards.values():
            reward.free()
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None) -> "WeightedSum":
        for reward in self.rewards.values():
            reward.to(device, dtype)
        return self


def weighted_sum(
    rewards: Mapping[str | Reward, float],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    batch_size: int | None = None,
) -> WeightedSum:
    """
    Sums rewards. The aesthetics teacher of the paper is
    `weighted_sum({"pickscore": 1.0, "clipscore": 1.0, "hpsv2": 1.0})`.

    Args:
        rewards (`Mapping[str | Reward, float]`):
            Names of [`REWARDS`] or rewards that are built already, with their weights.
        device, dtype, batch_size (*optional*):
            For those given by name, as in [`load_reward`].

    Returns:
        [`WeightedSum`]: a reward.
    """
    pairs = [
        (load_reward(reward, device=device, dtype=dtype, batch_size=batch_size), weight)
        if isinstance(reward, str)
        else (reward, weight)
        for reward, weight in rewards.items()
    ]
    return WeightedSum(pairs)
