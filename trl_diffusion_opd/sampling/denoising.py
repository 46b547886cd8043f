# SPDX-License-Identifier: Apache-2.0
"""The one denoising loop, shared by the pipeline's `__call__`, by training and by evaluation."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift, retrieve_timesteps

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
    image_seq_len: int | None = None,
) -> Schedule:
    """
    The scheduler's own schedule, exactly as `set_timesteps` makes it, without touching the scheduler's state.

    For SD3.5 (shift 3) and 10 steps this is 1, .9601, .9133, .8577, .7904, .7073, .6022, .4649, .2780, .0089, 0: the
    scheduler shifts its smallest sigma a second time.

    Args:
        scheduler ([`~diffusers.FlowMatchEulerDiscreteScheduler`]):
            The pipeline's scheduler.
        num_inference_steps (`int`):
            `N`. Ignored if `sigmas` are given.
        sigmas (`list[float]`, *optional*):
            Noise levels before the scheduler's shift, instead of its own.
        mu (`float`, *optional*), image_seq_len (`int`, *optional*):
            The shift of a scheduler with `use_dynamic_shifting`, or the number of patches it is computed from.

    Raises:
        `ValueError`: a scheduler that the solvers cannot follow, see [`schedulers.check_scheduler`].
    """
    check_scheduler(scheduler)
    scheduler = copy.deepcopy(scheduler)
    config = scheduler.config
    if config.get("use_dynamic_shifting") and mu is None:
        mu = calculate_shift(
            image_seq_len,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.16),
        )
    retrieve_timesteps(
        scheduler,
        num_inference_steps,
        device="cpu",
        sigmas=sigmas,
        **({} if mu is None else {"mu": mu}),
    )
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


def denoise(
    velocity: Callable[[torch.Tensor, int], torch.Tensor],
    sample: torch.Tensor,
    schedule: Schedule,
    *,
    solver: str = "flow",
    noise_level: float = 0.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    num_steps: int | None = None,
) -> Iterator[DenoisingStep]:
    """
    Rolls the model out on its own trajectory, one step at each `next()`.

    Args:
        velocity (`Callable`):
            `velocity(sample, index)`, the model: the velocity at state `sample` and `schedule.sigmas[index]`.
        sample (`torch.Tensor`):
            Initial noise, of shape `[B, ...]`. States are kept in float32 (or float64), whatever the model computes in.
        schedule ([`Schedule`]):
            Noise levels to visit.
        solver (`str`, *optional*, defaults to `"flow"`), noise_level (`float`, *optional*, defaults to `0.0`):
            See [`transitions.transition`].
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
            Source of the injected noise, for the batch or for each sample.
        num_steps (`int`, *optional*):
            Stop after this many steps; all of them by default.

    Yields:
        [`DenoisingStep`]: the state visited, the velocity there and the step's transition.
    """
    sample = sample.detach().to(torch.promote_types(sample.dtype, torch.float32))
    sigmas = schedule.sigmas.tolist()
    history = None
    for index in range(len(schedule) if num_steps is None else num_steps):
        predicted = velocity(sample, index)
        step = transition(
            solver,
            sample,
            predicted,
            sigmas[index],
            sigmas[index + 1],
            noise_level=noise_level,
            sigma_max=sigmas[1],
            history=history,
        )
        history = step.history
        state = DenoisingStep(index, sample, predicted, step, step.sample(generator).detach())
        yield state
        sample = state.next_sample.to(sample.dtype)
