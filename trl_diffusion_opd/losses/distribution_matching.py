# SPDX-License-Identifier: Apache-2.0
"""
Distribution matching at the student's own samples: the paper's baselines DMD (https://huggingface.co/papers/2405.14867)
and TDM (https://huggingface.co/papers/2503.06674), for velocities.

A fake score, a second LoRA, learns the velocity of what the student draws. Student samples are noised again, and the
student is moved along the difference of the clean estimates of target and fake score there:
`x_0 = x_t - t v`, so `x_0,fake - x_0,target = t (v_target - v_fake)`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..utils.settings import is_number
from .nft import noised
from .objective import Course, Distillation, Loss, Objective


LOWEST, HIGHEST = 0.02, 0.98  # noise levels at which scores are compared
MAX_SNR = 5.0
_SMALLEST = 1e-6


@dataclass
class DistributionMatching(Objective):
    """
    What DMD and TDM share: which state of the rollout is trained, and how the fake score follows.

    Args:
        fake_updates (`int`, *optional*):
            Updates of the fake score before each of the student.
        fake_learning_rate (`float`, *optional*):
            Of the fake score's AdamW; the student's by default.
    """

    story = (
        "It was distilled by distribution matching: the student drew images of its own, and was moved from where a model of "
        "these images would clean their noised copies to where the teacher of the image's task would."
    )
    needs_fake = True
    visits = False

    fake_updates: int = 5
    fake_learning_rate: float | None = None

    def __post_init__(self):
        rate, updates = self.fake_learning_rate, self.fake_updates
        if isinstance(updates, bool) or not isinstance(updates, int) or updates < 1:
            raise ValueError(
                f"`fake_updates` of the objective {self.name!r} must be a whole number of at least 1, but is {updates!r}."
            )
        if rate is not None and not (is_number(rate) and rate > 0):
            raise ValueError(
                f"`fake_learning_rate` of the objective {self.name!r} must be positive and finite, but is {rate!r}."
            )

    def check(self, course: Course) -> None:
        if course.noise_level != 0:
            raise ValueError(
                f"`objective={self.name!r}` rolls the student out along its ODE, but `noise_level` is "
                f"{course.noise_level:g}. Set it to 0."
            )

    def num_losses(self, num_queries: int) -> int:
        return 1

    def losses(self, run: Distillation) -> Iterator[Loss]:
        trajectory, sigmas = run.trajectory(), run.schedule.sigmas[: run.num_steps]
        # One state of the rollout, the same for all samples of the batch and in all processes
        state = int(np.random.default_rng(run.draw).integers(int((sigmas > LOWEST).sum())))
        segment = sigmas[state].item(), run.schedule.sigmas[state + 1].item()
        with torch.no_grad():
            for _ in range(state):
                trajectory.step(run.student(trajectory.sample, trajectory.timestep).velocity)
            sample, timestep = trajectory.sample, trajectory.timestep
            clean = sample - segment[0] * _wide(run.student(sample, timestep).velocity)
        for _ in range(self.fake_updates):
            noisy, t, velocity, weight = self.lesson(run, sample, clean, *segment)
            run.train_fake(noisy, 1000 * t, velocity, weight)
        noisy, t = self.comparison(run, sample, clean, *segment)
        target, fake = (_wide(v) for v in (run.target(noisy, 1000 * t).velocity, run.fake(noisy, 1000 * t)))
        times = _per_sample(t, clean)
        direction = times * (target - fake)  # x_0,fake - x_0,target
        gap = (clean - (noisy - times * target)).abs().flatten(1).mean(1).clamp(min=_SMALLEST)
        # No adapter may be switched between a forward with gradients and its backward: the state is visited once more.
        estimate = sample - segment[0] * _wide(run.student(sample, timestep).velocity)
        metrics = {"fake_gap": direction.abs().flatten(1).mean(1), "target_gap": gap}
        yield Loss(self.distance(estimate, direction, gap), metrics)

    def lesson(self, run: Distillation, sample: torch.Tensor, clean: torch.Tensor, sigma: float, sigma_next: float):
        """What the fake score learns: states, their times `[B]`, the velocities there, and weights `[B]`."""
        raise NotImplementedError

    def comparison(
        self, run: Distillation, sample: torch.Tensor, clean: torch.Tensor, sigma: float, sigma_next: float
    ):
        """Where target and fake score are compared: states, and their times `[B]`."""
        raise NotImplementedError

    def distance(self, estimate: torch.Tensor, direction: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
        """The student's loss `[B]`, whose gradient with respect to `estimate` is along `direction`."""
        raise NotImplementedError


