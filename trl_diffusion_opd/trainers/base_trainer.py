# SPDX-License-Identifier: Apache-2.0
"""What every trainer of a LoRA diffusion student shares: base, student, tasks, rollouts, evaluation, images, logs."""

import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import speed_metrics

from ..data.prompt_sets import task_datasets
from ..data.rounds import RoundSampler, TaskBatch
from ..evaluation.score import count_images, score_policy
from ..hub.download import resolve
from ..hub.licenses import License, read_license
from ..hub.locations import Origin, parse_source
from ..hub.upload import check_destination
from ..lora.adapters import base_only, load_lora_into, use_adapter
from ..lora.ema import StudentEMA
from ..lora.files import read_lora
from ..models.loading import STUDENT, add_student, check_pipeline, default_lora, latent_shape, load_pipeline
from ..models.prompt_encoder import PromptEncoder
from ..models.sampler import Policy
from ..models.velocity import Conditioning, VelocityModel
from ..publishing.record import Outcome, RunRecord
from ..rewards.functions import RewardFunc, check_columns, normalize_reward_funcs
from ..sampling.denoising import DenoisingStep, denoise, make_schedule
from ..utils.hardware import memory_in_use
from .base_config import DiffusionConfig
from .callbacks import CurvesCallback, EMACallback, FiniteGradientCallback, ImageGridCallback, StopwatchCallback
from .disk import check_disk
from .lora_trainer import LoraTrainer
from .plan import MethodPlan
from .run_record import record_run, resume_record


