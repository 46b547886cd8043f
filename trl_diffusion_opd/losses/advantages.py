# SPDX-License-Identifier: Apache-2.0
"""From rewards to advantages: how much better than the other images of its prompt an image is."""

import hashlib

import torch


SCALES = ("task", "group", "none")
_EPSILON = 1e-4


def group_advantages(
    rewards: torch.Tensor, groups: torch.Tensor, tasks: torch.Tensor, *, scale: str = "task"
) -> torch.Tensor:
    """
    Advantages `(r - mean of the group) / (std + 1e-4)` of the images of a rollout.

    Rewards of different tasks have different scales, often by a factor of ten, so no statistic mixes tasks.

    Args:
        rewards (`torch.Tensor`):
            Of shape `[N]`; NaN or infinite for a score that failed, which is left out of all statistics and gets the
            advantage 0.
        groups (`torch.Tensor`):
            Of shape `[N]`: number of the group, the images of one prompt; see [`prompt_group`].
        tasks (`torch.Tensor`):
            Of shape `[N]`: number of the task.
        scale (`str`, *optional*, defaults to `"task"`):
            Whose standard deviation divides: `"task"`, that of all images of the task; `"group"`, that of the group;
            `"none"`, no division.

    Returns:
        `torch.Tensor` of shape `[N]`, in float64. Exactly 0 in a group whose rewards are all equal.
    """
    check_scale(scale)
    rewards = rewards.double()
    means = _of_same(groups, rewards, torch.mean)
    # The mean of equal numbers may differ from them in the last digit.
    equal = _of_same(groups, rewards, lambda r: r.max() - r.min()) == 0
    advantages = torch.where(equal, 0.0, rewards - means)
    if scale != "none":
        scope = tasks if scale == "task" else groups
        advantages = advantages / (_of_same(scope, rewards, lambda r: r.std(correction=0)) + _EPSILON)
    return torch.where(rewards.isfinite(), advantages, 0.0)


def prompt_group(task: str, prompt: str) -> int:
    """
    Number of the group that images of a prompt belong to, the same in all processes and at every place of a rollout: a
    prompt that was drawn twice is one group, as in the published code.
    """
    digest = hashlib.blake2b(f"{task}\0{prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch takes 63 bits


def check_scale(scale: str) -> None:
    if scale not in SCALES:
        raise ValueError(f"`scale_rewards` must be one of {', '.join(SCALES)}, but is {scale!r}.")


def _of_same(labels: torch.Tensor, rewards: torch.Tensor, statistic) -> torch.Tensor:
    """A statistic of the valid rewards with the same label, for each of them."""
    values = torch.full_like(rewards, torch.nan)
    for label in labels.unique():
        own = rewards[(labels == label) & rewards.isfinite()]
        if len(own):
            values[labels == label] = statistic(own)
    return values