@dataclass
class DMD(DistributionMatching):
    """
    DMD2 without its discriminator, which needs real images: the sample is the clean estimate at a random state of the
    student's rollout; `d = x_0,fake - x_0,target` at a noise level of its own; the loss is
    `mean (x_0 - sg(x_0 - d / mean |x_0 - x_0,target|))^2 / 2`, whose gradient is along `d`.
    """

    name = "dmd"
    title = "distribution matching, DMD"

    def lesson(self, run, sample, clean, sigma, sigma_next):
        t, eps = draw_times(run, clean, 0.0, 1.0)
        return noised(clean, eps, t), t, eps - clean, torch.ones_like(t)

    def comparison(self, run, sample, clean, sigma, sigma_next):
        t, eps = draw_times(run, clean, LOWEST, HIGHEST)
        return noised(clean, eps, t), t

    def distance(self, estimate, direction, gap):
        goal = estimate.detach() - direction / _per_sample(gap, direction)
        return (estimate - goal).square().flatten(1).mean(1) / 2


@dataclass
class TDM(DistributionMatching):
    """
    Trajectory distribution matching, recast for velocities: the rollout's step from `s` to `u` is a segment, the student's
    own step leads to `x_u`, which is noised on to `t` in `[u, s)`, `x_t = (a_t / a_u) x_u + sqrt(t^2 - (a_t u / a_u)^2)
    eps` with `a = 1 - sigma`. The fake score learns the clean estimate at `x_t`, weighed by `min(SNR, 5)` and by the
    likelihood of the noise that `x_t` holds with respect to that estimate; the loss is `mean (x_0 - sg(x_0 - d))^2 /
    mean |x_0 - x_0,target|`.
    """

    name = "tdm"
    title = "trajectory distribution matching, TDM"

    fake_updates: int = 1

    def lesson(self, run, sample, clean, sigma, sigma_next):
        noisy, t, eps = noised_on(run, sample, clean, sigma, sigma_next)
        times = _per_sample(t, clean)
        mixed = (noisy - (1 - times) * clean) / times
        likelihood = (eps.square().flatten(1).mean(1) / 2 - mixed.square().flatten(1).mean(1) / 2).exp()
        snr = ((1 - t) / t).square()
        # The distance of clean estimates is that of velocities times t^2.
        return noisy, t, (noisy - clean) / times, snr.clamp(max=MAX_SNR) * likelihood * t.square()

    def comparison(self, run, sample, clean, sigma, sigma_next):
        noisy, t, _ = noised_on(run, sample, clean, sigma, sigma_next)
        return noisy, t

    def distance(self, estimate, direction, gap):
        return (estimate - (estimate.detach() - direction)).square().flatten(1).mean(1) / gap


def noised_on(
    run: Distillation, sample: torch.Tensor, clean: torch.Tensor, sigma: float, sigma_next: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The end of a segment noised on to a time within it, `[B, ...]`, that time, `[B]`, and the noise that was added."""
    u = sigma_next
    t, eps = draw_times(run, clean, max(u, LOWEST), sigma)
    reached = sample + (u - sigma) * (sample - clean) / sigma
    times = _per_sample(t, clean)
    kept = (1 - times) / (1 - u)
    return kept * reached + (times.square() - (kept * u).square()).clamp(min=0).sqrt() * eps, t, eps


def draw_times(run: Distillation, like: torch.Tensor, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise levels `[B]`, uniform between two, and standard normal noise, from each sample's own generator."""
    times = torch.stack([torch.rand((), generator=g) for g in run.generators]).to(like)
    eps = torch.stack([torch.randn(like.shape[1:], generator=g) for g in run.generators]).to(like)
    return low + (high - low) * times, eps


def _wide(velocity: torch.Tensor) -> torch.Tensor:
    return velocity.to(torch.promote_types(velocity.dtype, torch.float32))


def _per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))