class DiffusionTrainer(LoraTrainer):
    """
    Base class of the trainers. Subclasses define `training_step`, and may override `add_models` (other models on the
    backbone) and `rollout_metrics` (what an evaluation measures along the way).
    """

    num_kept_policies = 0  # LoRAs in a checkpoint beside the student and its average
    reward_weights: list[float] | None = None

    def __init__(
        self,
        model: str | Path | StableDiffusion3Pipeline,
        args: DiffusionConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        tasks: list[str],
        reward_funcs: dict[str, RewardFunc | list[RewardFunc]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Callable | None, Callable | None] = (None, None),
        peft_config: LoraConfig | None = None,
        adapter: str | Path | None = None,
        num_generations: int = 1,
    ):
        if args.n_gpu > 1:
            raise ValueError(
                f"One process sees {args.n_gpu} GPUs, which `torch.nn.DataParallel` would share. Start one process per "
                "GPU with `accelerate launch`, or show it one GPU with `CUDA_VISIBLE_DEVICES=0`."
            )

        # Where to push, tasks and prompts: checked before anything large is loaded
        if args.push_to_hub and args.process_index == 0:
            args.hub_model_id = check_destination(args)
        self.base_origin = check_pipeline(model, args.model_init_kwargs)
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
        self.reward_funcs = normalize_reward_funcs(reward_funcs or {}, tasks)
        self.check_rewards(args)
        self.sampler = RoundSampler(
            {task: self.datasets[task] for task in tasks},
            args.per_device_train_batch_size,
            args.seed,
            column=args.prompt_column,
            weights=args.task_weights,
            num_micro_rounds=args.gradient_accumulation_steps,
            num_generations=num_generations,
            num_processes=args.world_size,
            process_index=args.process_index,
        )
        rounds_per_epoch = self.sampler.rounds_per_epoch or args.max_steps
        if rounds_per_epoch <= 0:
            raise ValueError("`train_dataset` has a stream, whose length is not known. Set `max_steps`.")

        # Base, student, and what the method adds to them
        start = self.adapter_origin = None
        if adapter is not None:
            found = resolve(adapter, owner="adapter")
            start = read_lora(found.path, owner=f"adapter {str(adapter)!r}")
            self.adapter_origin = Origin.of_source(parse_source(adapter), found.commit)
        self.check_start(args, self.datasets, peft_config or (start.config if start is not None else default_lora()))
        self.fetch_models()
        set_seed(args.seed)
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        self.pipeline = load_pipeline(model, dtype, args.model_init_kwargs, origin=self.base_origin)
        self.base_license = License()
        if args.process_index == 0:  # which alone writes the card
            folder, access = getattr(model, "name_or_path", model), args.model_init_kwargs or {}
            self.base_license = read_license(self.base_origin, folder, access.get("token"))
        self.transformer = self.pipeline.transformer
        self.latent_shape = latent_shape(self.pipeline, args.height, args.width)
        parameters = add_student(self.transformer, peft_config or (start and start.config))
        if start is not None:
            load_lora_into(self.transformer, start)
        self.ema = StudentEMA(parameters, args.ema_decay, args.ema_update_every) if args.ema_decay else None
        self.teachers: dict[str, Policy] = {}
        self.add_models(args)

        super().__init__(
            VelocityModel(self.transformer),
            args,
            num_micro_rounds=rounds_per_epoch * args.gradient_accumulation_steps,
            eval_dataset=self.eval_datasets or None,
            callbacks=callbacks,
            optimizers=make_optimizers(optimizers, list(parameters.values())),
        )
        self.outcome = Outcome()
        self.add_callback(StopwatchCallback(self))
        self.add_callback(FiniteGradientCallback(self))
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
            self.add_callback(EMACallback(self))
        if args.num_grid_prompts > 0:
            self.add_callback(ImageGridCallback(self))
        if args.save_curves:
            self.add_callback(CurvesCallback(self))

        check_disk(self)

        # Schedules, prompts, logs
        image_seq_len = math.prod(self.latent_shape[1:]) // self.pipeline.patch_size**2
        self.schedule = make_schedule(self.pipeline.scheduler, args.num_inference_steps, image_seq_len=image_seq_len)
        self.eval_schedule = make_schedule(
            self.pipeline.scheduler,
            args.eval_num_inference_steps or args.num_inference_steps,
            image_seq_len=image_seq_len,
        )
        self.prompts = self._prompt_encoder()
        self.eval_prompts = self._prompt_encoder()
        self.grid_prompts = self._prompt_encoder()
        self._distinct_prompts = self.sampler.distinct_prompts(at_most=args.prompt_cache_size)
        if self._distinct_prompts is None and (number := self.prompts_at_once()) > args.prompt_cache_size:
            raise ValueError(
                f"`prompt_cache_size` is {args.prompt_cache_size}, but this process needs {number} prompts at once. Raise "
                "it to that at least."
            )
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._round_seconds = self._round_images = self._peak_memory = 0

    # Hooks

    def check_tasks(self, tasks: list[str]) -> None:
        """Raises a `ValueError` if the tasks of the training prompts are not those of the method."""

    def check_rewards(self, args: DiffusionConfig) -> None:
        """Raises a `ValueError` if `self.reward_funcs` are not what the method needs."""
        if idle := sorted(set(self.reward_funcs) - set(self.eval_datasets)):
            raise ValueError(f"`reward_funcs` has tasks that `eval_dataset` has no prompts for: {idle}. Add some.")
        check_columns(self.reward_funcs, self.eval_datasets, "eval_dataset")

    def prompts_at_once(self) -> int:
        """How many prompts this process needs the embeddings of at the same time: those of a round."""
        return self.sampler.prompts_per_round

    def fetch_models(self) -> None:
        """Makes sure that the method's other models are on this machine, before the large base is fetched."""

    def add_models(self, args: DiffusionConfig) -> None:
        """
        Adds the method's other models to `self.transformer`, after the student and before the device placement; those
        that teach go into `self.teachers`, by task.
        """

    def rollout_metrics(
        self, policy: Policy, batch: TaskBatch, conditioning: Conditioning
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Rolls `policy` out as at evaluation: the final latents `[B, C, H, W]` and metrics `[B]` by name."""
        return self.final_latents(policy, batch, conditioning), {}

    def policies(self) -> list[Policy]:
        """What image grids and tables compare: the base, the student, and each teacher."""
        return [Policy("base", self.student_policy.guidance_scale), self.student_policy, *self.teachers.values()]

    @property
    def provenance(self) -> dict[str, Any]:
        return {"base": _config_hash(self.transformer.config), "tasks": self.sampler.weights}

    def plan(self) -> MethodPlan:
        """What the method adds to the plan of a run."""
        raise NotImplementedError

    def describe_run(self) -> dict[str, Any]:
        """Fields of the [`RunRecord`] that the method fills in: at least `summary`."""
        raise NotImplementedError

    # Record

    def make_record(self) -> RunRecord:
        """What the run is as it stands: everything that the model card tells."""
        return record_run(self)

    def resume_record(self, checkpoint: str | Path) -> None:
        """Carries the time spent so far and the images over from a checkpoint."""
        resume_record(self, checkpoint)

    # Rollouts

    @property
    def student_policy(self) -> Policy:
        scale = self.args.eval_guidance_scale
        return Policy("student", self.args.guidance_scale if scale is None else scale, (STUDENT,))

    def noise_sources(self, seeds: list[int]) -> tuple[torch.Tensor, list[torch.Generator]]:
        """
        Initial noise `[B, C, H, W]` and the generators that draw the noise of the steps. Drawn on the CPU, so that it
        is the same on every device.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = torch.stack([torch.randn(self.latent_shape, generator=generator) for generator in generators])
        return noise.to(self.accelerator.device), generators

    @contextmanager
    def acting(self, policy: Policy) -> Iterator[nn.Module]:
        """The policy's model, ready for a forward without gradients; the student is back afterwards."""
        if policy.model is not None:
            with self.accelerator.autocast():
                yield policy.model
        else:
            # Preparing the student for training adds the autocast; before that, evaluation must.
            switch = (
                use_adapter(self.transformer, *policy.adapters) if policy.adapters else base_only(self.transformer)
            )
            with switch, self.accelerator.autocast():
                yield self.model

    @torch.no_grad()
    def policy_velocity(
        self, policy: Policy, sample: torch.Tensor, timestep: torch.Tensor, text: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Guided velocity `[B, C, H, W]` of a policy; `text` is `conditioning.batch(policy.guidance_scale)`."""
        with self.acting(policy) as model:
            return model(sample, timestep, *text, policy.guidance_scale)

    def rollout(self, policy: Policy, conditioning: Conditioning, seeds: list[int]) -> Iterator[DenoisingStep]:
        """Rolls a policy out with the settings of evaluation, without gradients."""
        schedule, text = self.eval_schedule, conditioning.batch(policy.guidance_scale)
        timesteps = schedule.timesteps.to(self.accelerator.device)
        noise, generators = self.noise_sources(seeds)
        yield from denoise(
            lambda sample, index: self.policy_velocity(policy, sample, timesteps[index], text),
            noise,
            schedule,
            solver=self.args.solver,
            noise_level=self.args.eval_noise_level,
            generator=generators,
        )

    def final_latents(self, policy: Policy, batch: TaskBatch, conditioning: Conditioning) -> torch.Tensor:
        """The latents `[B, C, H, W]` at the end of a rollout."""
        for step in self.rollout(policy, conditioning, batch.seeds):
            latents = step.next_sample
        return latents

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes latents to images in `[0, 1]`, of shape `[B, 3, H, W]`, on the CPU."""
        images = self.pipeline.decode_latents(latents.to(self.pipeline.vae.device))
        return (images / 2 + 0.5).clamp(0, 1).float().cpu()

    # Prompts

    def prepare_prompts(self, round_index: int) -> None:
        """Encodes the prompts of the chunk of rounds that `round_index` is in; all at once if they fit the cache."""
        if self._distinct_prompts is not None:
            self.prompts.prepare("all", lambda: self._distinct_prompts)
            return
        length = self.args.prompt_cache_size // self.sampler.prompts_per_round
        first = round_index // length * length
        last = min(first + length, self.state.max_steps) if self.state.max_steps > 0 else first + length
        self.prompts.prepare(first, lambda: self.sampler.prompts_of(range(first, last)))

    def _prompt_encoder(self) -> PromptEncoder:
        return PromptEncoder(
            self.pipeline,
            self.accelerator.device,
            max_sequence_length=self.args.max_sequence_length,
            batch_size=self.args.prompt_batch_size,
            offload=self.args.offload_text_encoders,
            show_progress=self.is_world_process_zero() and not self.args.disable_tqdm,
        )

    # Evaluation and images

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
        variants = [("", True)] if self.ema is None else [("", True), ("raw_", False)]
        for prefix, average in variants:
            with self.student_weights(average):
                scores = score_policy(self, self.student_policy, datasets)
            for task, values in scores.items():
                metrics |= {f"{metric_key_prefix}_{prefix}{name}/{task}": value for name, value in values.items()}
            if all("kl" in values for values in scores.values()):
                metrics[f"{metric_key_prefix}_{prefix}loss"] = sum(v["kl"] for v in scores.values()) / len(scores)
        metrics |= speed_metrics(
            metric_key_prefix,
            start,
            num_samples=sum(count_images(datasets, self.args.num_eval_images).values()),
        )
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def sample_images(self, policy: Policy, batch: TaskBatch) -> torch.Tensor:
        """Images `[B, 3, H, W]` in `[0, 1]` of a policy, with the settings of evaluation."""
        return self.decode(self.final_latents(policy, batch, self.grid_prompts.conditioning(batch.prompts)))

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._metrics and "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self._metrics.items()}
            self._metrics.clear()
        super().log(logs, start_time)

    def log_speed(self, num_images: int, seconds: float) -> None:
        """Logs the speed of a round over all processes and the peak memory of this one, at its last micro-round."""
        self._round_seconds += seconds
        self._round_images += num_images * self.args.world_size
        if not self.accelerator.sync_gradients:
            return
        self._metrics["step_time"].append(self._round_seconds)
        self._metrics["images_per_second"].append(self._round_images / self._round_seconds)
        self._round_seconds = self._round_images = 0
        self._peak_memory = max(self._peak_memory, memory_in_use(self.accelerator.device))
        self._metrics["peak_memory_gb"].append(self._peak_memory / 2**30)


def make_optimizers(
    makers: tuple[Callable | None, Callable | None], parameters: list[nn.Parameter]
) -> tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None]:
    """
    Optimizer and scheduler from the functions that the user passed.

    Raises:
        `ValueError`: a finished optimizer, which cannot hold the student's parameters, or a scheduler without one.
    """
    make_optimizer, make_scheduler = makers
    for maker in (make_optimizer, make_scheduler):
        if maker is not None and (not callable(maker) or isinstance(maker, torch.optim.Optimizer)):
            raise ValueError(
                f"`optimizers` must hold functions, but holds a {type(maker).__name__}, which was made before the student's "
                "LoRA was there to be trained. Pass e.g. `(lambda parameters: torch.optim.SGD(parameters, lr=0.1), None)`."
            )
    if make_optimizer is None and make_scheduler is not None:
        raise ValueError("`optimizers` has a scheduler without an optimizer. Pass both, or set `lr_scheduler_type`.")
    optimizer = make_optimizer(parameters) if make_optimizer is not None else None
    return optimizer, make_scheduler(optimizer) if make_scheduler is not None else None


def _config_hash(config: dict[str, Any]) -> str:
    """Tells base models apart by their shape. (Their names and folders may differ between machines.)"""
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(public, sort_keys=True, default=str).encode()).hexdigest()
