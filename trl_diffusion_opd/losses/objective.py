# SPDX-License-Identifier: Apache-2.0
"""
What an objective of distillation is: it is handed the rollout of a batch, and hands out losses one by one.

An objective that compares student and target at the states that the student visits is a [`StepObjective`], and has one
function to write. One that draws samples, or trains at other states, is an [`Objective`].
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch

from ..sampling.denoising import Schedule, Trajectory
from ..sampling.transitions import Transition
from .opd import step_divergence


@dataclass(frozen=True)
class Prediction:
    """
    What a model predicts at a state.

    Args:
        velocity (`torch.Tensor`):
            With its guidance, of shape `[B, ...]`.
        positive (`torch.Tensor`, *optional*), negative (`torch.Tensor`, *optional*):
            The conditional and the unconditional branch, of the same shape, where an objective asked for them.
    """

    velocity: torch.Tensor
    positive: torch.Tensor | None = None
    negative: torch.Tensor | None = None


@dataclass(frozen=True)
class Visit:
    """
    A state that the student visited.

    Args:
        student ([`Prediction`]):
            There; it holds the graph.
        target ([`Prediction`]):
            At the same state; constants.
        transition ([`Transition`]):
            The student's step from there.
        sigma (`float`):
            Its noise level.
        next_sample (`torch.Tensor`):
            The state that the step drew, of shape `[B, ...]`, detached.
        guidance_scale (`float`):
            The student's.
    """

    student: Prediction
    target: Prediction
    transition: Transition
    sigma: float
    next_sample: torch.Tensor
    guidance_scale: float


@dataclass(frozen=True)
class Loss:
    """
    A loss to be differentiated.

    Args:
        value (`torch.Tensor`):
            Of each sample, of shape `[B]`.
        metrics (`dict[str, torch.Tensor]`):
            What is logged beside it, each of shape `[B]` and without a graph. `kl`, the divergence of Eq. 11 or 12, is in
            every one that visits the student's states.
    """

    value: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Course:
    """
    What an objective is checked against before anything is loaded.

    Args:
        solver (`str`), noise_level (`float`):
            Of the rollout.
        guidance_scale (`float`):
            Of the student.
        has_branches (`bool`):
            Whether the student's guidance is made of two branches.
    """

    solver: str
    noise_level: float
    guidance_scale: float
    has_branches: bool


class Distillation(Protocol):
    """
    What an objective sees of the run while it trains a batch of `B` samples of one task. A `timestep` is `1000 sigma`, a
    scalar tensor or of shape `[B]`.

    Attributes:
        schedule ([`Schedule`]):
            Of the rollout.
        num_steps (`int`):
            How many of its steps are trained, from the first.
        queries (`dict[int, float]`):
            The steps at which the target is asked, in order, with their weights, whose mean is 1; for importance sampling,
            on average over the draws.
        generators (`list[torch.Generator]`):
            Of each sample, on the CPU.
        draw (`list[int]`):
            Numbers that seed what is drawn for the batch as a whole, equal in all processes.
        guidance_scale (`float`):
            The student's.
        targets (`list[float]`):
            Weights of the targets: 1 of the task's, then those of the anchors.
    """

    schedule: Schedule
    num_steps: int
    queries: dict[int, float]
    generators: list[torch.Generator]
    draw: list[int]
    guidance_scale: float
    targets: list[float]

    def trajectory(self) -> Trajectory:
        """A rollout from the initial noise."""

    def student(self, sample: torch.Tensor, timestep: torch.Tensor) -> Prediction:
        """The student's prediction, with gradients if they are enabled."""

    def target(self, sample: torch.Tensor, timestep: torch.Tensor, index: int = 0) -> Prediction:
        """
        What the student is to predict, without gradients. No target may be asked between the student's forward and
        its backward.
        """

    def target_samples(self, num_inference_steps: int) -> torch.Tensor:
        """Latents `[B, ...]` that the target draws for the prompts, kept for the next time that it is asked."""

    def fake(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Velocity of the fake score, without gradients."""

    def train_fake(
        self, sample: torch.Tensor, timestep: torch.Tensor, velocity: torch.Tensor, weight: torch.Tensor
    ) -> None:
        """One step of the fake score towards a velocity, each sample with a weight `[B]`."""


@dataclass
class Objective(ABC):
    """
    An objective. Subclasses are dataclasses, whose fields are its settings, and have a `name`.

    Attributes:
        name (`str`):
            By which it is chosen.
        title (`str`):
            What plans call it.
        story (`str`):
            How the student learned, for its card.
        needs_branches (`bool`):
            Whether predictions hold both branches of guidance.
        needs_noise (`bool`):
            Whether each trained step must have noise.
        needs_fake (`bool`):
            Whether there is a fake score, a second LoRA that learns the student's own distribution.
        visits (`bool`):
            Whether it trains at the states that the student visits, where targets can be weighed and steps be chosen.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    story: ClassVar[str] = (
        "It was distilled on-policy: the student drew images of its own, and at every denoising step the teacher of the "
        "image's task showed where it would have gone instead."
    )
    needs_branches: ClassVar[bool] = False
    needs_noise: ClassVar[bool] = False
    needs_fake: ClassVar[bool] = False
    visits: ClassVar[bool] = True

    def check(self, course: Course) -> None:  # noqa: B027 (most go with every course)
        """Raises a `ValueError` for a course that the objective does not go with."""

    @abstractmethod
    def num_losses(self, num_queries: int) -> int:
        """How many losses a batch has, if so many steps are queried."""

    @abstractmethod
    def losses(self, run: Distillation) -> Iterator[Loss]:
        """Hands the losses of a batch out, each after its forward and to be differentiated before the next."""


@dataclass
class StepObjective(Objective):
    """An objective that is a function of what student and target predict at a state that the student visits."""

    @abstractmethod
    def loss(self, visit: Visit) -> torch.Tensor:
        """
        The loss at a state.

        Returns:
            `torch.Tensor` of shape `[B]`, in float32 or float64.
        """

    def weight(self, transition: Transition, sigma: float) -> float:
        """`w` of a step if the loss is `w * mean_d (v_S - v_T)^2`, for importance sampling of steps."""
        raise ValueError(
            f"`query_distribution='importance'` needs an objective that is a weighted distance of velocities, but "
            f"{self.name!r} is none. Choose another distribution."
        )

    def num_losses(self, num_queries: int) -> int:
        return num_queries

    def losses(self, run: Distillation) -> Iterator[Loss]:
        trajectory, last = run.trajectory(), max(run.queries)
        for index in range(last + 1):
            sample, timestep = trajectory.sample, trajectory.timestep
            if index not in run.queries:
                with torch.no_grad():
                    trajectory.step(run.student(sample, timestep).velocity)
                continue
            # Targets come first: between the student's forward and backward no adapter may be switched.
            targets = [run.target(sample, timestep, number) for number in range(len(run.targets))]
            student = run.student(sample, timestep)
            step = trajectory.step(student.velocity)
            sigma = run.schedule.sigmas[index].item()
            visits = [
                Visit(student, target, step.transition, sigma, step.next_sample, run.guidance_scale)
                for target in targets
            ]
            value = self.loss(visits[0])
            for factor, visit in zip(run.targets[1:], visits[1:], strict=True):
                value = value + factor * self.loss(visit)
            yield Loss(run.queries[index] * value, {"kl": self.divergence(visits[0])})

    def divergence(self, visit: Visit) -> torch.Tensor:
        """The divergence of Eq. 11 or 12 `[B]`, whatever the loss is."""
        return step_divergence(visit.student.velocity.detach(), visit.target.velocity, visit.transition)
