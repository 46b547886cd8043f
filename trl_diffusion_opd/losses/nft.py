# SPDX-License-Identifier: Apache-2.0
"""
The objective of DiffusionNFT (https://huggingface.co/papers/2509.16117): reinforcement on the forward process.

A finished image is noised again, `x_t = (1 - t) x_0 + t eps`, and the velocity there is pulled towards the image
by a positive policy if it was good, and away by a negative one if it was bad.
"""

import torch


_MIN_WEIGHT = 1e-5
OLD_POLICY_SCHEDULES = (0, 1, 2)


def optimality_probability(advantage: torch.Tensor, clip: float = 5.0) -> torch.Tensor:
    """`clip(A, -c, c) / (2 c) + 1/2`, how probably an image is a good one; of the shape of `advantage`, in [0, 1]."""
    return advantage.clamp(-clip, clip) / clip / 2 + 0.5


def noised(clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """`x_t = (1 - t) x_0 + t eps` for `clean` and `noise` of shape `[B, ...]` and `sigma` of shape `[B]`."""
    t = _like(sigma, clean)
    return (1 - t) * clean + t * noise


def nft_losses(
    velocity: torch.Tensor,
    old_velocity: torch.Tensor,
    reference_velocity: torch.Tensor,
    sample: torch.Tensor,
    clean: torch.Tensor,
    sigma: torch.Tensor,
    probability: torch.Tensor,
    *,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Policy loss and divergence from the reference, per sample.

    `v+ = b v + (1 - b) v_old` and `v- = (1 + b) v_old - b v` are the velocities of the implicit positive and negative
    policy, `x_0+- = x_t - t v+-` their clean estimates, `W+- = max(1e-5, mean |x_0+- - x_0|)` adaptive weights without
    gradient, `l+- = mean((x_0+- - x_0)^2 / W+-)`; the loss is `r l+ / b + (1 - r) l- / b`.

    Args:
        velocity (`torch.Tensor`):
            Of the trained policy, of shape `[B, ...]`. Gradients flow to it.
        old_velocity (`torch.Tensor`), reference_velocity (`torch.Tensor`):
            Of the policy that drew the images and of the base; constants.
        sample (`torch.Tensor`), clean (`torch.Tensor`):
            `x_t` and `x_0`, of shape `[B, ...]`.
        sigma (`torch.Tensor`), probability (`torch.Tensor`):
            `t` and `r`, of shape `[B]`.
        beta (`float`):
            `b`, how far the implicit policies are from the old one.

    Returns:
        `tuple` of two `torch.Tensor` of shape `[B]`: the policy loss, and `mean (v - v_ref)^2`.
    """
    dtype = torch.promote_types(velocity.dtype, torch.float32)
    v, v_old = velocity.to(dtype), old_velocity.detach().to(dtype)
    t, x_t, x_0 = _like(sigma, v), sample.to(dtype), clean.to(dtype)

    def distance(implicit: torch.Tensor) -> torch.Tensor:
        error = x_t - t * implicit - x_0
        weight = error.detach().double().abs().flatten(1).mean(1).clamp(min=_MIN_WEIGHT)
        return (error.square().flatten(1) / weight[:, None]).mean(1)

    positive = distance(beta * v + (1 - beta) * v_old)
    negative = distance((1 + beta) * v_old - beta * v)
    r = probability.to(positive.dtype)
    divergence = (v - reference_velocity.detach().to(dtype)).square().flatten(1).mean(1)
    return (r * positive + (1 - r) * negative) / beta, divergence


def old_policy_decay(schedule: int, step: int) -> float:
    """
    `d` in `old <- d old + (1 - d) new` after `step` optimizer steps.

    Args:
        schedule (`int`):
            0: always 0, the old policy is the newest; 1: `min(0.001 n, 0.5)`; 2: 0 for the first 75 steps, then
            `min(0.0075 (n - 75), 0.999)`.
        step (`int`):
            `n`.
    """
    if schedule == 0:
        return 0.0
    if schedule == 1:
        return min(0.001 * step, 0.5)
    return min(0.0075 * max(step - 75, 0), 0.999)


def _like(sigma: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return sigma.to(tensor).reshape(-1, *[1] * (tensor.ndim - 1))
