# SPDX-License-Identifier: Apache-2.0
"""On-policy distillation of several teachers into one student (Algorithm 1 of the DiffusionOPD paper)."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from transformers import TrainerCallback

from ..data.rounds import StudentPrompt
from ..data.student_prompts import student_prompts
from ..lora.adapters import add_lora, lora_state_dict
from ..lora.files import LoraWeights
from ..lora.merging import merge_adapters
from ..lora.ssr import SSR
from ..losses.targets import AVERAGE, BASE, check_models, describe, make_targets
from ..models.loading import STUDENT
from ..models.sampler import Policy
from ..models.transformer_places import base_key
from ..publishing.record import TeacherRecord
from ..rewards.functions import RewardFunc
from ..teachers.backbones import Backbone, on_students_base
from ..teachers.config import check_tasks, normalize_teachers
from ..teachers.loading import fetch_teachers, load_teachers, read_fingerprints
from ..utils.hardware import format_bytes, module_bytes
from ..utils.markdown import escape
from ..utils.turns import Turns
from .distilling_trainer import AVERAGE_ADAPTER, DistillingTrainer
from .fake_score import FakeScore
from .method_plan import MethodPlan, format_origin
from .opd_config import DiffusionOPDConfig
from .target_samples import FOLDER as SAMPLES_FOLDER
from .target_samples import TargetSamples


class DiffusionOPDTrainer(DistillingTrainer):
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
        student_prompt (`str` or `Callable`, *optional*):
            What the student is asked where its teacher is asked the prompt: the name of a column of `train_dataset`, or a
            function `f(row, seed) -> str`. Rewards, evaluations and image grids go by the prompt.

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
        student_prompt: str | StudentPrompt | None = None,
    ):
        if train_dataset is None:
            raise ValueError("`train_dataset` is required: the prompts of each task.")
        self._teacher_configs = normalize_teachers(teachers)
        args = args if args is not None else DiffusionOPDConfig(output_dir="diffusion-opd")
        self._base_given = model, args.model_init_kwargs
        self._student_prompt = student_prompt
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            tasks=list(dict.fromkeys([*self._teacher_configs, *(args.targets or {})])),
            reward_funcs=reward_funcs,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            adapter=adapter,
        )

    def check_method(self, args: DiffusionOPDConfig) -> None:
        super().check_method(args)
        self._target_settings = args.targets, args.teacher_extrapolation, args.extrapolation_reference
        self._anchor = args.anchor if args.anchor_weight > 0 else None
        scale = args.teacher_guidance_scale
        self.teacher_guidance_scale = args.guidance_scale if scale is None else scale

    def check_tasks(self, tasks: list[str]) -> None:
        mixtures, extrapolation, reference = self._target_settings
        if not mixtures and {reference, self._anchor} <= {BASE, AVERAGE, None}:  # teachers and tasks are the same
            check_tasks(self._teacher_configs, tasks)
        self._terms = make_targets(tasks, self._teacher_configs, mixtures, extrapolation, reference)
        used = {term.model for target in self._terms.values() for term in target} | {self._anchor}
        check_models(self._teacher_configs, used, self._anchor)

    def student_prompt_func(self) -> StudentPrompt | None:
        return student_prompts(self._student_prompt, self.datasets)

    def fetch_models(self) -> None:
        scales = {
            f"the teacher of task {task!r}": config.guidance_scale for task, config in self._teacher_configs.items()
        }
        if {BASE, AVERAGE} & {self._anchor, *(term.model for target in self._terms.values() for term in target)}:
            scales["the base in a target"] = None
        for whose, own in scales.items():
            scale = self.teacher_guidance_scale if own is None else own
            self.family.check_guidance(self.configs, scale)
            if self.objective.needs_branches and not self.family.needs_negative(scale):
                raise ValueError(
                    f"`objective={self.objective.name!r}` matches both branches of guidance, but at guidance {scale:g} "
                    f"{whose} has one. Raise it above 1."
                )
        self._teacher_files = fetch_teachers(self._teacher_configs, self.family)
        if any(found.place is not None for found in self._teacher_files.values()):
            model, kwargs = self._base_given
            key, config = base_key(model, self.base_origin, kwargs), self.configs("transformer")
            self._teacher_files = on_students_base(self._teacher_files, key, config, self.family)

    def add_models(self, args: DiffusionOPDConfig) -> None:
        self.loaded_teachers = load_teachers(
            self._teacher_configs,
            self.transformer,
            guidance_scale=self.teacher_guidance_scale,
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
        self._add_targets(args)

    def _add_targets(self, args: DiffusionOPDConfig) -> None:
        """Who is followed, and what else has the student's shape."""
        known = {
            **self.teachers,
            BASE: Policy("base", self.teacher_guidance_scale),
            AVERAGE: Policy("average", args.guidance_scale, (AVERAGE_ADAPTER,)),
        }
        if any(term.model == AVERAGE for target in self._terms.values() for term in target) or self._anchor == AVERAGE:
            config = copy.deepcopy(self.transformer.peft_config[STUDENT])
            state = {name: t.detach().clone() for name, t in lora_state_dict(self.transformer, STUDENT).items()}
            add_lora(self.transformer, LoraWeights(config, state, "average"), AVERAGE_ADAPTER)
        self.targets = {
            task: self.make_target(f"target {task}", target, known) for task, target in self._terms.items()
        }
        self.anchor = None if self._anchor is None else known[self._anchor]
        if args.merge_teachers is not None:
            others = [task for task, teacher in self.teachers.items() if teacher.model is not None]
            if others or self.adapter_origin is not None:
                what = (
                    f"the teachers of {', '.join(others)} are on other bases" if others else "`adapter` is given too"
                )
                raise ValueError(f"`merge_teachers` merges LoRAs on the student's base to start from, but {what}.")
            if args.merge_teachers != SSR:
                merge_adapters(self.transformer, self.teacher_adapters, args.merge_teachers, STUDENT)
        self.fake_score = None
        if self.objective.needs_fake:
            rate = self.objective.fake_learning_rate or args.learning_rate
            self.fake_score = FakeScore(self.transformer, self.family, rate, (args.adam_beta1, args.adam_beta2))

    def prepare_sampling(self, args: DiffusionOPDConfig) -> None:
        super().prepare_sampling(args)
        if args.merge_teachers == SSR and self.first_checkpoint is None:
            self.merge_by_what_teachers_see()
        if args.merge_teachers is not None and self.ema is not None:
            self.ema.load_state_dict(self.ema.parameters)
        made_of = json.dumps(
            [self.provenance, self._plan_of_targets(), self.latent_shape], sort_keys=True, default=str
        )
        fingerprint = hashlib.sha256(made_of.encode()).hexdigest()
        folder = Path(args.output_dir) / SAMPLES_FOLDER
        self.target_samples = TargetSamples(self.sampler, folder, fingerprint, args.seed, args.process_index)

    def known_sources(self, args: DiffusionOPDConfig) -> dict[str, Any]:
        teachers = read_fingerprints(
            self._teacher_configs, self._teacher_files, self.teacher_guidance_scale, self.family
        )
        known = {**super().known_sources(args), "teachers": teachers}
        if (asked := self._student_prompt) is not None:
            known["student_prompt"] = asked if isinstance(asked, str) else f"{asked.__module__}:{asked.__qualname__}"
        return known

    @property
    def provenance(self) -> dict[str, Any]:
        teachers = {
            task: {"sha256": teacher.fingerprint, "guidance_scale": teacher.guidance_scale}
            for task, teacher in self.loaded_teachers.items()
        }
        return {**super().provenance, "teachers": teachers}

    def plan(self) -> MethodPlan:
        args = self.args
        closed = "mean matching, Eq. 12" if args.noise_level == 0 else "closed-form KL, Eq. 11"
        queries = "" if args.query_steps is None else f", at {args.query_steps} {args.query_distribution} steps"
        backbones = self._plan_of_backbones()
        return MethodPlan(
            objective=(closed if self.objective.name == "kl" else self.objective.title) + queries,
            tasks=self._plan_of_targets(),
            models=backbones["models"],
            memory={} if self.fake_score is None else {"fake score": self.fake_score.num_bytes},
            lines={
                **backbones.get("lines", {}),
                **({"anchor": f"{self._anchor}, weight {args.anchor_weight:g}"} if self._anchor else {}),
                **({"start": f"{args.merge_teachers} of the teachers"} if args.merge_teachers else {}),
            },
        )

    def _plan_of_targets(self) -> dict[str, str]:
        told = {
            task: f"teacher: {'full model' if teacher.adapter_name is None else 'LoRA'} "
            + format_origin(teacher.origin)
            + (f" on {format_origin(teacher.base)}" if teacher.base is not None else "")
            + f", guidance {teacher.guidance_scale:g}"
            for task, teacher in self.loaded_teachers.items()
        }
        return {
            task: told[task] if describe(target) == task else f"target: {describe(target)}"
            for task, target in self._terms.items()
        }

    def _plan_of_backbones(self) -> dict[str, Any]:
        sizes = sorted(map(module_bytes, self.backbones.values()), reverse=True)
        if not self.turns.modules:
            return {"models": sum(sizes)}
        waiting = f"{format_bytes(sum(sizes))} of teachers in host memory, on the device when it is their turn"
        return {"models": sum(sizes[:2]), "lines": {"offload": waiting}}

    def describe_run(self) -> dict[str, Any]:
        tasks = list(self.targets)
        return {
            "summary": (
                f"One LoRA for {'the task' if len(tasks) == 1 else f'{len(tasks)} tasks'} ({', '.join(map(escape, tasks))}), learned "
                f"from {'a teacher' if len(tasks) == 1 else 'a teacher for each'}. {self.objective.story}"
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
