# SPDX-License-Identifier: Apache-2.0
"""
The solvers: what one step of each does to a state, and what is true of each. A new solver is one function and one entry
of `SOLVERS`, nothing else.

`s` is the current sigma, `t` the next one, `dt = t - s < 0`, and `a` the noise level. Numbers only, in float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass


# Below this distance from 1, `sigma` counts as 1: schedules are computed in float32.
_SIGMA_ONE = 1.0 - 1e-6
# Stands in for log(0) at both ends of the schedule.
_TINY = 1e-30


@dataclass(frozen=True)
class Coefficients:
    """
    One step in numbers: `mean = sample * x + velocity * v + previous * m`, with `m` the clean estimate of the step before.

    Args:
        sample (`float`), velocity (`float`):
            Weights of the state and of the velocity.
        std (`float`, *optional*, defaults to `0.0`):
            Standard deviation of the whole step.
        previous (`float`, *optional*, defaults to `0.0`):
            Weight of the clean estimate of the step before.
        log_snr_step (`float`, *optional*):
            Step of `log((1 - sigma) / sigma)`, for solvers that remember the step before; `None` for the others.
    """

    sample: float
    velocity: float
    std: float = 0.0
    previous: float = 0.0
    log_snr_step: float | None = None


@dataclass(frozen=True)
class Solver:
    """
    A solver and what is true of it.

    Args:
        step (`Callable`):
            `step(s, t, noise_level, sigma_max, previous_step) -> Coefficients`, where `previous_step` is the
            `log_snr_step` of the step before, or `None` at the first step.
        max_noise_level (`float`, *optional*, defaults to infinity):
            Largest noise level that it can have. 0 for a deterministic solver.
        last_step_is_noiseless (`bool`, *optional*, defaults to `False`):
            Whether the step to 0 has no noise, whatever the noise level.
        is_euler_without_noise (`bool`, *optional*, defaults to `True`):
            Whether at noise level 0 its step is Euler's, which stock pipelines take.
        guard_factor (`Callable`, *optional*):
            `guard_factor(s, noise_level)`: GRPO-Guard multiplies the loss of a step with this over `-dt`. `None` for
            solvers that GRPO-Guard is not defined for.
    """

    step: Callable[[float, float, float, float, float | None], Coefficients]
    max_noise_level: float = math.inf
    last_step_is_noiseless: bool = False
    is_euler_without_noise: bool = True
    guard_factor: Callable[[float, float], float] | None = None

    @property
    def is_deterministic(self) -> bool:
        return self.max_noise_level == 0


def flow(s: float, t: float, noise_level: float, sigma_max: float, previous_step: float | None) -> Coefficients:
    """The SDE of Flow-GRPO (Eq. 5-9 of the paper): noise of the rate `a sqrt(s / (1 - s))`."""
    return _sde(s, t, noise_level * math.sqrt(s / (1 - (sigma_max if s >= _SIGMA_ONE else s))))


def dance(s: float, t: float, noise_level: float, sigma_max: float, previous_step: float | None) -> Coefficients:
    """The SDE of DanceGRPO: noise of the rate `a` at every sigma."""
    return _sde(s, t, noise_level)


def cps(s: float, t: float, noise_level: float, sigma_max: float, previous_step: float | None) -> Coefficients:
    """Coefficients-preserving sampling: a share `sin(a pi / 2)` of the next state's noise is drawn anew."""
    return _renoised(s, t, t * math.sin(noise_level * math.pi / 2))


def ddim(s: float, t: float, noise_level: float, sigma_max: float, previous_step: float | None) -> Coefficients:
    """DDIM in flow-matching time: noise of `a t sqrt(1 - t^2 (1-s)^2 / (s^2 (1-t)^2))`."""
    if s >= _SIGMA_ONE:
        return _renoised(s, t, noise_level * t)
    return _renoised(s, t, noise_level * t * math.sqrt(max(1 - (t * (1 - s) / (s * (1 - t))) ** 2, 0.0)))


