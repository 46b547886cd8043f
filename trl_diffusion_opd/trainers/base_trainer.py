# SPDX-License-Identifier: Apache-2.0
"""What every trainer of a LoRA diffusion student shares: base, student, tasks, evaluation, images, logs."""

import copy
import hashlib
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback, set_seed
from transformers.integrations import get_reporting_integration_callbacks

from ..data.prompt_sets import task_datasets
from ..data.rounds import RoundSampler, StudentPrompt
from ..evaluation.score import count_images
from ..hub.licenses import License, read_license
from ..hub.upload import check_destination
from ..lora.adapters import load_lora_into
from ..lora.ema import StudentEMA
from ..lora.files import load_lora
from ..models.loading import (
    add_student,
    check_pipeline,
    load_pipeline,
    read_configs,
    sizes,
    student_config,
)
from ..models.sampler import Policy
from ..models.velocity import VelocityModel
from ..publishing.record import RunRecord
from ..rewards.functions import RewardFunc, check_columns, normalize_reward_funcs
from .base_config import DiffusionConfig
from .checkpoints import check_sources
from .checks import resolve_family_settings
from .disk import check_disk
from .evaluating_trainer import EvaluatingTrainer
from .method_plan import MethodPlan
from .optimizers import make_optimizers
from .output_dir import check_output_dir
from .round_metrics import RoundMetrics
from .run_record import record_run, resume_record


