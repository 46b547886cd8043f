# SPDX-License-Identifier: Apache-2.0
"""Schedules and denoising, shared by the pipeline's `__call__`, by training and by evaluation."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from .schedulers import check_scheduler
from .transitions import Transition, transition


@dataclass
class Schedule:
    """
    Noise levels of a rollout.

    Args:
        sigmas (`torch.Tensor`):
            Of shape `[N + 1]`, from `sigmas[0]` (1 for a rollout that starts at pure noise) to 0, float32 on the CPU.
        timesteps (`torch.Tensor`):
            What the transformer is told at each step, of shape `[N]`: `1000 * sigma`.
    """

    sigmas: torch.Tensor
    timesteps: torch.Tensor

    def __len__(self) -> int:
        return len(self.timesteps)


def make_schedule(
    scheduler: FlowMatchEulerDiscreteScheduler,
    num_inference_steps: int,
    sigmas: list[float] | None = None,
    *,
    mu: float | None = None,
) -> Schedule:
    """
    The scheduler's own schedule, exactly as `set_timesteps` makes it, without touching the scheduler's state.

    With a static shift of 3 and 10 steps this is 1, .9601, .9133, .8577, .7904, .7073, .6022, .4649, .2780, .0089, 0:
    the scheduler shifts its smallest sigma a second time.

    Args:
        scheduler ([`~diffusers.FlowMatchEulerDiscreteScheduler`]):
            The pipeline's scheduler.
        num_inference_steps (`int`):
            `N`. Ignored if `sigmas` are given.
        sigmas (`list[float]`, *optional*):
            Noise levels before the scheduler's shift, instead of its own.
        mu (`float`, *optional*):
            The shift of a scheduler with `use_dynamic_shifting`.

    Raises:
        `ValueError`: a scheduler that the solvers cannot follow, see [`schedulers.check_scheduler`].
    """
    check_scheduler(scheduler)
    scheduler = copy.deepcopy(scheduler)
    levels = {"num_inference_steps": num_inference_steps} if sigmas is None else {"sigmas": sigmas}
    scheduler.set_timesteps(**levels, device="cpu", **({} if mu is None else {"mu": mu}))
    return Schedule(scheduler.sigmas.float(), scheduler.timesteps)


@dataclass
class DenoisingStep:
    """
    One step of a rollout, handed out before the loop moves on.

    Args:
        index (`int`):
            `j`, from 0 to `N - 1`.
        sample (`torch.Tensor`):
            State visited, of shape `[B, ...]`, detached.
        velocity (`torch.Tensor`):
            The model's velocity there. Holds the graph if the model was called with gradients.
        transition ([`Transition`]):
            The step's Gaussian; its mean is differentiable with respect to `velocity`.
        next_sample (`torch.Tensor`):
            State that the next step starts from, detached. Set it to continue from another one.
    """

    index: int
    sample: torch.Tensor
    velocity: torch.Tensor
    transition: Transition
    next_sample: torch.Tensor


class Trajectory:
    """
    A rollout, one step at a time: ask a model for the velocity at `sample` and `timestep`, then take a `step` with it.

    Args:
        sample (`torch.Tensor`):
            Initial noise, of shape `[B, ...]`. States are kept in float32 (or float64), whatever the model computes in.
        schedule ([`Schedule`]):
            Noise levels to visit.
        solver (`str`, *optional*, defaults to `"flow"`), noise_level (`float`, *optional*, defaults to `0.0`):
            See [`transitions.transition`].
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
            Source of the injected noise, for the batch or for each sample.

    Attributes:
        index (`int`):
            Number of steps taken.
        sample (`torch.Tensor`):
            The state that was reached, detached. Set it to continue from another one.
    """

    def __init__(
        self,
        sample: torch.Tensor,
        schedule: Schedule,
        *,
        solver: str = "flow",
        noise_level: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ):
        self.index = 0
        self.sample = sample.detach().to(torch.promote_types(sample.dtype, torch.float32))
        self.solver, self.noise_level, self.generator = solver, noise_level, generator
        self._sigmas = schedule.sigmas.tolist()
        self._timesteps = schedule.timesteps.to(sample.device)
        self._history = None

    @property
    def timestep(self) -> torch.Tensor:
        """What the model is told at `sample`, a scalar: `1000 * sigma`."""
        return self._timesteps[self.index]

    def step(self, velocity: torch.Tensor) -> DenoisingStep:
        """Takes the next step with the velocity at `sample`, of the same shape."""
        taken = transition(
            self.solver,
            self.sample,
            velocity,
            self._sigmas[self.index],
            self._sigmas[self.index + 1],
            noise_level=self.noise_level,
            sigma_max=self._sigmas[1],
            history=self._history,
        )
        step = DenoisingStep(self.index, self.sample, velocity, taken, taken.sample(self.generator).detach())
        self._history = taken.history
        self.sample, self.index = step.next_sample.to(self.sample.dtype), self.index + 1
        return step


def denoise(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    sample: torch.Tensor,
    schedule: Schedule,
    *,
    num_steps: int | None = None,
    **kwargs: Any,
) -> Iterator[DenoisingStep]:
    """
    Rolls a model out on its own trajectory, one step at each `next()`.

    Args:
        velocity (`Callable`):
            `velocity(sample, timestep)`, the model.
        sample (`torch.Tensor`), schedule ([`Schedule`]), kwargs:
            See [`Trajectory`].
        num_steps (`int`, *optional*):
            Stop after this many steps; all of them by default.

    Yields:
        [`DenoisingStep`]: the state visited, the velocity there and the step's transition. The next step starts from its
        `next_sample`, which may be set.
    """
    trajectory = Trajectory(sample, schedule, **kwargs)
    for _ in range(len(schedule) if num_steps is None else num_steps):
        step = trajectory.step(velocity(trajectory.sample, trajectory.timestep))
        yield step
        trajectory.sample = step.next_sample.to(trajectory.sample.dtype)