def dpm1(s: float, t: float, noise_level: float, sigma_max: float, previous_step: float | None) -> Coefficients:
    """DPM-Solver++ of first order, which is Euler's step written with the clean estimate."""
    w = -(1 - t) * math.expm1(-(_log_snr(t) - _log_snr(s)))
    return Coefficients(sample=t / s + w, velocity=-w * s)


def dpm2(s: float, t: float, noise_level: float, sigma_max: float, previous_step: float | None) -> Coefficients:
    """
    DPM-Solver++(2M), the multistep solver of second order; its first and last step are of first order.

    `log(0)` counts as `log(1e-30)` at both ends of the schedule, where the published code of DiffusionNFT has minus
    infinity: its rollouts end 1.2e-3 apart from these at 4 steps, 1.7e-5 at 10.
    """
    h = _log_snr(t) - _log_snr(s)
    w = -(1 - t) * math.expm1(-h)
    previous = -w * h / (2 * previous_step) if previous_step is not None and t > 0 else 0.0
    return Coefficients(sample=t / s + (w - previous), velocity=-(w - previous) * s, previous=previous, log_snr_step=h)


def _sde(s: float, t: float, k: float) -> Coefficients:
    """The Euler-Maruyama step of the SDE with the marginals of the ODE and noise of the rate `k`."""
    dt = t - s
    return Coefficients(
        sample=1 + k**2 / (2 * s) * dt, velocity=(1 + k**2 * (1 - s) / (2 * s)) * dt, std=k * math.sqrt(-dt)
    )


def _renoised(s: float, t: float, std: float) -> Coefficients:
    """The clean estimate brought to `t`, with `std` of its noise drawn anew: `(1 - t) x_0 + sqrt(t^2 - std^2) eps`."""
    direction = math.sqrt(max(t**2 - std**2, 0.0))
    return Coefficients(sample=(1 - t) + direction, velocity=-(1 - t) * s + (1 - s) * direction, std=std)


def _log_snr(sigma: float) -> float:
    """`log((1 - sigma) / sigma)`, finite at both ends."""
    return math.log(max(1 - sigma, _TINY)) - math.log(max(sigma, _TINY))


SOLVERS: dict[str, Solver] = {
    "flow": Solver(flow, guard_factor=lambda s, noise_level: 1.0),
    "dance": Solver(dance, guard_factor=lambda s, noise_level: 1 + noise_level**2 * (1 - s) / (2 * s)),
    "cps": Solver(cps, max_noise_level=1.0, last_step_is_noiseless=True),
    "ddim": Solver(ddim, max_noise_level=1.0, last_step_is_noiseless=True),
    "dpm1": Solver(dpm1, max_noise_level=0.0),
    "dpm2": Solver(dpm2, max_noise_level=0.0, is_euler_without_noise=False),
}


def check_solver(solver: str, noise_level: float) -> None:
    """Raises a `ValueError` for an unknown solver or a noise level that the solver cannot have."""
    if solver not in SOLVERS:
        raise ValueError(f"`solver` must be one of {', '.join(SOLVERS)}, but is {solver!r}.")
    if not (math.isfinite(noise_level) and noise_level >= 0):
        raise ValueError(f"`noise_level` must be a finite number >= 0, but is {noise_level}.")
    if SOLVERS[solver].is_deterministic and noise_level > 0:
        others = ", ".join(name for name, other in SOLVERS.items() if not other.is_deterministic)
        raise ValueError(
            f"`solver={solver!r}` is deterministic and takes no noise, but `noise_level` is {noise_level}. Set "
            f"`noise_level=0.0`, or choose one of the solvers {others}."
        )
    if noise_level > SOLVERS[solver].max_noise_level:
        raise ValueError(
            f"`noise_level` must be at most {SOLVERS[solver].max_noise_level:g} for `solver={solver!r}`, whose noise is "
            f"a share of the noise that the next state holds, but is {noise_level}."
        )