class DiffusionTrainer(EvaluatingTrainer):
    """
    Base class of the trainers. Subclasses define `train_round`, and may override `add_models` (other models on the
    backbone) and `rollout_metrics` (what an evaluation measures along the way).
    """

    num_kept_policies = 0  # LoRAs in a checkpoint beside the student and its average

    def __init__(
        self,
        model: str | Path | DiffusionPipeline,
        args: DiffusionConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        tasks: list[str],
        reward_funcs: dict[str, RewardFunc | list[RewardFunc]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Callable | None, Callable | None] = (None, None),
        peft_config: LoraConfig | dict[str, Any] | None = None,
        adapter: str | Path | None = None,
        num_generations: int = 1,
    ):
        args = copy.copy(args)  # what is not set becomes what this base is made for
        if args.n_gpu > 1:
            raise ValueError(
                f"One process sees {args.n_gpu} GPUs, which `torch.nn.DataParallel` would share. Start one process per "
                "GPU with `accelerate launch`, or show it one GPU with `CUDA_VISIBLE_DEVICES=0`."
            )
        # Where to write and to push, tasks and prompts: checked before anything large is loaded
        if args.should_save:
            check_output_dir(args.output_dir)
        get_reporting_integration_callbacks(args.report_to)  # raises a ValueError for a name that there is not
        if args.eval_strategy != "no" and eval_dataset is None:
            raise ValueError(
                f"`eval_strategy` is {args.eval_strategy.value!r}, but there is no `eval_dataset`. Pass one, or set "
                "`eval_strategy` to 'no'."
            )
        if args.push_to_hub and args.process_index == 0:
            args.hub_model_id = check_destination(args)
        self.base_origin, self.family = check_pipeline(model, args.model_init_kwargs)
        self.configs = read_configs(model, self.base_origin, args.model_init_kwargs)
        self.defaults = self.family.defaults(self.configs)
        resolve_family_settings(args, self.family, self.defaults)
        for scale in {args.guidance_scale, args.eval_guidance_scale} - {None}:
            self.family.check_guidance(self.configs, scale)
        self.check_method(args)
        self._load_prompts(args, train_dataset, eval_dataset, tasks, reward_funcs or {}, num_generations)

        # Base, student, and what the method adds to them
        parameters = self._load_models(args, model, peft_config, adapter)
        super().__init__(
            VelocityModel(self.transformer, self.family),
            args,
            num_micro_rounds=self._rounds_per_epoch * args.gradient_accumulation_steps,
            eval_dataset=self.eval_datasets or None,
            callbacks=callbacks,
            optimizers=make_optimizers(optimizers, list(parameters.values())),
        )
        self.prepare_sampling(args)
        self.add_callbacks()
        check_disk(self)
        self._distinct_prompts = self.rounds.distinct_prompts(at_most=args.prompt_cache_size)
        if self._distinct_prompts is None and (number := self.prompts_at_once()) > args.prompt_cache_size:
            raise ValueError(
                f"`prompt_cache_size` is {args.prompt_cache_size}, but this process needs {number} prompts at once. Raise "
                "it to that at least."
            )
        self.metrics = RoundMetrics()

    def _load_prompts(self, args, train_dataset, eval_dataset, tasks, reward_funcs, num_generations) -> None:
        """Prompts, rewards and the order of the rounds."""
        self.datasets, self.prompt_origins = task_datasets(train_dataset, tasks, column=args.prompt_column)
        self.check_tasks(list(self.datasets))
        self.eval_datasets, self.eval_prompt_origins = {}, {}
        if eval_dataset is not None:
            self.eval_datasets, self.eval_prompt_origins = task_datasets(
                eval_dataset, tasks, column=args.prompt_column, argument="eval_dataset"
            )
            count_images(self.eval_datasets, args.num_eval_images)
        if unknown := sorted(set(args.task_weights or {}) - set(tasks)):
            raise ValueError(f"`task_weights` names unknown tasks {unknown}. The tasks are {tasks}.")
        self.reward_funcs = normalize_reward_funcs(reward_funcs, tasks)
        self.check_rewards(args)
        self.rounds = RoundSampler(
            {task: self.datasets[task] for task in tasks if task in self.datasets},
            args.per_device_train_batch_size,
            args.seed,
            column=args.prompt_column,
            weights=args.task_weights,
            num_micro_rounds=args.gradient_accumulation_steps,
            num_generations=num_generations,
            num_processes=args.world_size,
            process_index=args.process_index,
            student_prompt=self.student_prompt_func(),
        )
        self._rounds_per_epoch = self.rounds.rounds_per_epoch or args.max_steps
        if self._rounds_per_epoch <= 0:
            raise ValueError("`train_dataset` has a stream, whose length is not known. Set `max_steps`.")

    def _load_models(self, args, model, peft_config, adapter) -> dict[str, nn.Parameter]:
        """Loads base and student and adds the method's models; returns the parameters to train."""
        start = self.adapter_origin = None
        if adapter is not None:
            start, self.adapter_origin = load_lora(
                adapter, owner=f"adapter {str(adapter)!r}", convert=self.family.convert_lora
            )
        if peft_config is None and start is not None:
            peft_config = start.config
        transformer_config = self.configs("transformer")
        peft_config = student_config(peft_config, self.family, transformer_config)
        self.check_start(args, self.datasets, peft_config)
        self.fetch_models()
        self.sources = self.known_sources(args)
        if self.first_checkpoint is not None:
            check_sources(self.first_checkpoint, {**self.sources, "base": sizes(transformer_config)})
        set_seed(args.seed)
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        self.pipeline = load_pipeline(
            model, dtype, args.model_init_kwargs, origin=self.base_origin, family=self.family
        )
        self.base_license = License()
        if args.process_index == 0:  # which alone writes the card
            folder, access = getattr(model, "name_or_path", model), args.model_init_kwargs or {}
            self.base_license = read_license(self.base_origin, folder, access.get("token"))
        self.transformer = self.pipeline.transformer
        self.sources["base"] = sizes(self.transformer.config)
        self.latent_shape = self.family.latent_shape(self.pipeline, args.height, args.width)
        parameters = add_student(self.transformer, peft_config)
        if start is not None:
            load_lora_into(self.transformer, start)
        self.ema = None
        if args.ema_decay is not None:
            self.ema = StudentEMA(parameters, args.ema_decay, args.ema_update_every, args.ema_update_repeats)
        self.teachers: dict[str, Policy] = {}
        self.add_models(args)
        return parameters

    # Hooks

    def check_tasks(self, tasks: list[str]) -> None:
        """Raises a `ValueError` if the tasks of the training prompts are not those of the method."""

    def check_rewards(self, args: DiffusionConfig) -> None:
        """Raises a `ValueError` if `self.reward_funcs` are not what the method needs."""
        if idle := sorted(set(self.reward_funcs) - set(self.eval_datasets)):
            raise ValueError(f"`reward_funcs` has tasks that `eval_dataset` has no prompts for: {idle}. Add some.")
        check_columns(self.reward_funcs, self.eval_datasets, "eval_dataset")

    def check_method(self, args: DiffusionConfig) -> None:
        """Raises a `ValueError` for settings of the method that the model family does not go with."""

    def student_prompt_func(self) -> StudentPrompt | None:
        """What the student is asked instead of the prompts of `self.datasets`."""

    def prompts_at_once(self) -> int:
        """How many prompts this process needs the embeddings of at the same time: those of a round."""
        return self.rounds.embeddings_per_round

    def fetch_models(self) -> None:
        """Makes sure that the method's other models are on this machine, before the large base is fetched."""

    def add_models(self, args: DiffusionConfig) -> None:
        """
        Adds the method's other models to `self.transformer`, after the student and before the device placement; those
        that teach go into `self.teachers`, by task.
        """

    @property
    def tags(self) -> list[str]:
        """Tags of the method on a card."""
        return self._tag_names

    @property
    def paper(self) -> dict[str, str]:
        """Title, id and citation of the method."""
        return self._paper

    def known_sources(self, args: DiffusionConfig) -> dict[str, Any]:
        """What of `provenance` can be told before anything is loaded."""
        return {"tasks": self.rounds.weights}

    @property
    def provenance(self) -> dict[str, Any]:
        return {**self.sources, "base": _config_hash(self.transformer.config)}

    def plan(self) -> MethodPlan:
        """What the method adds to the plan of a run."""
        raise NotImplementedError

    def describe_run(self) -> dict[str, Any]:
        """Fields of the [`RunRecord`] that the method fills in: at least `summary`."""
        raise NotImplementedError

    def train_round(self, model: nn.Module, micro_round: int) -> tuple[torch.Tensor, int]:
        """
        One (micro-)round: accumulates its gradient.

        Args:
            model (`torch.nn.Module`):
                The student, in its data-parallel wrapper.
            micro_round (`int`):
                Number of the gradient accumulation step in the round.

        Returns:
            `tuple[torch.Tensor, int]`: its loss, a scalar without gradient, and the number of its images.
        """
        raise NotImplementedError

    # Record

    def make_record(self) -> RunRecord:
        """What the run is as it stands: everything that the model card tells."""
        return record_run(self)

    def resume_record(self, checkpoint: str | Path) -> None:
        """Carries the time spent so far and the images over from a checkpoint."""
        resume_record(self, checkpoint)

    # Rounds

    def training_step(self, model: nn.Module, inputs: dict[str, int], num_items_in_batch: Any = None) -> torch.Tensor:
        """What `Trainer` calls: one (micro-)round, timed."""
        start = time.perf_counter()
        model.train()
        if self.args.torch_empty_cache_steps and self.state.global_step % self.args.torch_empty_cache_steps == 0:
            clear_device_cache()
        loss, num_images = self.train_round(model, inputs["micro_round"] % self.args.gradient_accumulation_steps)
        seconds, num_images = time.perf_counter() - start, num_images * self.args.world_size
        self.metrics.add_speed(num_images, seconds, self.accelerator.sync_gradients, self.accelerator.device)
        return loss

    def reduce_only_if(self, model: nn.Module, is_last_backward: bool) -> AbstractContextManager:
        """Gradients are reduced over the processes in the last backward of a round only."""
        is_last_backward = is_last_backward and self.accelerator.sync_gradients
        return nullcontext() if is_last_backward else self.accelerator.no_sync(model)

    def prepare_prompts(self, round_index: int) -> None:
        """Encodes the prompts of the chunk of rounds that `round_index` is in; all at once if they fit the cache."""
        length = max(1, self.args.prompt_cache_size // self.rounds.embeddings_per_round)
        first = round_index // length * length
        last = min(first + length, self.state.max_steps) if self.state.max_steps > 0 else first + length
        self._prepare_prompts_of(range(first, last))

    def _prepare_prompts_of(self, rounds: range) -> None:
        if self._distinct_prompts is not None:
            self.prompts.prepare("all", lambda: self._distinct_prompts)
        else:
            self.prompts.prepare(rounds.start, lambda: self.rounds.prompts_of(rounds))

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.metrics.pop_means()
        super().log(logs, start_time)


def _config_hash(config: dict[str, Any]) -> str:
    """Tells base models apart by their shape. (Their names and folders may differ between machines.)"""
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(public, sort_keys=True, default=str).encode()).hexdigest()
