# SPDX-License-Identifier: Apache-2.0
"""The settings that all trainers of a LoRA diffusion student share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available
from trl.trainer.base_config import _BaseConfig

from ..rewards.functions import REWARD_TIMEOUT
from ..sampling.solvers import SOLVERS, check_solver
from ..utils.distributed import check_processes
from ..utils.serialization import public_settings
from ..utils.settings import AT_LEAST_1, BELOW_1, NOT_NEGATIVE, POSITIVE, Rule, check_kinds, check_rules
from .supported import check_supported, check_task_weights
from .trajectory import check_allow_changes


@dataclass
class DiffusionConfig(_BaseConfig):
    r"""
    Settings that the trainers of this package share.

    This class includes only the parameters that are specific to diffusion models. For a full list of training
    arguments, please refer to the [`~transformers.TrainingArguments`] documentation. Note that default values in this
    class may differ from those in [`~transformers.TrainingArguments`].

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments for `from_pretrained`, used when the `model` argument of the trainer is a string. The
            weights are loaded in the training precision unless `dtype` is given here.

        > Parameters that control the rollout

        height (`int`, *optional*):
            Height of the images in pixels. Defaults to the pipeline's own.
        width (`int`, *optional*):
            Width of the images in pixels. Defaults to the pipeline's own.
        num_inference_steps (`int`, *optional*):
            Number of denoising steps of the student's rollout. Defaults to 10, as published, or for models that take
            fewer steps, as Z-Image-Turbo (8) and the distilled FLUX.2-klein (4), to theirs.
        guidance_scale (`float`, *optional*):
            Classifier-free guidance of the student, and of teachers that do not set their own, where 1 is none: `w` in
            `v_neg + w (v_pos - v_neg)`. The guided velocity is the one that is trained. The unconditional branch runs
            only above 1. Defaults to what the base is made for: 4.5 for Stable Diffusion 3.5, 1 for distilled models.
        solver (`str`, *optional*, defaults to `"flow"`):
            Sampler of the rollout: `"flow"`, `"dance"`, `"cps"`, `"ddim"`, `"dpm1"` or `"dpm2"`.
        noise_level (`float`, *optional*, defaults to `0.0`):
            Scale `a` of the noise injected at each step. 0 samples the ODE and trains with mean matching (Eq. 12);
            above 0 the SDE is sampled and the closed-form KL divergence is trained (Eq. 11).
        skip_last_steps (`int`, *optional*):
            Number of steps at the end of the rollout that are not trained. Defaults to 1 where the last step of the
            schedule moves next to nothing, as with Stable Diffusion 3.5 and Qwen-Image, and else to 0.
        max_sequence_length (`int`, *optional*):
            Length of a prompt in tokens. Defaults to what the base is made for: 128 for Stable Diffusion 3.5, 512 for
            most others, some of which attend to the padding.

        > Parameters that control the tasks

        task_weights (`dict[str, int]` or `str`, *optional*):
            Number of batches that a task gets in each round; 1 for tasks that are not named. The loss is the mean over
            all batches of the round.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column of the datasets that holds the prompt.

        > Parameters that control the text encoders

        prompt_cache_size (`int`, *optional*, defaults to `512`):
            Number of prompts whose embeddings are kept in CPU memory. They are encoded ahead of the rounds in chunks
            of this size (up to some MB a prompt).
        prompt_batch_size (`int`, *optional*, defaults to `16`):
            Number of prompts encoded at once.
        offload_text_encoders (`bool`, *optional*, defaults to `True`):
            Whether to keep the text encoders off the GPU while they are not encoding.

        > Parameters that control the moving average

        ema_decay (`float`, *optional*):
            Keep an exponential moving average of the student's LoRA with this decay (the published recipe: 0.9),
            warmed up as `(1 + n) / (10 + n)` where `n` counts optimizer steps. The average is what is evaluated and
            saved; the raw weights are evaluated and saved beside it. Up to its first update it is equal to them.
        ema_update_every (`int`, *optional*, defaults to `8`):
            Number of optimizer steps between two updates of the average.
        ema_update_repeats (`int`, *optional*, defaults to `1`):
            Number of times that each update is applied, with the decay to that power. The published code updates after
            every micro-batch, which is 3 times for DiffusionOPD and 4 times for GRPO-Guard; the recipes set this.

        > Parameters that control evaluation and image grids

        eval_num_inference_steps (`int`, *optional*):
            Number of denoising steps at evaluation. Defaults to `num_inference_steps`.
        eval_guidance_scale (`float`, *optional*):
            Guidance of the student at evaluation. Defaults to `guidance_scale`.
        eval_noise_level (`float`, *optional*, defaults to `0.0`):
            Noise level at evaluation. 0 samples the ODE.
        num_eval_images (`int`, *optional*):
            Number of images of each task at evaluation: prompts are repeated with other noise, or left out at the end.
            Defaults to one image per prompt.
        reward_timeout (`float`, *optional*, defaults to `900.0`):
            Seconds that a reward function may take for a batch of images, in training and at evaluation, before the
            run ends with an error that names it; `None` waits for ever. It is less than the `ddp_timeout` of 1800 after
            which other processes stop waiting. After 60 seconds a line tells what is waited for.
        num_grid_prompts (`int`, *optional*, defaults to `2`):
            Number of prompts of each task in the image grid drawn at every evaluation (base, student, each teacher). 0
            draws none.
        save_curves (`bool`, *optional*, defaults to `True`):
            Whether to draw the loss and divergence curves to `curves.png` in the output folder at the end of training.

        > Parameters that control resuming

        allow_changes (`list[str]`, *optional*):
            Settings that define the course of a run, like `"seed"` or `"solver"`, which may be others than those of the
            checkpoint that the run is resumed from; also `"prompts"` and `"images_per_round"` (batch size x accumulation
            x processes). All others must be the same. What may change anyway, like `max_steps` and `learning_rate`, need
            not be named.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `activation_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` on a device that supports it if `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `3e-4` instead of `5e-5`.
    > - `lr_scheduler_type`: Defaults to `"constant"` instead of `"linear"`.
    > - `weight_decay`: Defaults to `1e-4` instead of `0`.
    > - `remove_unused_columns`: Defaults to `False` instead of `True`.
    > - `ddp_find_unused_parameters`: Defaults to `False` instead of `None`.
    > - `ddp_broadcast_buffers`: Defaults to `False` instead of `None`.
    """

    _VALID_DICT_FIELDS = _BaseConfig._VALID_DICT_FIELDS + ["model_init_kwargs", "task_weights"]
    _rules = {
        "per_device_train_batch_size": AT_LEAST_1,
        "per_device_eval_batch_size": AT_LEAST_1,
        "gradient_accumulation_steps": AT_LEAST_1,
        "max_steps": Rule(
            lambda value: value == -1 or value >= 1, "at least 1, or -1 to train `num_train_epochs` epochs"
        ),
        "num_train_epochs": POSITIVE,
        "learning_rate": NOT_NEGATIVE,
        "warmup_steps": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
        "adam_beta1": BELOW_1,
        "adam_beta2": BELOW_1,
        "adam_epsilon": NOT_NEGATIVE,
        "max_grad_norm": NOT_NEGATIVE,
        "logging_steps": POSITIVE,
        "eval_steps": POSITIVE,
        "save_steps": POSITIVE,
        "save_total_limit": AT_LEAST_1,
        "seed": Rule(lambda value: 0 <= value < 2**32, "from 0 to 4294967295"),
        "num_inference_steps": AT_LEAST_1,
        "guidance_scale": NOT_NEGATIVE,
        "max_sequence_length": AT_LEAST_1,
        "prompt_cache_size": AT_LEAST_1,
        "prompt_batch_size": AT_LEAST_1,
        "ema_decay": Rule(lambda value: 0 < value < 1, "between 0 and 1 (or unset)"),
        "ema_update_every": AT_LEAST_1,
        "ema_update_repeats": AT_LEAST_1,
        "reward_timeout": POSITIVE,
        "eval_guidance_scale": NOT_NEGATIVE,
        "num_eval_images": AT_LEAST_1,
        "num_grid_prompts": NOT_NEGATIVE,
        "height": Rule(lambda value: value > 0, "positive (or unset)"),
        "width": Rule(lambda value: value > 0, "positive (or unset)"),
    }

    uses_guidance = True  # unless it is set

    # Parameters whose default values are overridden from TrainingArguments
    learning_rate: float = field(default=3e-4, metadata={"help": "The initial learning rate for AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The learning rate schedule."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of AdamW."})
    # `gradient_checkpointing` is a deprecated alias since transformers 5.23: TRL's override of its default would warn
    # at every construction.
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Deprecated alias of `activation_checkpointing`."}
    )
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute the transformer's activations in the backward pass to save memory. Defaults to `True`."
        },
    )
    remove_unused_columns: bool | None = field(
        default=False,
        metadata={"help": "Not used: columns beside the prompt are passed to the reward functions."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Whether DistributedDataParallel looks for parameters without a gradient."},
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False,
        metadata={
            "help": "Whether DistributedDataParallel sends the buffers of the model around in every round: constants, "
            "of 0.45 GB in bfloat16 for Stable Diffusion 3.5 Medium."
        },
    )

    # Parameters that control the model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `from_pretrained`, used when the `model` argument of the trainer is a "
            "string. The weights are loaded in the training precision unless `dtype` is given here."
        },
    )

    # Parameters that control the rollout
    height: int | None = field(
        default=None, metadata={"help": "Height of the images in pixels. Defaults to the pipeline's own."}
    )
    width: int | None = field(
        default=None, metadata={"help": "Width of the images in pixels. Defaults to the pipeline's own."}
    )
    num_inference_steps: int | None = field(
        default=None,
        metadata={
            "help": "Number of denoising steps of the student's rollout. Defaults to 10, or the few that the base takes."
        },
    )
    guidance_scale: float | None = field(
        default=None,
        metadata={
            "help": "Classifier-free guidance of the student, and of teachers that do not set their own, where 1 is "
            "none. The guided velocity is the one that is trained. The unconditional branch runs only above 1. Defaults "
            "to what the base is made for."
        },
    )
    solver: str = field(default="flow", metadata={"help": f"Sampler of the rollout, one of {', '.join(SOLVERS)}."})
    noise_level: float = field(
        default=0.0,
        metadata={
            "help": "Scale of the noise injected at each step. 0 samples the ODE and trains with mean matching; above "
            "0 the SDE is sampled and the closed-form KL divergence is trained."
        },
    )
    skip_last_steps: int | None = field(
        default=None,
        metadata={
            "help": "Number of steps at the end of the rollout that are not trained. Defaults to what suits the base."
        },
    )
    max_sequence_length: int | None = field(
        default=None,
        metadata={"help": "Length of a prompt in tokens. Defaults to what the base is made for."},
    )

    # Parameters that control the tasks
    task_weights: dict[str, int] | str | None = field(
        default=None,
        metadata={"help": "Number of batches that a task gets in each round; 1 for tasks that are not named."},
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the datasets that holds the prompt."})

    # Parameters that control the text encoders
    prompt_cache_size: int = field(
        default=512,
        metadata={"help": "Number of prompts encoded ahead of the rounds and kept in CPU memory."},
    )
    prompt_batch_size: int = field(default=16, metadata={"help": "Number of prompts encoded at once."})
    offload_text_encoders: bool = field(
        default=True,
        metadata={"help": "Whether to keep the text encoders off the GPU while they are not encoding."},
    )

    # Parameters that control the moving average
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of an exponential moving average of the student's LoRA (the published recipe: 0.9). The "
            "average is what is evaluated and saved; the raw weights are evaluated and saved beside it."
        },
    )
    ema_update_every: int = field(
        default=8, metadata={"help": "Number of optimizer steps between two updates of the average."}
    )
    ema_update_repeats: int = field(
        default=1,
        metadata={
            "help": "Number of times that each update is applied, with the decay to that power (the published code: 3 "
            "for DiffusionOPD, 4 for GRPO-Guard)."
        },
    )

    # Parameters that control evaluation and image grids
    eval_num_inference_steps: int | None = field(
        default=None,
        metadata={"help": "Number of denoising steps at evaluation. Defaults to `num_inference_steps`."},
    )
    eval_guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance of the student at evaluation. Defaults to `guidance_scale`."}
    )
    eval_noise_level: float = field(default=0.0, metadata={"help": "Noise level at evaluation. 0 samples the ODE."})
    num_eval_images: int | None = field(
        default=None,
        metadata={
            "help": "Number of images of each task at evaluation: prompts are repeated with other noise, or left out "
            "at the end. Defaults to one image per prompt."
        },
    )
    reward_timeout: float | None = field(
        default=REWARD_TIMEOUT,
        metadata={
            "help": "Seconds that a reward function may take for a batch of images before the run ends with an error. "
            "None waits for ever."
        },
    )
    num_grid_prompts: int = field(
        default=2,
        metadata={
            "help": "Number of prompts of each task in the image grid drawn at every evaluation (base, student, each "
            "teacher). 0 draws none."
        },
    )
    save_curves: bool = field(
        default=True,
        metadata={"help": "Whether to draw the loss and divergence curves to `curves.png` at the end of training."},
    )

    # Parameters that control resuming
    allow_changes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Settings that define the course of a run (seed, solver, prompts, images_per_round, ...) which may "
            "be others than those of the checkpoint that the run is resumed from."
        },
    )

    def __post_init__(self):
        check_kinds(self)
        check_rules(self, self._rules)
        check_supported(self)
        if self.bf16 is None:  # the TRL default, True, is an error on a machine without bfloat16
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = True
        super().__post_init__()

        check_allow_changes(self)
        check_processes(self.world_size)
        check_solver(self.solver, self.noise_level)
        check_solver(self.solver, self.eval_noise_level)
        skipped, steps = self.skip_last_steps, self.num_inference_steps
        self._check("skip_last_steps", skipped is None or skipped >= 0, "at least 0 (or unset)")
        self._check(
            "skip_last_steps",
            skipped is None or steps is None or skipped < steps,
            f"from 0 to num_inference_steps - 1 = {(steps or 0) - 1}, so that a step is left to train",
        )
        self._check(
            "eval_num_inference_steps",
            self.eval_num_inference_steps is None or self.eval_num_inference_steps > (skipped or 0),
            f"more than skip_last_steps = {skipped or 0} (or unset)",
        )
        for name in ("task_weights", "model_init_kwargs"):
            value = getattr(self, name)
            self._check(name, value is None or isinstance(value, Mapping), "a mapping (JSON on the command line)")
        check_task_weights(self.task_weights or {})

    def to_dict(self) -> dict[str, Any]:
        """
        The settings that may be shown to anybody, since loggers send them and they are saved and uploaded: those of
        [`public_settings`], and for any other its name alone, as `"<NAME>"`.
        """
        settings = super().to_dict()
        return {name: f"<{name.upper()}>" for name in settings} | public_settings(settings)

    def _check(self, name: str, valid: bool, rule: str) -> None:
        if not valid:
            raise ValueError(f"`{name}` must be {rule}, but is {getattr(self, name)!r}.")
