# SPDX-License-Identifier: Apache-2.0
"""The settings of the trainers that learn from rewards."""

import math
from dataclasses import dataclass, field

from .advantages import check_scale
from .base_config import DiffusionConfig
from .forward_process import OLD_POLICY_SCHEDULES
from .policy_gradient import LOSS_TYPES


@dataclass
class RewardConfig(DiffusionConfig):
    r"""
    Settings that [`FlowGRPOConfig`] and [`DiffusionNFTConfig`] share, beside those of [`DiffusionConfig`].

    A rollout draws the pictures of `steps_per_rollout` optimizer steps. In all processes together these are
    `per_device_train_batch_size * num_processes * gradient_accumulation_steps * steps_per_rollout` of each task, of
    which `num_generations` share a prompt.

    Parameters:
        > Parameters that control the pictures

        num_generations (`int`, *optional*, defaults to `24`):
            Number of pictures of each prompt, which are compared with each other.
        steps_per_rollout (`int`, *optional*, defaults to `1`):
            Number of optimizer steps that the pictures of a rollout are divided among.

        > Parameters that control the rewards

        reward_weights (`list[float]`, *optional*):
            Weight of each reward function of a task; 1 by default. The reward is the weighted sum.
        scale_rewards (`str`, *optional*, defaults to `"task"`):
            Whose standard deviation advantages are divided by: `"task"`, that of all pictures of the task in the
            rollout; `"group"`, that of the pictures of the prompt; `"none"`, no division.
        advantage_clip (`float`, *optional*, defaults to `5.0`):
            Largest absolute value of an advantage.
        reward_workers (`int`, *optional*, defaults to `1`):
            Number of threads that score pictures while the next ones are drawn.

    > [!NOTE]
    > These parameters have default values different from [`DiffusionConfig`]:
    > - `per_device_train_batch_size`: Defaults to `24` instead of `8`: the pictures of a prompt.
    """

    per_device_train_batch_size: int = field(
        default=24, metadata={"help": "Number of pictures of each task that a process draws for a (micro-)step."}
    )
    num_generations: int = field(
        default=24, metadata={"help": "Number of pictures of each prompt, which are compared with each other."}
    )
    steps_per_rollout: int = field(
        default=1, metadata={"help": "Number of optimizer steps that the pictures of a rollout are divided among."}
    )
    reward_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weight of each reward function of a task; 1 by default. The reward is the weighted sum."},
    )
    scale_rewards: str = field(
        default="task",
        metadata={
            "help": "Whose standard deviation advantages are divided by: task (all pictures of the task in the "
            "rollout), group (the pictures of the prompt) or none."
        },
    )
    advantage_clip: float = field(default=5.0, metadata={"help": "Largest absolute value of an advantage."})
    reward_workers: int = field(
        default=1, metadata={"help": "Number of threads that score pictures while the next ones are drawn."}
    )

    def __post_init__(self):
        super().__post_init__()
        self._check("num_generations", self.num_generations >= 2, "at least 2, or there is nothing to compare")
        self._check("steps_per_rollout", self.steps_per_rollout >= 1, "at least 1")
        self._check("advantage_clip", self.advantage_clip > 0, "positive")
        self._check("reward_workers", self.reward_workers >= 1, "at least 1")
        check_scale(self.scale_rewards)
        if self.reward_weights is not None:
            finite = all(math.isfinite(weight) for weight in self.reward_weights)
            self._check("reward_weights", finite, "a list of finite numbers")
        if self.steps_per_rollout > 1 and self.save_strategy not in ("no", "steps"):
            raise ValueError(
                f"`save_strategy={self.save_strategy.value!r}` would save in the middle of a rollout, from where no run "
                f"can be resumed, as `steps_per_rollout` is {self.steps_per_rollout}. Choose 'steps' or 'no'."
            )
        if self.steps_per_rollout > 1 and self.save_strategy == "steps" and self.save_steps % self.steps_per_rollout:
            raise ValueError(
                f"`save_steps` must be a multiple of `steps_per_rollout` = {self.steps_per_rollout}, so that a resumed "
                f"run starts with a rollout, but is {self.save_steps:g}."
            )
        pictures = (
            self.per_device_train_batch_size
            * self.world_size
            * self.gradient_accumulation_steps
            * self.steps_per_rollout
        )
        if pictures % self.num_generations:
            raise ValueError(
                f"A rollout draws {pictures} pictures of each task (per_device_train_batch_size "
                f"{self.per_device_train_batch_size} x {self.world_size} processes x gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps} x steps_per_rollout {self.steps_per_rollout}), which is no multiple "
                f"of `num_generations` = {self.num_generations}. Change one of them."
            )


