# SPDX-License-Identifier: Apache-2.0
"""
One denoising step of a flow-matching model as a Gaussian transition, for six solvers.

Conventions: `x_sigma = (1 - sigma) x_0 + sigma eps`, the network predicts the velocity `v = eps - x_0`, and a sampler
walks `sigma` from 1 down to 0. With `s` the current sigma, `t` the next one and `dt = t - s < 0`, the mean of every
solver here is affine in the velocity at a fixed state,

    mean = A x + C v + D m        (m: the previous clean estimate, second-order solver only)

so that `mean_student - mean_teacher = C (v_student - v_teacher)`. Functions of tensors only: no scheduler, no state.
"""

import math
from dataclasses import dataclass

import torch


SOLVERS = ("flow", "dance", "cps", "ddim", "dpm1", "dpm2")
DETERMINISTIC_SOLVERS = ("dpm1", "dpm2")
# Below this distance from 1, `sigma` counts as 1: schedules are computed in float32.
_SIGMA_ONE = 1.0 - 1e-6
# Stands in for log(0) at both ends of the schedule.
_TINY = 1e-30


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
            `"flow"` (Eq. 5-9 of the paper), `"dance"`, `"cps"`, `"ddim"`, `"dpm1"` or `"dpm2"`.
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
    dt = t - s
    remembered = 0.0  # D, the weight of the previous clean estimate

    if solver in ("flow", "dance"):
        k = noise_level * (
            math.sqrt(s / (1 - (float(sigma_max) if s >= _SIGMA_ONE else s))) if solver == "flow" else 1
        )
        std = k * math.sqrt(-dt)
        a = 1 + k**2 / (2 * s) * dt
        c = (1 + k**2 * (1 - s) / (2 * s)) * dt
    elif solver in ("ddim", "cps"):
        std = _ddim_std(s, t, noise_level) if solver == "ddim" else t * math.sin(noise_level * math.pi / 2)
        direction = math.sqrt(max(t**2 - std**2, 0.0))  # mean = (1 - t) x_0 + direction * eps
        a = (1 - t) + direction
        c = -(1 - t) * s + (1 - s) * direction
    else:
        std = 0.0
        h = _log_snr(t) - _log_snr(s)
        w = -(1 - t) * math.expm1(-h)
        if solver == "dpm2" and history is not None and t > 0:  # first and last step are first order
            remembered = -w * h / (2 * history.log_snr_step)
        a = t / s + (w - remembered)
        c = -(w - remembered) * s

    mean = a * x + c * v
    if remembered != 0.0:
        mean = mean + remembered * history.denoised.to(dtype)
    scalars = torch.tensor([std, c], dtype=torch.float64)
    return Transition(
        mean=mean,
        std=scalars[0],
        coefficient=scalars[1],
        history=History((x - s * v).detach(), h) if solver == "dpm2" else None,
    )


def check_solver(solver: str, noise_level: float) -> None:
    """Raises a `ValueError` for an unknown solver or a noise level that the solver cannot have."""
    if solver not in SOLVERS:
        raise ValueError(f"`solver` must be one of {', '.join(SOLVERS)}, but is {solver!r}.")
    if not (math.isfinite(noise_level) and noise_level >= 0):
        raise ValueError(f"`noise_level` must be a finite number >= 0, but is {noise_level}.")
    if solver in DETERMINISTIC_SOLVERS and noise_level > 0:
        raise ValueError(
            f"`solver={solver!r}` is deterministic and takes no noise, but `noise_level` is {noise_level}. Set "
            "`noise_level=0.0`, or choose one of the solvers flow, dance, cps, ddim."
        )
    if solver in ("ddim", "cps") and noise_level > 1:
        raise ValueError(
            f"`noise_level` must be at most 1 for `solver={solver!r}`, whose noise is a share of the noise that the "
            f"next state holds, but is {noise_level}."
        )


def _ddim_std(s: float, t: float, eta: float) -> float:
    """DDIM's sigma in flow-matching time: `eta t sqrt(1 - t^2 (1-s)^2 / (s^2 (1-t)^2))`."""
    if s >= _SIGMA_ONE:
        return eta * t
    return eta * t * math.sqrt(max(1 - (t * (1 - s) / (s * (1 - t))) ** 2, 0.0))


def _log_snr(sigma: float) -> float:
    """`log((1 - sigma) / sigma)`, finite at both ends."""
    return math.log(max(1 - sigma, _TINY)) - math.log(max(sigma, _TINY))
