# SPDX-License-Identifier: Apache-2.0
"""
The paper's comparison with reinforcement learning (Eq. 16-19): the divergence from the teacher as a negative reward of
the step that was drawn, `next_sample = mean_S + s eps`, with PPO's ratio of the new and the old policy.

Nothing is updated within a round, so that the ratio is 1 and its logarithm, `log p - log p_old`, has a value of 0 and the
gradient `(eps / s) d mean_S`.
"""

from dataclasses import dataclass

import torch

from ..utils.settings import is_number
from .grpo import log_ratio, mean_shift, surrogate_loss
from .objective import Course, StepObjective, Visit
from .opd import step_divergence


ADVANTAGES = ("kl", "log_ratio")
REDUCTIONS = ("mean", "sum")


@dataclass
class PolicyGradient(StepObjective):
    """
    Policy gradient of the divergence `D` of a step from the teacher's.

    - `advantage="kl"`: `A = -D` and the loss `r D`, where `D` is differentiated too, as in Eq. 18 and 19. Its gradient is
      that of the closed form and `D (eps / s) d mean_S`, noise with the mean 0. (With `D` detached nothing would be left
      but this noise: `D` does not depend on what was drawn.)
    - `advantage="log_ratio"`: `A = log p_T - log p_S` of what was drawn, a constant; the form of language models. With
      sums over the dimensions in the ratio its expected gradient is that of the closed form.

    Eq. 17 has a minus sign that Eq. 21 does not have; this is Eq. 21's.

    Args:
        advantage (`str`, *optional*, defaults to `"kl"`):
            `"kl"` or `"log_ratio"`.
        reduction (`str`, *optional*, defaults to `"mean"`):
            Whether the ratio's log-densities are means over the latent dimensions, as in Flow-GRPO, or sums, whose noise
            grows with the square root of their number. The advantage is a mean, as all divergences here.
        clip_range (`float`, *optional*, defaults to `1e-4`):
            `e` of PPO's clipping.
    """

    name = "policy_gradient"
    title = "policy gradient, Eq. 16-19"
    needs_noise = True

    advantage: str = "kl"
    reduction: str = "mean"
    clip_range: float = 1e-4

    def __post_init__(self):
        for name, known in (("advantage", ADVANTAGES), ("reduction", REDUCTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` of the objective 'policy_gradient' must be {' or '.join(map(repr, known))}, but is "
                    f"{getattr(self, name)!r}."
                )
        if not (is_number(self.clip_range) and 0 < self.clip_range < 1):
            raise ValueError(
                "`clip_range` of the objective 'policy_gradient' must be above 0 and below 1, but is "
                f"{self.clip_range!r}."
            )

    def check(self, course: Course) -> None:
        if course.noise_level == 0:
            raise ValueError(
                "`objective='policy_gradient'` needs steps that are drawn, but at `noise_level` 0 the step is a function of "
                "the state: there is no density, and no ratio of densities. Set `noise_level`, to 0.7 as in the paper."
            )

    def loss(self, visit: Visit) -> torch.Tensor:
        transition, velocity = visit.transition, visit.student.velocity
        s, mean = transition.std, transition.mean.detach()
        if s == 0:
            raise ValueError(
                f"The step from sigma {visit.sigma:.4f} has no noise, and no density. Leave it out with `skip_last_steps`."
            )
        eps = (visit.next_sample - mean) / s
        shift = mean_shift(velocity, velocity, transition.coefficient)
        ratio = log_ratio(shift, eps, s, loss_type="grpo")
        if self.reduction == "sum":
            ratio = ratio * shift.shape[1]
        divergence = step_divergence(velocity, visit.target.velocity, transition)  # also refuses two shapes
        if self.advantage == "kl":
            advantage = -divergence
        else:
            to_student = mean_shift(visit.target.velocity, velocity, transition.coefficient)
            advantage = log_ratio(to_student, eps, s, loss_type="grpo").detach()
        return surrogate_loss(ratio, advantage, self.clip_range)