@dataclass
class FlowGRPOConfig(RewardConfig):
    r"""
    Configuration class for the [`FlowGRPOTrainer`].

    Parameters:
        loss_type (`str`, *optional*, defaults to `"grpo_guard"`):
            `"grpo"`, Flow-GRPO as published, or `"grpo_guard"`, with normalised ratios and gradients of one scale over
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

    learning_rate: float | None = field(
        default=None,
        metadata={"help": "The initial learning rate for AdamW. Defaults to 1e-4 for grpo_guard, 3e-4 for grpo."},
    )
    scale_rewards: str | None = field(
        default=None,
        metadata={
            "help": "Whose standard deviation advantages are divided by: task (all pictures of the task in the "
            "rollout), group (the pictures of the prompt) or none. Defaults to group for grpo_guard, task for grpo."
        },
    )
    noise_level: float = field(
        default=0.7, metadata={"help": "Scale of the noise injected at each step, which is what explores."}
    )
    steps_per_rollout: int = field(
        default=2, metadata={"help": "Number of optimizer steps that the pictures of a rollout are divided among."}
    )
    ema_decay: float | None = field(
        default=0.9, metadata={"help": "Decay of an exponential moving average of the student's LoRA."}
    )

    loss_type: str = field(
        default="grpo_guard",
        metadata={"help": "grpo (Flow-GRPO) or grpo_guard (normalised ratios, gradients of one scale)."},
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
                "`torch_compile` is not supported: pictures are drawn by the model as it is, and the rounding of a "
                "compiled one alone would move the ratio beyond its clip range. Leave it off."
            )
        if self.noise_level == 0:
            raise ValueError(
                "`noise_level` is 0: a deterministic rollout has no probabilities. Set it above 0 (published: 0.7)."
            )
        if guarded and self.solver not in ("flow", "dance"):
            raise ValueError(
                f"`loss_type='grpo_guard'` is defined for the solvers flow and dance, but `solver` is {self.solver!r}. "
                "Choose one of them, or `loss_type='grpo'`."
            )
        if self.solver in ("cps", "ddim") and self.skip_last_steps == 0:
            raise ValueError(
                f"`skip_last_steps` is 0, but the last step of `solver={self.solver!r}` has no noise and hence no "
                "probability. Set it to 1 at least."
            )
        if self.epsilon is None:
            self.epsilon = 2e-6 if guarded else 1e-4
        if self.beta is None:
            self.beta = 0.0 if guarded else 0.04
        self._check("epsilon", 0 < self.epsilon < 1, "between 0 and 1")
        self._check("beta", self.beta >= 0, "0 or more")


@dataclass
class DiffusionNFTConfig(RewardConfig):
    r"""
    Configuration class for the [`DiffusionNFTTrainer`].

    Parameters:
        nft_beta (`float`, *optional*, defaults to `1.0`):
            How far the implicit positive and negative policies are from the one that draws the pictures.
        kl_coef (`float`, *optional*, defaults to `1e-4`):
            Weight of the squared distance from the base's velocity.
        old_policy_schedule (`int`, *optional*, defaults to `1`):
            How the policy that draws the pictures follows the trained one, `old <- d old + (1 - d) new` after every
            rollout: 0, `d = 0`; 1, `d = min(0.001 n, 0.5)` after `n` optimizer steps; 2, `d = 0` for 75 steps, then
            `min(0.0075 (n - 75), 0.999)`.

    `noise_level` only concerns how pictures are drawn, and `skip_last_steps` is the number of noise levels of the schedule,
    drawn at random for each picture, that it is not trained on.

    > [!NOTE]
    > These parameters have default values different from [`DiffusionConfig`]:
    > - `solver`: Defaults to `"dpm2"` instead of `"flow"`.
    > - `guidance_scale`: Defaults to `1.0` instead of `4.5`: neither drawing nor training uses guidance.
    > - `ema_decay`: Defaults to `0.9` instead of `None`.
    > - `ema_update_every`: Defaults to `1` instead of `8`.
    """

    solver: str = field(default="dpm2", metadata={"help": "Sampler of the rollout, deterministic."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance of the student."})
    noise_level: float = field(
        default=0.0, metadata={"help": "Scale of the noise injected at each step of the rollout."}
    )
    skip_last_steps: int = field(
        default=1,
        metadata={"help": "Number of noise levels, drawn at random for each picture, that it is not trained on."},
    )
    ema_decay: float | None = field(
        default=0.9, metadata={"help": "Decay of an exponential moving average of the student's LoRA."}
    )
    ema_update_every: int = field(
        default=1, metadata={"help": "Number of optimizer steps between two updates of the average."}
    )

    nft_beta: float = field(
        default=1.0,
        metadata={
            "help": "How far the implicit positive and negative policies are from the one that draws the pictures."
        },
    )
    kl_coef: float = field(default=1e-4, metadata={"help": "Weight of the squared distance from the base's velocity."})
    old_policy_schedule: int = field(
        default=1,
        metadata={
            "help": "How the policy that draws the pictures follows the trained one: 0 at once, 1 and 2 ever slower."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self._check("nft_beta", self.nft_beta > 0, "positive")
        self._check("kl_coef", self.kl_coef >= 0, "0 or more")
        self._check(
            "old_policy_schedule",
            self.old_policy_schedule in OLD_POLICY_SCHEDULES,
            f"one of {', '.join(map(str, OLD_POLICY_SCHEDULES))}",
        )
