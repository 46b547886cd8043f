# SPDX-License-Identifier: Apache-2.0
"""Settings of the [`DiffusionOPDTrainer`]."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..lora.merging import METHODS
from ..lora.ssr import SSR
from ..losses.queries import DISTRIBUTIONS
from ..losses.registry import OBJECTIVES, make_objective
from ..utils.settings import AT_LEAST_1, NOT_NEGATIVE, Rule
from .base_config import DiffusionConfig


STARTS = (*METHODS, SSR)


@dataclass
class DiffusionOPDConfig(DiffusionConfig):
    r"""
    Configuration class for the [`DiffusionOPDTrainer`].

    Parameters:
        objective (`str`, *optional*, defaults to `"kl"`):
            How the student is pulled to its target: `"kl"`, the paper's Eq. 11 or 12; `"mean"`, `"velocity"`, `"x0"`, other
            weights of the steps; `"branches"`, both branches of guidance; `"policy_gradient"`, Eq. 16-19; `"dmd"`,
            `"tdm"`, `"sft"`, the paper's other baselines; or `"package.module:Class"` of an
            [`~losses.objective.Objective`].
        objective_kwargs (`dict` or `str`, *optional*):
            Its settings, by the names of the fields of its class.
        query_steps (`int`, *optional*):
            At how many steps of a rollout the target is asked and the student trained. Defaults to all. The rollout ends
            after the last of them.
        query_distribution (`str`, *optional*, defaults to `"uniform"`):
            Where they are: `"uniform"`; `"late"`, `"early"` or `"middle"` in the rollout; `"importance"`, in proportion
            to the objective's weights of the steps, with the expected gradient of all steps.
        teacher_guidance_scale (`float`, *optional*):
            Guidance of teachers that do not set their own. Defaults to `guidance_scale`. With `guidance_scale=1` the
            guidance of the teachers is folded into the student, which then needs one forward a step.
        targets (`dict[str, dict[str, float]]` or `str`, *optional*):
            By task, weights of what takes the place of its teacher: teachers by their tasks, `"base"`, and `"average"`,
            the moving average of the student. They sum to 1. Tasks named here need no teacher of their own.
        teacher_extrapolation (`float`, *optional*, defaults to `1.0`):
            `l` in the target `l v + (1 - l) v_reference`: beyond 1 the student is to go further than its teacher.
        extrapolation_reference (`str`, *optional*, defaults to `"base"`):
            The reference: `"base"`, `"average"`, or the task of a teacher.
        anchor (`str`, *optional*):
            A second target on all prompts: `"base"`, `"average"`, or the task of a teacher.
        anchor_weight (`float`, *optional*, defaults to `0.04`):
            Weight of its loss.
        adaptive_task_weights (`float`, *optional*, defaults to `0.0`):
            `p` in the weights of the tasks' losses, in proportion to `(loss / first loss)^p`. 0 weighs all alike.
        merge_teachers (`str`, *optional*):
            How the teachers' LoRAs are merged into the one that the student starts from: `"sum"`, `"mean"`, `"ties"`,
            `"dare"`, or `"ssr"`, SSR-Merge with what each teacher sees while it draws some of its prompts. By default the
            student starts at the base, as in the paper.
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

    _VALID_DICT_FIELDS: ClassVar = [*DiffusionConfig._VALID_DICT_FIELDS, "objective_kwargs", "targets"]
    _rules: ClassVar = {
        **DiffusionConfig._rules,
        "query_steps": AT_LEAST_1,
        "query_distribution": Rule(lambda value: value in DISTRIBUTIONS, f"one of {', '.join(DISTRIBUTIONS)}"),
        "teacher_guidance_scale": NOT_NEGATIVE,
        "teacher_extrapolation": NOT_NEGATIVE,
        "anchor_weight": NOT_NEGATIVE,
        "adaptive_task_weights": NOT_NEGATIVE,
        "merge_teachers": Rule(lambda value: value in STARTS, f"one of {', '.join(STARTS)}"),
    }

    objective: str = field(
        default="kl", metadata={"help": f"How the student is pulled to its target: {', '.join(OBJECTIVES)}."}
    )
    objective_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Settings of the objective, by the names of the fields of its class."}
    )
    query_steps: int | None = field(
        default=None,
        metadata={"help": "At how many steps of a rollout the target is asked. Defaults to all."},
    )
    query_distribution: str = field(
        default="uniform",
        metadata={"help": f"Where in the rollout these steps are: {', '.join(DISTRIBUTIONS)}."},
    )
    teacher_guidance_scale: float | None = field(
        default=None,
        metadata={
            "help": "Guidance of teachers that do not set their own. Defaults to `guidance_scale`. With "
            "`guidance_scale` 1 it is folded into the student."
        },
    )
    targets: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "By task, weights of what takes the place of its teacher: teachers by their tasks, `base`, and "
            "`average`, the moving average of the student. They sum to 1."
        },
    )
    teacher_extrapolation: float = field(
        default=1.0,
        metadata={
            "help": "l in the target `l v + (1 - l) v_reference`; beyond 1 the student goes further than its teacher."
        },
    )
    extrapolation_reference: str = field(
        default="base", metadata={"help": "That reference: `base`, `average`, or the task of a teacher."}
    )
    anchor: str | None = field(
        default=None,
        metadata={"help": "A second target on all prompts: `base`, `average`, or the task of a teacher."},
    )
    anchor_weight: float = field(default=0.04, metadata={"help": "Weight of the anchor's loss."})
    adaptive_task_weights: float = field(
        default=0.0,
        metadata={
            "help": "p in the weights of the tasks' losses, in proportion to `(loss / first loss)^p`. 0 weighs all alike."
        },
    )
    merge_teachers: str | None = field(
        default=None,
        metadata={
            "help": f"How the teachers' LoRAs are merged into the one that the student starts from: {', '.join(STARTS)}. "
            "By default it starts at the base."
        },
    )
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

    def __post_init__(self):
        super().__post_init__()
        for name in ("objective_kwargs", "targets"):
            value = getattr(self, name)
            self._check(name, value is None or isinstance(value, Mapping), "a mapping (JSON on the command line)")
        objective = make_objective(self.objective, self.objective_kwargs)
        if not objective.visits:
            for name, off in (("query_steps", None), ("anchor", None)):
                if getattr(self, name) != off:
                    raise ValueError(
                        f"`{name}` is of objectives that compare student and target along the rollout, but `objective` "
                        f"is {self.objective!r}. Leave it out."
                    )
        if objective.needs_fake and self.fp16:
            raise ValueError(
                f"`objective={self.objective!r}` trains a fake score beside the student, whose gradients are not scaled for "
                "`fp16`. Set `bf16=True`, or neither."
            )
        if self.query_steps is None and self.query_distribution != "uniform":
            raise ValueError(
                f"`query_distribution={self.query_distribution!r}` says where the queried steps are, but all are. Set "
                "`query_steps`."
            )
        mixtures = [mixture for mixture in (self.targets or {}).values() if isinstance(mixture, Mapping)]
        averaged = [self.extrapolation_reference, self.anchor, *(name for mixture in mixtures for name in mixture)]
        if "average" in averaged and self.ema_decay is None:
            raise ValueError("'average' is the moving average of the student, but there is none. Set `ema_decay`.")
        self._check("teacher_extrapolation", math.isfinite(self.teacher_extrapolation), "a finite number")
