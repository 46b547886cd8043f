# SPDX-License-Identifier: Apache-2.0
"""
The objectives of Flow-GRPO (https://huggingface.co/papers/2505.05470) and GRPO-Guard
(https://huggingface.co/papers/2510.22319) at one denoising step.

The step's old and new policy are Gaussians with the same standard deviation `s` and means that differ by
`dmu = C (v - v_old)` (`std` and `coefficient` of a [`Transition`]), so everything follows from `dmu` and the noise `eps`
that was drawn: `next_sample = mean_old + s eps`. Log-densities, which are large and cancel, are never formed. As
published, they are means over the latent dimensions, not sums.
"""

import math

import torch

from ..sampling.solvers import SOLVERS


LOSS_TYPES = ("grpo", "grpo_guard")


def mean_shift(velocity: torch.Tensor, other_velocity: torch.Tensor, coefficient: torch.Tensor) -> torch.Tensor:
    """
    `mean - mean_other = C (v - v_other)` of two policies at the same state.

    Args:
        velocity (`torch.Tensor`):
            Of shape `[B, ...]`. Gradients flow to it.
        other_velocity (`torch.Tensor`):
            Of the same shape; treated as a constant.
        coefficient (`torch.Tensor`):
            `C` of the step, a scalar.

    Returns:
        `torch.Tensor` of shape `[B, D]`, in float32 or float64.
    """
    # The difference is small: take it before anything is scaled, never in half precision.
    dtype = torch.promote_types(velocity.dtype, torch.float32)
    difference = velocity.to(dtype) - other_velocity.detach().to(dtype)
    return coefficient * difference.flatten(1)


def log_ratio(shift: torch.Tensor, noise: torch.Tensor, std: torch.Tensor, *, loss_type: str) -> torch.Tensor:
    """
    Logarithm of the ratio of new and old policy at the state that was reached.

    For `"grpo"`, `log p - log p_old = mean(dmu eps) / s - mean(dmu^2) / (2 s^2)`. For `"grpo_guard"` the normalized
    `(log p - log p_old + mean(dmu^2) / (2 s^2)) s = mean(dmu eps)`, whose mean is 0 and whose scale is that of `dmu` at
    every step (RatioNorm, with the bias of each sample).

    Args:
        shift (`torch.Tensor`):
            `dmu`, of shape `[B, D]`, from [`mean_shift`].
        noise (`torch.Tensor`):
            `eps`, of shape `[B, ...]`: the standard normal noise that the old policy's step drew.
        std (`torch.Tensor`):
            `s` of the step, a scalar.
        loss_type (`str`):
            `"grpo"` or `"grpo_guard"`.

    Returns:
        `torch.Tensor` of shape `[B]`. Exactly 0 where the velocities are equal.
    """
    along = (shift * noise.flatten(1).to(shift.dtype)).mean(1)
    if loss_type == "grpo_guard":
        return along
    return along / std - shift.square().mean(1) / (2 * std.square())


def surrogate_loss(log_ratio: torch.Tensor, advantage: torch.Tensor, clip_range: float) -> torch.Tensor:
    """
    `max(-A r, -A clip(r, 1 - e, 1 + e))`, clipped in the logarithm.

    Clip ranges are of the order of 1e-6, a few units in the last place of a float32 near 1: `r` itself cannot be
    compared with its bounds.

    Args:
        log_ratio (`torch.Tensor`), advantage (`torch.Tensor`):
            Of shape `[B]`.
        clip_range (`float`):
            `e`.

    Returns:
        `torch.Tensor` of shape `[B]`.
    """
    upper = log_ratio.clamp(max=math.log1p(clip_range))
    lower = log_ratio.clamp(min=math.log1p(-clip_range))
    return -advantage * torch.where(advantage >= 0, upper, lower).exp()


def is_clipped(log_ratio: torch.Tensor, advantage: torch.Tensor, clip_range: float) -> torch.Tensor:
    """Whether the clipping of [`surrogate_loss`] takes a sample's gradient away; boolean, of shape `[B]`."""
    too_high = (advantage > 0) & (log_ratio > math.log1p(clip_range))
    too_low = (advantage < 0) & (log_ratio < math.log1p(-clip_range))
    return too_high | too_low


def step_weight(solver: str, sigma: float, sigma_next: float, noise_level: float, *, loss_type: str) -> float:
    """
    What a step's loss is multiplied with: 1 for `"grpo"`; for `"grpo_guard"` `1 / (-dt)`, which gives the gradients of
    all steps one scale (and `(1 + a^2 (1 - s) / (2 s)) / (-dt)` for the solver `"dance"`, as published).

    Raises:
        `ValueError`: GRPO-Guard with a solver that it is not defined for.
    """
    if loss_type == "grpo":
        return 1.0
    check_guard(solver)
    return SOLVERS[solver].guard_factor(sigma, noise_level) / (sigma - sigma_next)


def check_guard(solver: str) -> None:
    """Raises a `ValueError` for a solver that GRPO-Guard is not defined for."""
    if SOLVERS[solver].guard_factor is None:
        defined = " and ".join(name for name, other in SOLVERS.items() if other.guard_factor is not None)
        raise ValueError(
            f"`loss_type='grpo_guard'` is defined for the solvers {defined}, but `solver` is {solver!r}. Choose one of "
            "them, or `loss_type='grpo'`."
        )


def reference_divergence(shift: torch.Tensor, std: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
    """
    Divergence from the reference policy, `mean(dmu^2) / (2 sigma_t^2)`, where `sigma_t = s / sqrt(-dt)`, as published
    for the solver `"flow"`; here for all.

    Args:
        shift (`torch.Tensor`):
            From the reference's mean, of shape `[B, D]`, by [`mean_shift`].
        std (`torch.Tensor`):
            `s` of the step, a scalar.
        sigma (`float`), sigma_next (`float`):
            Its ends.

    Returns:
        `torch.Tensor` of shape `[B]`.
    """
    variance_rate = std.square() / (sigma - sigma_next)
    return shift.square().mean(1) / (2 * variance_rate)
