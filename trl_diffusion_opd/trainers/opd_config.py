# SPDX-License-Identifier: Apache-2.0
"""Settings of the [`DiffusionOPDTrainer`]."""

from dataclasses import dataclass, field

from .base_config import DiffusionConfig


@dataclass
class DiffusionOPDConfig(DiffusionConfig):
    r"""
    Configuration class for the [`DiffusionOPDTrainer`].

    Parameters:
        offload_teachers (`bool`, *optional*, defaults to `False`):
            Whether teachers on another backbone than the student's are in host memory while it is not their turn. The
            next one is copied to the GPU while the student works.
        eval_fixed_kl (`bool`, *optional*, defaults to `False`):
            Whether evaluations also report `fixed_kl`, the divergence of the student from the task's teacher at the
            states of the teacher's own rollout, which are the same for all students. It takes as many forwards again.

    The others are those of [`DiffusionConfig`]. Rollout, guidance and optimizer have the defaults of the published
    recipe; these differ:

    - `ema_decay` is `None` instead of 0.9: the published average lags 26 steps behind the student, which is much in a
      short run. `examples/configs/sd35_medium.yaml` sets it as published.
    - The precision is bfloat16, as in TRL, instead of float16 beside a base in float32, because the base then needs half
      the memory and gradients need no scaling. Rounding puts a floor under the divergence that is logged: 2e-5 on a tiny
      model with a bfloat16 base, where it is 5e-6 otherwise. For the published precision set `fp16=True` and
      `model_init_kwargs={"dtype": "float32"}`.
    """

    offload_teachers: bool = field(
        default=False,
        metadata={
            "help": "Whether teachers on another backbone than the student's are in host memory while it is not their "
            "turn."
        },
    )
    eval_fixed_kl: bool = field(
        default=False,
        metadata={
            "help": "Whether evaluations also report the divergence from the teacher at the states of its own rollout."
        },
    )
