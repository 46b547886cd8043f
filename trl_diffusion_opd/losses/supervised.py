# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on the teachers' samples, the paper's off-policy baseline."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .nft import noised
from .objective import Course, Distillation, Loss, Objective
from .opd import mean_square


@dataclass
class SFT(Objective):
    """
    Flow matching on the teachers' samples: `mean_d (v_S(x_t) - (eps - x_0))^2`, with `t` logit-normal. As many noise
    levels are trained as the rollout of distillation has steps, so that a round has as many backwards.

    Args:
        num_inference_steps (`int`, *optional*):
            Steps of the teachers' sampling; those of a rollout by default.
        guided (`bool`, *optional*, defaults to `False`):
            Whether the student's guided velocity is trained, as by distillation. By default the conditional one is: the
            samples hold the teachers' guidance already, and the student is to be used without.
    """

    name = "sft"
    title = "fine-tuning on the teachers' samples"
    story = "It was fine-tuned on images that the teacher of each task drew for its prompts."
    visits = False

    num_inference_steps: int | None = None
    guided: bool = False

    def __post_init__(self):
        steps = self.num_inference_steps
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(
                f"`num_inference_steps` of the objective 'sft' must be a whole number of at least 1, but is {steps!r}."
            )
        if not isinstance(self.guided, bool):
            raise ValueError(f"`guided` of the objective 'sft' must be true or false, but is {self.guided!r}.")

    def check(self, course: Course) -> None:
        if not self.guided and course.has_branches:
            raise ValueError(
                "`objective='sft'` trains the conditional velocity, to be used without guidance, but `guidance_scale` is "
                f"{course.guidance_scale:g}. Set it to 1 and `teacher_guidance_scale` to the teachers' own, or "
                "`objective_kwargs={'guided': True}` to train the guided velocity."
            )

    def num_losses(self, num_queries: int) -> int:
        return num_queries

    def losses(self, run: Distillation) -> Iterator[Loss]:
        clean = run.target_samples(self.num_inference_steps or len(run.schedule))
        for _ in range(run.num_steps):
            t = torch.stack([torch.randn((), generator=g) for g in run.generators]).sigmoid().to(clean)
            eps = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in run.generators]).to(clean)
            velocity = run.student(noised(clean, eps, t), 1000 * t).velocity
            yield Loss(mean_square(velocity, eps - clean))
