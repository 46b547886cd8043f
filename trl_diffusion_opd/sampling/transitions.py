# SPDX-License-Identifier: Apache-2.0
"""
One denoising step of a flow-matching model as a Gaussian transition, for every solver of [`SOLVERS`].

Conventions: `x_sigma = (1 - sigma) x_0 + sigma eps`, the network predicts the velocity `v = eps - x_0`, and a sampler
walks `sigma` from 1 down to 0. With `s` the current sigma, `t` the next one and `dt = t - s < 0`, the mean of every
solver here is affine in the velocity at a fixed state,

    mean = A x + C v + D m        (m: the previous clean estimate, second-order solver only)

so that `mean_student - mean_teacher = C (v_student - v_teacher)`. Functions of tensors only: no scheduler, no state.
"""

import math
from dataclasses import dataclass

import torch

from .solvers import SOLVERS, check_solver


@dataclass
class History:
    """
    What the second-order solver `dpm2` remembers of the step before.

    Args:
        denoised (`torch.Tensor`):
            Clean estimate `x - sigma * v` of the previous step, of shape `[B, ...]`.
        log_snr_step (`float`):
            Step of `log((1 - sigma) / sigma)` that the previous step took.
    """

    denoised: torch.Tensor
    log_snr_step: float


@dataclass
class Transition:
    """
    The Gaussian `N(mean, std^2 I)` of one denoising step (Eq. 6 and 8 of the paper).

    Args:
        mean (`torch.Tensor`):
            Mean of the step, of shape `[B, ...]`, in float32 or float64.
        std (`torch.Tensor`):
            Standard deviation of the whole step, `sqrt(-dt)` included (the paper's sigma bar); 0 for an ODE step.
            Like `coefficient` a float64 scalar on the CPU, so that looking at it never waits for a GPU.
        coefficient (`torch.Tensor`):
            `d mean / d velocity`.
        history (`History`, *optional*):
            To be passed to the next step; `None` but for `dpm2`.
    """

    mean: torch.Tensor
    std: torch.Tensor
    coefficient: torch.Tensor
    history: History | None = None

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> torch.Tensor:
        """
        Draws the next state.

        Args:
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One for the batch, or one for each sample. Nothing is drawn when `std` is 0.

        Returns:
            `torch.Tensor` of shape `[B, ...]`.
        """
        if self.std == 0:
            return self.mean.clone()  # it may be edited in place
        return self.mean + self.std * draw_noise(self.mean, generator)

    def log_prob(self, next_sample: torch.Tensor) -> torch.Tensor:
        """
        Gaussian log-density of `next_sample`, averaged over the latent dimensions.

        Returns:
            `torch.Tensor` of shape `[B]`; zeros where `std` is 0, for a deterministic step has no density.
        """
        if self.std == 0:
            return self.mean.new_zeros(self.mean.shape[0])
        z = (next_sample.to(self.mean.dtype) - self.mean) / self.std
        return (-0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


def draw_noise(like: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
    """Standard normal noise of the shape, dtype and device of `like`, drawn on the device of the generator(s)."""
    if not isinstance(generator, list):
        device = generator.device if generator is not None else like.device
        return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
    if len(generator) != like.shape[0]:
        raise ValueError(f"Got {len(generator)} generators for a batch of {like.shape[0]}. Pass one for each sample.")
    rows = [torch.randn(like.shape[1:], generator=g, device=g.device, dtype=like.dtype) for g in generator]
    return torch.stack(rows).to(like.device)


def transition(
    solver: str,
    sample: torch.Tensor,
    velocity: torch.Tensor,
    sigma: float | torch.Tensor,
    sigma_next: float | torch.Tensor,
    *,
    noise_level: float,
    sigma_max: float | torch.Tensor,
    history: History | None = None,
) -> Transition:
    """
    One step of `solver` from `sigma` to `sigma_next`.

    Args:
        solver (`str`):
            A name of [`solvers.SOLVERS`]: `"flow"` (Eq. 5-9 of the paper), `"dance"`, `"cps"`, `"ddim"`, `"dpm1"` or
            `"dpm2"`.
        sample (`torch.Tensor`):
            State `x` at `sigma`, of shape `[B, ...]` with any trailing shape (images, video).
        velocity (`torch.Tensor`):
            Predicted velocity at `sample`, of the same shape. Gradients flow to it.
        sigma (`float`), sigma_next (`float`):
            Current and next noise level of the schedule, `1 >= sigma > sigma_next >= 0`.
        noise_level (`float`):
            The paper's `a`: scale of the injected noise. 0 makes every solver an ODE step.
        sigma_max (`float`):
            Largest sigma below 1 of the schedule (`sigmas[1]`), which stands in for `sigma` in `1 - sigma` where
            `sigma` is 1 and the paper's `sigma_t = a sqrt(t / (1 - t))` would divide by zero.
        history (`History`, *optional*):
            `history` of the previous step's transition; used by `dpm2`, which takes a first-order step without it.

    Returns:
        [`Transition`]: in float32, or float64 if an input is; the coefficients are computed in float64.

    Raises:
        `ValueError`: unknown solver, sigmas out of order, negative noise level, or noise with a deterministic solver.
    """
    s, t = float(sigma), float(sigma_next)
    check_solver(solver, noise_level)
    if not 1.0 + 1e-6 >= s > t >= 0.0:
        raise ValueError(f"`sigma` must fall from at most 1 to at least 0, but the step goes from {s} to {t}.")

    dtype = torch.promote_types(torch.promote_types(sample.dtype, velocity.dtype), torch.float32)
    x, v = sample.to(dtype), velocity.to(dtype)
    now = SOLVERS[solver].step(s, t, noise_level, float(sigma_max), None if history is None else history.log_snr_step)

    mean = now.sample * x + now.velocity * v
    if now.previous != 0.0:
        mean = mean + now.previous * history.denoised.to(dtype)
    scalars = torch.tensor([now.std, now.velocity], dtype=torch.float64)
    return Transition(
        mean=mean,
        std=scalars[0],
        coefficient=scalars[1],
        history=None if now.log_snr_step is None else History((x - s * v).detach(), now.log_snr_step),
    )
