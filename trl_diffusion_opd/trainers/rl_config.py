# SPDX-License-Identifier: Apache-2.0
"""The settings of the trainers that learn from rewards."""

from dataclasses import dataclass, field

from ..losses.advantages import check_scale
from ..utils.settings import AT_LEAST_1, POSITIVE, Rule, is_number
from .base_config import DiffusionConfig


@dataclass
class RLConfig(DiffusionConfig):
    r"""
    Settings that [`FlowGRPOConfig`] and [`DiffusionNFTConfig`] share, beside those of [`DiffusionConfig`].

    A rollout draws the images of `steps_per_rollout` optimizer steps. In all processes together these are
    `per_device_train_batch_size * num_processes * gradient_accumulation_steps * steps_per_rollout` of each task, of
    which `num_generations` share a prompt.

    Parameters:
        > Parameters that control the images

        num_generations (`int`, *optional*, defaults to `24`):
            Number of images of each prompt, which are compared with each other.
        steps_per_rollout (`int`, *optional*, defaults to `1`):
            Number of optimizer steps that the images of a rollout are divided among.

        > Parameters that control the rewards

        reward_weights (`list[float]`, *optional*):
            Weight of each reward function of a task; 1 by default. The reward is the weighted sum.
        scale_rewards (`str`, *optional*, defaults to `"task"`):
            Whose standard deviation advantages are divided by: `"task"`, that of all images of the task in the
            rollout; `"group"`, that of the images of the prompt; `"none"`, no division.
        advantage_clip (`float`, *optional*, defaults to `5.0`):
            Largest absolute value of an advantage.
        reward_workers (`int`, *optional*, defaults to `1`):
            Number of threads that score images while the next ones are drawn.

    > [!NOTE]
    > These parameters have default values different from [`DiffusionConfig`]:
    > - `per_device_train_batch_size`: Defaults to `24` instead of `8`: the images of a prompt.
    """

    _rules = DiffusionConfig._rules | {
        "num_generations": Rule(lambda value: value >= 2, "at least 2, or there is nothing to compare"),
        "steps_per_rollout": AT_LEAST_1,
        "advantage_clip": POSITIVE,
        "reward_workers": AT_LEAST_1,
    }

    per_device_train_batch_size: int = field(
        default=24, metadata={"help": "Number of images of each task that a process draws for a (micro-)step."}
    )
    num_generations: int = field(
        default=24, metadata={"help": "Number of images of each prompt, which are compared with each other."}
    )
    steps_per_rollout: int = field(
        default=1, metadata={"help": "Number of optimizer steps that the images of a rollout are divided among."}
    )
    reward_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weight of each reward function of a task; 1 by default. The reward is the weighted sum."},
    )
    scale_rewards: str = field(
        default="task",
        metadata={
            "help": "Whose standard deviation advantages are divided by: task (all images of the task in the "
            "rollout), group (the images of the prompt) or none."
        },
    )
    advantage_clip: float = field(default=5.0, metadata={"help": "Largest absolute value of an advantage."})
    reward_workers: int = field(
        default=1, metadata={"help": "Number of threads that score images while the next ones are drawn."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_scale(self.scale_rewards)
        if self.reward_weights is not None:
            valid = isinstance(self.reward_weights, list | tuple) and all(map(is_number, self.reward_weights))
            self._check("reward_weights", valid, "a list of finite numbers")
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
        images = (
            self.per_device_train_batch_size
            * self.world_size
            * self.gradient_accumulation_steps
            * self.steps_per_rollout
        )
        if images % self.num_generations:
            raise ValueError(
                f"A rollout draws {images} images of each task (per_device_train_batch_size "
                f"{self.per_device_train_batch_size} x {self.world_size} processes x gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps} x steps_per_rollout {self.steps_per_rollout}), which is no multiple "
                f"of `num_generations` = {self.num_generations}. Change one of them."
            )
