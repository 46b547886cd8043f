# SPDX-License-Identifier: Apache-2.0
"""A trainer whose student is sampled and scored along the way: evaluation, comparison, image grids."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers.trainer_utils import speed_metrics

from ..data.prompt_sets import task_datasets
from ..data.rounds import Prompts, TaskBatch
from ..evaluation.comparison import compare, scored_tasks
from ..evaluation.grids import GridSampler
from ..evaluation.score import Evaluator, count_images, name_metrics
from ..models.family import ModelFamily
from ..models.loading import STUDENT
from ..models.prompt_encoder import PromptEncoder
from ..models.sampler import Policy, PolicySampler
from ..models.velocity import Conditioning
from ..publishing.record import Outcome
from ..rewards.functions import RewardFunc
from .base_config import DiffusionConfig
from .callbacks import (
    CurvesCallback,
    EMACallback,
    FiniteGradientCallback,
    ImageGridCallback,
    StopwatchCallback,
    report_image,
)
from .lora_trainer import LoraTrainer


class EvaluatingTrainer(LoraTrainer):
    """
    A [`LoraTrainer`] that samples images of its student, and scores them.

    Subclasses set what is declared here before they call `prepare_sampling`.
    """

    pipeline: DiffusionPipeline
    family: ModelFamily
    latent_shape: tuple[int, int, int]
    datasets: dict[str, Prompts]
    eval_datasets: dict[str, Prompts]
    reward_funcs: dict[str, list[RewardFunc]]
    reward_weights: list[float] | None = None
    teachers: dict[str, Policy]  # by task

    def prepare_sampling(self, args: DiffusionConfig) -> None:
        """Schedules, samplers of images, and encoders of prompts."""
        device = self.accelerator.device
        self.sampler = PolicySampler(
            self.pipeline, self.model, self.latent_shape, device=device, autocast=self.accelerator.autocast
        )
        eval_steps = args.eval_num_inference_steps or args.num_inference_steps
        self.schedule = self.family.schedule(self.pipeline, args.num_inference_steps, self.latent_shape)
        self.eval_schedule = self.family.schedule(self.pipeline, eval_steps, self.latent_shape)
        self.prompts = self._prompt_encoder()
        self.evaluator = Evaluator(
            sampler=self.sampler,
            prompts=self._prompt_encoder(),
            schedule=self.eval_schedule,
            solver=args.solver,
            noise_level=args.eval_noise_level,
            seed=args.seed,
            column=args.prompt_column,
            batch_size=args.per_device_eval_batch_size,
            chunk_size=args.prompt_cache_size,
            num_images=args.num_eval_images,
            reward_funcs=self.reward_funcs,
            reward_weights=self.reward_weights,
            reward_timeout=args.reward_timeout,
            process_index=args.process_index,
            num_processes=args.world_size,
            show_progress=self.is_world_process_zero() and not args.disable_tqdm,
        )
        held_out = {task: self.eval_datasets.get(task, data) for task, data in self.datasets.items()}
        self.grid = GridSampler(self.evaluator, self._prompt_encoder(), held_out, args.num_grid_prompts)

    def _prompt_encoder(self) -> PromptEncoder:
        return PromptEncoder(
            self.pipeline,
            self.family,
            self.accelerator.device,
            max_sequence_length=self.args.max_sequence_length,
            batch_size=self.args.prompt_batch_size,
            offload=self.args.offload_text_encoders,
            show_progress=self.is_world_process_zero() and not self.args.disable_tqdm,
        )

    def add_callbacks(self) -> None:
        self.outcome = Outcome()
        self.add_callback(StopwatchCallback(self.outcome))
        self.add_callback(FiniteGradientCallback(self.accelerator))
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
            self.add_callback(EMACallback(self.ema))
        if self.args.num_grid_prompts > 0:
            show = partial(report_image, self.callback_handler, self.args.report_to)
            self.add_callback(ImageGridCallback(self.grid, self.policies, self.student_weights, self.outcome, show))
        if self.args.save_curves:
            self.add_callback(CurvesCallback(self.outcome))

    # Evaluation and images

    def policies(self) -> list[Policy]:
        """What image grids and tables compare: the base, the student, and each teacher."""
        return [Policy("base", self.student_policy.guidance_scale), self.student_policy, *self.teachers.values()]

    @property
    def student_policy(self) -> Policy:
        scale = self.args.eval_guidance_scale
        return Policy("student", self.args.guidance_scale if scale is None else scale, (STUDENT,))

    def rollout_metrics(
        self, policy: Policy, batch: TaskBatch, conditioning: Conditioning
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Rolls `policy` out as at evaluation: the final latents `[B, C, H, W]` and metrics `[B]` by name."""
        return self.evaluator.sample_latents(policy, batch, conditioning), {}

    @contextmanager
    def student_weights(self, average: bool) -> Iterator[None]:
        """The student in evaluation mode, with its averaged weights if `average`."""
        training = self.model.training
        self.model.eval()
        try:
            with self.ema.applied() if average and self.ema is not None else nullcontext():
                yield
        finally:
            self.model.train(training)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Rolls the student out on the prompts of every task, always with the same noise.

        Args:
            eval_dataset (`dict` or `Dataset`, *optional*):
                Like the argument of the trainer, which is the default.
            ignore_keys (`list[str]`, *optional*):
                Not used: there are no model outputs to ignore.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`):
                Prefix of the metrics.

        Returns:
            `dict[str, float]`: `eval_<metric>/<task>` of the averaged weights if there are any (then
            `eval_raw_<metric>/<task>` of the raw ones too), and `eval_loss`, the mean of the tasks' divergences.
        """
        datasets = self.eval_datasets
        if eval_dataset is not None:
            datasets, _ = task_datasets(
                eval_dataset, list(self.datasets), column=self.args.prompt_column, argument="eval_dataset"
            )
        if not datasets:
            raise ValueError("There is nothing to evaluate on. Pass an `eval_dataset`, here or to the trainer.")
        start = time.time()
        metrics: dict[str, float] = {}
        for prefix, average in [("", True)] if self.ema is None else [("", True), ("raw_", False)]:
            with self.student_weights(average):
                scores = self.evaluator.score(self.student_policy, datasets, measure=self.rollout_metrics)
            metrics |= name_metrics(scores, f"{metric_key_prefix}_{prefix}")
        total = sum(count_images(datasets, self.args.num_eval_images).values())
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=total)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def compare(self) -> dict[str, Any]:
        """
        Scores base, student, and where there are teachers these and their merge, on the evaluation prompts of the tasks
        that have reward functions: see [`~evaluation.comparison.compare`]. The table goes into the run's record.
        """
        base, student, *_ = self.policies()
        self.outcome.results = compare(
            self.evaluator,
            scored_tasks(self.eval_datasets, self.reward_funcs),
            base=base,
            student=student,
            teachers=self.teachers,
            student_weights=self.student_weights,
            averaged=self.ema is not None,
        )
        return self.outcome.results
