# SPDX-License-Identifier: Apache-2.0
"""On-policy distillation of several teachers into one student (Algorithm 1 of the DiffusionOPD paper)."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback

from ..data.rounds import TaskBatch
from ..losses.opd import step_divergence
from ..models.sampler import Policy
from ..models.transformer_places import base_key
from ..models.velocity import Conditioning
from ..publishing.record import TeacherRecord
from ..rewards.functions import RewardFunc
from ..sampling.denoising import Trajectory
from ..teachers.backbones import Backbone, on_students_base
from ..teachers.config import check_tasks, normalize_teachers
from ..teachers.loading import fetch_teachers, load_teachers, read_fingerprints
from ..utils.hardware import format_bytes, module_bytes
from ..utils.markdown import escape
from ..utils.turns import Turns
from .base_trainer import DiffusionTrainer
from .method_plan import MethodPlan, format_origin
from .opd_config import DiffusionOPDConfig


class DiffusionOPDTrainer(DiffusionTrainer):
    """
    Trainer for on-policy distillation of diffusion teachers, as introduced in [DiffusionOPD: A Unified Perspective of
    On-Policy Distillation in Diffusion Models](https://huggingface.co/papers/2605.15055).

    The student samples its own denoising trajectory; at every state it visits, the frozen teacher of the sample's task
    says where it would step, and the student is pulled there. One optimizer step is one round over all tasks.

    Example:

    ```python
    from trl_diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer, TeacherConfig

    trainer = DiffusionOPDTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        teachers={
            "ocr": "quanhaol/DiffusionOPD/OCRTeacher/lora",
            "geneval": TeacherConfig("quanhaol/DiffusionOPD", subfolder="GenEvalTeacher/lora", guidance_scale=1.0),
        },
        args=DiffusionOPDConfig(output_dir="sd35m-opd", max_steps=300),
        train_dataset={"ocr": "ocr_prompts.txt", "geneval": "geneval_prompts.jsonl"},
    )
    trainer.train()
    ```

    Args:
        model (`str` or `Path` or [`~diffusers.DiffusionPipeline`]):
            Base of student and teachers: `"owner/repo[@revision]"` on the Hub, a local folder, or a pipeline in memory,
            which is used as it is (its transformer gets the adapters).
        teachers (`dict` or `list[TeacherConfig]`):
            Teacher of each task: `"owner/repo"`, `"owner/repo/sub/folder"` (either with `@revision`), a local path, a
            [`TeacherConfig`], or a full model with the same latent space, named or loaded.
        args ([`DiffusionOPDConfig`], *optional*):
            Configuration of the trainer.
        train_dataset (`dict` or [`~datasets.Dataset`]):
            Prompts of each task (a dataset, a stream, a list, a `.txt` or `.jsonl` file, `"owner/name[@revision]"` on
            the Hub, or a mapping with that as `path` and options), or one dataset with a `"task"` column.
        eval_dataset (`dict` or [`~datasets.Dataset`], *optional*):
            Held-out prompts in the same form, for some or all tasks.
        reward_funcs (`dict[str, Callable or list[Callable]]`, *optional*):
            Per task functions `f(images, prompts, **columns) -> list[float]` that score images at evaluation; `images`
            is a float tensor `[B, 3, H, W]` in `[0, 1]`. Training needs none.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Added to the default callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            How to make the optimizer and the learning rate scheduler: functions of the student's parameters and of the
            optimizer, such as `(lambda parameters: torch.optim.SGD(parameters, lr=0.1), None)`. (The parameters exist
            only once the trainer has added the LoRA.) By default AdamW and `args.lr_scheduler_type`.
        peft_config ([`~peft.LoraConfig`] or `dict`, *optional*):
            LoRA of the student, or the fields in which it differs from the default: rank 32, alpha 64, gaussian init, on
            the attention projections.
        adapter (`str` or `Path`, *optional*):
            LoRA to start from, from the Hub or from disk, with the shape of `peft_config` if that is given.

    Raises:
        `ValueError`: teachers and prompts whose tasks do not match, a teacher that does not fit the base, and settings
            out of their range; everything that can be is checked before the base is loaded.
        `SourceError`: a model or teacher that cannot be found or fetched.
    """

    _tag_names = ["trl", "diffusion-opd", "on-policy-distillation"]
    _name = "DiffusionOPD"
    _paper = {
        "title": "DiffusionOPD: A Unified Perspective of On-Policy Distillation in Diffusion Models",
        "id": "2605.15055",
        # docstyle-ignore
        "citation": """\
@article{li2026diffusionopd,
    title        = {{DiffusionOPD: A Unified Perspective of On-Policy Distillation in Diffusion Models}},
    author       = {Quanhao Li and Junqiu Yu and Kaixun Jiang and Yujie Wei and Zhen Xing and Pandeng Li and Ruihang Chu and Shiwei Zhang and Yu Liu and Zuxuan Wu},
    year         = 2026,
    eprint       = {arXiv:2605.15055}
}""",
    }

    def __init__(
        self,
        model: str | Path | DiffusionPipeline,
        teachers: Mapping[str, Any] | Iterable[Any],
        args: DiffusionOPDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        reward_funcs: dict[str, RewardFunc | list[RewardFunc]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Callable | None, Callable | None] = (None, None),
        peft_config: LoraConfig | dict[str, Any] | None = None,
        adapter: str | Path | None = None,
    ):
        if train_dataset is None:
            raise ValueError("`train_dataset` is required: the prompts of each task.")
        self._teacher_configs = normalize_teachers(teachers)
        args = args if args is not None else DiffusionOPDConfig(output_dir="diffusion-opd")
        self._base_given = model, args.model_init_kwargs
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            tasks=list(self._teacher_configs),
            reward_funcs=reward_funcs,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            adapter=adapter,
        )

    def check_tasks(self, tasks: list[str]) -> None:
        check_tasks(self._teacher_configs, tasks)

    def fetch_models(self) -> None:
        for config in self._teacher_configs.values():
            if config.guidance_scale is not None:
                self.family.check_guidance(self.configs, config.guidance_scale)
        self._teacher_files = fetch_teachers(self._teacher_configs, self.family)
        if any(found.place is not None for found in self._teacher_files.values()):
            model, kwargs = self._base_given
            key, config = base_key(model, self.base_origin, kwargs), self.configs("transformer")
            self._teacher_files = on_students_base(self._teacher_files, key, config, self.family)

    def add_models(self, args: DiffusionOPDConfig) -> None:
        self.loaded_teachers = load_teachers(
            self._teacher_configs,
            self.transformer,
            guidance_scale=args.guidance_scale,
            family=self.family,
            vae=self.pipeline.vae,
            files=self._teacher_files,
            dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32,
            show_progress=args.process_index == 0 and not args.disable_tqdm,
        )
        self.turns = Turns(args.device)
        others = dict.fromkeys(teacher.model for teacher in self.loaded_teachers.values())
        self.backbones = {model: Backbone(model, self.family, self.turns) for model in others if model is not None}
        for backbone in self.backbones.values():
            if args.offload_teachers and args.device.type != "cpu":
                self.turns.add(backbone)
            else:
                backbone.to(args.device)
        self.teachers = {
            task: Policy(
                f"teacher {task}",
                teacher.guidance_scale,
                teacher.adapters,
                self.backbones.get(teacher.model),
            )
            for task, teacher in self.loaded_teachers.items()
        }

    def known_sources(self, args: DiffusionOPDConfig) -> dict[str, Any]:
        teachers = read_fingerprints(self._teacher_configs, self._teacher_files, args.guidance_scale, self.family)
        return {**super().known_sources(args), "teachers": teachers}

    @property
    def provenance(self) -> dict[str, Any]:
        teachers = {
            task: {"sha256": teacher.fingerprint, "guidance_scale": teacher.guidance_scale}
            for task, teacher in self.loaded_teachers.items()
        }
        return {**super().provenance, "teachers": teachers}

    def plan(self) -> MethodPlan:
        return MethodPlan(
            objective="mean matching, Eq. 12" if self.args.noise_level == 0 else "closed-form KL, Eq. 11",
            tasks={
                task: f"teacher: {'full model' if teacher.adapter_name is None else 'LoRA'} "
                + format_origin(teacher.origin)
                + (f" on {format_origin(teacher.base)}" if teacher.base is not None else "")
                + f", guidance {teacher.guidance_scale:g}"
                for task, teacher in self.loaded_teachers.items()
            },
            **self._plan_of_backbones(),
        )

    def _plan_of_backbones(self) -> dict[str, Any]:
        sizes = sorted(map(module_bytes, self.backbones.values()), reverse=True)
        if not self.turns.modules:
            return {"models": sum(sizes)}
        waiting = f"{format_bytes(sum(sizes))} of teachers in host memory, on the device when it is their turn"
        return {"models": sum(sizes[:2]), "lines": {"offload": waiting}}

    def describe_run(self) -> dict[str, Any]:
        tasks = list(self.loaded_teachers)
        return {
            "summary": (
                f"One LoRA for {'the task' if len(tasks) == 1 else f'{len(tasks)} tasks'} ({', '.join(map(escape, tasks))}), learned "
                f"from {'a teacher' if len(tasks) == 1 else 'a teacher for each'}. It was distilled on-policy: the "
                "student drew images of its own, and at every denoising step the teacher of the image's task "
                "showed where it would have gone instead."
            ),
            "teachers": [
                TeacherRecord(
                    task,
                    teacher.origin,
                    teacher.guidance_scale,
                    teacher.fingerprint,
                    is_lora=teacher.adapter_name is not None,
                    base=teacher.base,
                )
                for task, teacher in self.loaded_teachers.items()
            ],
        }

    # The method

    def train_round(self, model: nn.Module, micro_round: int) -> tuple[torch.Tensor, int]:
        """One (micro-)round of Algorithm 1: every task's batch is rolled out and distilled, in a single pass."""
        self.prepare_prompts(self.state.global_step)
        batches = self.rounds.batches(self.state.global_step, micro_round)
        num_steps = len(self.schedule) - self.args.skip_last_steps
        loss_weight = 1 / (len(batches) * num_steps * self.current_gradient_accumulation_steps)
        backbones = [self.teachers[batch.task].model for batch in batches]
        divergences = []
        for index, batch in enumerate(batches):
            self.turns.begin(backbones[index], then=backbones[(index + 1) % len(batches)])
            is_last_batch = index == len(batches) - 1
            divergences.append(self.distill(model, batch, num_steps, loss_weight, is_last_batch))
        divergences = torch.stack(divergences)
        divergences = self.accelerator.reduce(divergences, reduction="mean")
        self.check_finite(divergences, batches)
        self.log_divergences(divergences, batches)
        loss = divergences.mean() / self.current_gradient_accumulation_steps
        return loss, sum(len(batch.prompts) for batch in batches)

    def distill(
        self, model: nn.Module, batch: TaskBatch, num_steps: int, loss_weight: float, is_last_batch: bool
    ) -> torch.Tensor:
        """
        Rolls the student out on a batch and accumulates the gradient of each step as it is taken.

        No parameter changes within a round, so the velocity that the student is rolled out with is the one to
        differentiate: one forward of each model per step, instead of a rollout and two replays of it.

        Args:
            model (`torch.nn.Module`):
                The student, in its data-parallel wrapper.
            batch ([`TaskBatch`]):
                `B` samples of one task.
            num_steps (`int`):
                Number of steps to train.
            loss_weight (`float`):
                Weight of each step's loss.
            is_last_batch (`bool`):
                Whether this is the round's last batch; gradients are reduced over the processes in its last backward.

        Returns:
            `torch.Tensor` of shape `[num_steps]`: the divergence of each step, averaged over the batch.
        """
        args, teacher = self.args, self.teachers[batch.task]
        conditioning = self.prompts.conditioning(batch.prompts)
        noise, generators = self.sampler.noise(batch.seeds)
        trajectory = Trajectory(
            noise, self.schedule, solver=args.solver, noise_level=args.noise_level, generator=generators
        )
        divergences = []
        for index in range(num_steps):
            sample, timestep = trajectory.sample, trajectory.timestep
            # The teacher comes first: between the student's forward and backward no adapter may be switched.
            target = self.sampler.velocity(teacher, sample, timestep, conditioning)
            with self.reduce_only_if(model, is_last_batch and index == num_steps - 1):
                velocity = model(sample, timestep, *conditioning.batch(args.guidance_scale), args.guidance_scale)
                step = trajectory.step(velocity)
                divergence = step_divergence(velocity, target, step.transition).mean()
                self.accelerator.backward(loss_weight * divergence)
            divergences.append(divergence.detach())
        return torch.stack(divergences)

    def rollout_metrics(
        self, policy: Policy, batch: TaskBatch, conditioning: Conditioning
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Adds `kl`, the mean divergence from the task's teacher over the steps that are trained; and with `eval_fixed_kl` the
        one at the states of the teacher's own rollout, `fixed_kl`.
        """
        teacher = self.teachers[batch.task]
        latents, divergence = self._divergence(policy, teacher, batch, conditioning)
        metrics = {"kl": divergence}
        if self.args.eval_fixed_kl:
            _, metrics["fixed_kl"] = self._divergence(teacher, policy, batch, conditioning)
        return latents, metrics

    def _divergence(
        self, policy: Policy, other: Policy, batch: TaskBatch, conditioning: Conditioning
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the rollout of `policy` ends, and its mean divergence `[B]` from `other` over the trained steps."""
        num_steps = len(self.eval_schedule) - self.args.skip_last_steps
        divergences = []
        for step in self.evaluator.rollout(policy, conditioning, batch.seeds):
            if step.index < num_steps:
                timestep = self.eval_schedule.timesteps[step.index].to(step.sample.device)
                velocity = self.sampler.velocity(other, step.sample, timestep, conditioning)
                divergences.append(step_divergence(step.velocity, velocity, step.transition))
        return step.next_sample, torch.stack(divergences).mean(0)

    # Checks and logs

    def check_finite(self, divergences: torch.Tensor, batches: list[TaskBatch]) -> None:
        """Raises a `FloatingPointError` that names task and step of the first divergence that is NaN or infinite."""
        broken = (~torch.isfinite(divergences)).nonzero()
        if len(broken):
            batch, step = broken[0].tolist()
            raise FloatingPointError(
                f"The divergence from the teacher of task {batches[batch].task!r} is {divergences[batch, step].item()} "
                f"at denoising step {step} (sigma {self.schedule.sigmas[step].item():.4f}) of round "
                f"{self.state.global_step}. Nothing was updated and the last checkpoint is intact. Lower "
                "`learning_rate`, or train in bf16 or fp32 instead of fp16."
            )

    def log_divergences(self, divergences: torch.Tensor, batches: list[TaskBatch]) -> None:
        """Logs the divergence of each task and of each denoising step."""
        tasks = [batch.task for batch in batches]
        for task in dict.fromkeys(tasks):
            of_task = divergences[[index for index, name in enumerate(tasks) if name == task]]
            self.metrics[f"kl/{task}"].append(of_task.mean().item())
        for index, value in enumerate(divergences.mean(0).tolist()):
            self.metrics[f"kl_step/{index}"].append(value)
