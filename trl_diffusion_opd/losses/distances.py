# SPDX-License-Identifier: Apache-2.0
"""
Objectives that are distances between student and target at the states that the student visits.

All but the branch-wise ones are `w * mean_d (v_S - v_T)^2`, with their own weights of the steps.
"""

from dataclasses import dataclass

import torch

from ..sampling.transitions import Transition
from ..utils.settings import is_number
from .objective import Course, StepObjective, Visit
from .opd import divergence_weight, mean_square, step_divergence


@dataclass
class KL(StepObjective):
    """
    The paper's: the closed-form KL divergence of the two steps (Eq. 11), or the matching of their means where the step
    has no noise (Eq. 12). See [`step_divergence`].
    """

    name = "kl"
    title = "closed-form KL, Eq. 11; mean matching, Eq. 12, without noise"

    def loss(self, visit: Visit) -> torch.Tensor:
        return step_divergence(visit.student.velocity, visit.target.velocity, visit.transition)

    def weight(self, transition: Transition, sigma: float) -> float:
        return divergence_weight(transition).item()


@dataclass
class MeanMatching(StepObjective):
    """`||mean_S - mean_T||^2 / 2` with noise or without, Fig. 6's plain distance of the means."""

    name = "mean"
    title = "distance of the means"

    def loss(self, visit: Visit) -> torch.Tensor:
        return self.weight(visit.transition, visit.sigma) * _velocities(visit)

    def weight(self, transition: Transition, sigma: float) -> float:
        return transition.coefficient.item() ** 2 / 2


@dataclass
class VelocityMatching(StepObjective):
    """`mean_d (v_S - v_T)^2`, all steps alike (DanceOPD, Qwen-Image-2.0-RL)."""

    name = "velocity"
    title = "velocity matching"

    def loss(self, visit: Visit) -> torch.Tensor:
        return _velocities(visit)

    def weight(self, transition: Transition, sigma: float) -> float:
        return 1.0


@dataclass
class CleanMatching(StepObjective):
    """The distance of the clean estimates `x_0 = x - sigma v`: `sigma^2 mean_d (v_S - v_T)^2`."""

    name = "x0"
    title = "matching of the clean estimates"

    def loss(self, visit: Visit) -> torch.Tensor:
        return visit.sigma**2 * _velocities(visit)

    def weight(self, transition: Transition, sigma: float) -> float:
        return sigma**2


FORMS = ("split", "guided", "difference")


@dataclass
class BranchMatching(StepObjective):
    """
    Both branches of guidance are matched, instead of the sum that guidance makes of them, which is blind to errors
    `e_c = ((g - 1) / g) e_u`. With `e_c` and `e_u` the errors of the conditional and the unconditional velocity, `g` the
    student's guidance and `w` the weight of Eq. 11 or 12, the loss is `w` times

    - `"split"`: `mean e_c^2 + mean e_u^2` (the split KL of https://huggingface.co/papers/2609.39692);
    - `"guided"`: `g^2 mean e_c^2 + (g - 1)^2 mean e_u^2`, as IBM is told of there;
    - `"difference"`: `mean e_c^2 + l mean (e_c - e_u)^2`, as PDM is told of elsewhere; the primary sources were not read.

    Args:
        form (`str`, *optional*, defaults to `"split"`):
            Which of the three.
        difference_weight (`float`, *optional*, defaults to `1.0`):
            `l`.
    """

    name = "branches"
    title = "matching of both branches of guidance"
    needs_branches = True

    form: str = "split"
    difference_weight: float = 1.0

    def __post_init__(self):
        if self.form not in FORMS:
            raise ValueError(
                f"`form` of the objective 'branches' must be one of {', '.join(FORMS)}, but is {self.form!r}."
            )
        if not (is_number(self.difference_weight) and self.difference_weight >= 0):
            raise ValueError(
                "`difference_weight` of the objective 'branches' must be a finite number of at least 0, but is "
                f"{self.difference_weight!r}."
            )

    def check(self, course: Course) -> None:
        if not course.has_branches:
            raise ValueError(
                "`objective='branches'` matches both branches of the student's guidance, but at `guidance_scale` "
                f"{course.guidance_scale:g} the student has one. Raise it above 1, for a base that has two branches."
            )

    def loss(self, visit: Visit) -> torch.Tensor:
        student, target, g = visit.student, visit.target, visit.guidance_scale
        positive = mean_square(student.positive, target.positive)
        negative = mean_square(student.negative, target.negative)
        if self.form == "split":
            error = positive + negative
        elif self.form == "guided":
            error = g**2 * positive + (g - 1) ** 2 * negative
        else:
            between = mean_square(
                *(_wide(branches.positive) - _wide(branches.negative) for branches in (student, target))
            )
            error = positive + self.difference_weight * between
        return divergence_weight(visit.transition) * error


def _wide(velocity: torch.Tensor) -> torch.Tensor:
    return velocity.to(torch.promote_types(velocity.dtype, torch.float32))


def _velocities(visit: Visit) -> torch.Tensor:
    return mean_square(visit.student.velocity, visit.target.velocity)
