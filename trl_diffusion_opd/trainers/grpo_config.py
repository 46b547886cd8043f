# SPDX-License-Identifier: Apache-2.0
"""Settings of the [`FlowGRPOTrainer`]."""

from dataclasses import dataclass, field

from ..losses.grpo import LOSS_TYPES, check_guard
from ..sampling.solvers import SOLVERS
from ..utils.settings import NOT_NEGATIVE, Rule
from .rl_config import RLConfig


@dataclass
class FlowGRPOConfig(RLConfig):
    r"""
    Configuration class for the [`FlowGRPOTrainer`].

    Parameters:
        loss_type (`str`, *optional*, defaults to `"grpo_guard"`):
            `"grpo"`, Flow-GRPO as published, or `"grpo_guard"`, with normalized ratios and gradients of one scale over
            the denoising steps.
        epsilon (`float`, *optional*):
            Clip range of the ratio. Defaults to `2e-6` for `"grpo_guard"`, `1e-4` for `"grpo"`.
        beta (`float`, *optional*):
            Weight of the divergence from the base. Defaults to `0.0` for `"grpo_guard"`, `0.04` for `"grpo"`.

    > [!NOTE]
    > These parameters have default values different from [`DiffusionConfig`]:
    > - `learning_rate`: Defaults to `1e-4` instead of `3e-4`, which it is for `loss_type="grpo"`.
    > - `scale_rewards`: Defaults to `"group"` instead of `"task"`, which it is for `loss_type="grpo"`.
    > - `noise_level`: Defaults to `0.7` instead of `0.0`.
    > - `steps_per_rollout`: Defaults to `2` instead of `1`.
    > - `ema_decay`: Defaults to `0.9` instead of `None`.
    """

    _rules = RLConfig._rules | {
        "epsilon": Rule(lambda value: 0 < value < 1, "between 0 and 1"),
        "beta": NOT_NEGATIVE,
    }

    learning_rate: float | None = field(
        default=None,
        metadata={"help": "The initial learning rate for AdamW. Defaults to 1e-4 for grpo_guard, 3e-4 for grpo."},
    )
    scale_rewards: str | None = field(
        default=None,
        metadata={
            "help": "Whose standard deviation advantages are divided by: task (all images of the task in the "
            "rollout), group (the images of the prompt) or none. Defaults to group for grpo_guard, task for grpo."
        },
    )
    noise_level: float = field(
        default=0.7, metadata={"help": "Scale of the noise injected at each step, which is what explores."}
    )
    steps_per_rollout: int = field(
        default=2, metadata={"help": "Number of optimizer steps that the images of a rollout are divided among."}
    )
    ema_decay: float | None = field(
        default=0.9, metadata={"help": "Decay of an exponential moving average of the student's LoRA."}
    )

    loss_type: str = field(
        default="grpo_guard",
        metadata={"help": "grpo (Flow-GRPO) or grpo_guard (normalized ratios, gradients of one scale)."},
    )
    epsilon: float | None = field(
        default=None, metadata={"help": "Clip range of the ratio. Defaults to 2e-6 for grpo_guard, 1e-4 for grpo."}
    )
    beta: float | None = field(
        default=None,
        metadata={"help": "Weight of the divergence from the base. Defaults to 0 for grpo_guard, 0.04 for grpo."},
    )

    def __post_init__(self):
        guarded = self.loss_type == "grpo_guard"
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"`loss_type` must be one of {', '.join(LOSS_TYPES)}, but is {self.loss_type!r}.")
        if self.learning_rate is None:
            self.learning_rate = 1e-4 if guarded else 3e-4
        if self.scale_rewards is None:
            self.scale_rewards = "group" if guarded else "task"
        super().__post_init__()
        if self.torch_compile:
            raise ValueError(
                "`torch_compile` is not supported: images are drawn by the model as it is, and the rounding of a "
                "compiled one alone would move the ratio beyond its clip range. Leave it off."
            )
        if self.noise_level == 0:
            raise ValueError(
                "`noise_level` is 0: a deterministic rollout has no probabilities. Set it above 0 (published: 0.7)."
            )
        if guarded:
            check_guard(self.solver)
        if SOLVERS[self.solver].last_step_is_noiseless and self.skip_last_steps == 0:
            raise ValueError(
                f"`skip_last_steps` is 0, but the last step of `solver={self.solver!r}` has no noise and hence no "
                "probability. Set it to 1 at least."
            )
        if self.epsilon is None:
            self.epsilon = 2e-6 if guarded else 1e-4
        if self.beta is None:
            self.beta = 0.0 if guarded else 0.04
