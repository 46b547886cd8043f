# SPDX-License-Identifier: Apache-2.0
"""Writing down what a run is: from a trainer to its [`RunRecord`], and back when it is resumed."""

import importlib.metadata
import inspect
import os
from dataclasses import MISSING, fields
from datetime import date
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn
from transformers import TrainerState, TrainingArguments

from ..data.rounds import Prompts, RoundSampler, num_prompts, spread
from ..hub.licenses import License
from ..hub.locations import Origin
from ..lora.adapters import has_no_effect
from ..lora.ema import StudentEMA
from ..models.family import Defaults, ModelFamily
from ..models.loading import STUDENT, default_lora
from ..models.sampler import Policy
from ..publishing.card_sections import link
from ..publishing.record import Outcome, PromptSet, RunRecord
from ..rewards.functions import RewardFunc, reward_name
from ..sampling.denoising import Schedule
from ..utils.hardware import device_name
from ..utils.serialization import public_settings
from .base_config import DiffusionConfig
from .round_metrics import RoundMetrics


LIBRARIES = ("trl-diffusion-opd", "trl", "diffusers", "transformers", "peft", "torch")
# Settings of the machine or of the run's bookkeeping, which say nothing about the method.
_NOT_SETTINGS = tuple(
    "output_dir logging report_to run_name hub_ push_to_hub use_cpu disable_tqdm dataloader resume_from_checkpoint "
    "save_total_limit project trackio".split()
)
# Settings that the config class itself fills in or consumes.
_RESOLVED = ("bf16", "activation_checkpointing", "gradient_checkpointing", "accelerator_config", "do_eval")
# Fields of a LoRA's config that say where it was made, or that are for PEFT's own use.
_NOT_LORA_SETTINGS = ("base_model_name_or_path", "auto_mapping", "runtime_config")
_NUM_EXAMPLES = 2


class RecordedRun(Protocol):
    """What a record tells of: the part of a trainer that is read here."""

    args: DiffusionConfig
    state: TrainerState
    accelerator: Accelerator
    outcome: Outcome
    metrics: RoundMetrics
    tags: list[str]
    paper: dict[str, str]
    hub_model_id: str | None
    family: ModelFamily
    defaults: Defaults
    pipeline: DiffusionPipeline
    transformer: nn.Module
    ema: StudentEMA | None
    latent_shape: tuple[int, int, int]
    eval_schedule: Schedule
    student_policy: Policy
    base_origin: Origin
    base_license: License
    adapter_origin: Origin | None
    datasets: dict[str, Prompts]
    prompt_origins: dict[str, Origin]
    eval_datasets: dict[str, Prompts]
    eval_prompt_origins: dict[str, Origin]
    reward_funcs: dict[str, list[RewardFunc]]
    rounds: RoundSampler

    def describe_run(self) -> dict[str, Any]: ...


def record_run(run: RecordedRun) -> RunRecord:
    """The record of a trainer's run as it stands."""
    args, state, outcome = run.args, run.state, run.outcome
    name = run.hub_model_id or Path(args.output_dir).resolve().name
    height, width = run.family.image_size(run.pipeline, run.latent_shape)
    functions = [func for funcs in run.reward_funcs.values() for func in funcs]
    described = run.describe_run()
    if run.adapter_origin is not None:
        described["summary"] += f" It started from the LoRA {link(run.adapter_origin)}."
    return RunRecord(
        name=name.split("/")[-1],
        base=run.base_origin,
        repo_id=run.hub_model_id,
        revision=args.hub_revision,
        base_license=run.base_license,
        tags=[
            *run.family.card_tags(run.base_origin.repo_id),
            *run.tags,
            *(["hf_jobs"] if "JOB_ID" in os.environ else []),
        ],
        prompts=[_prompts(run, task, data) for task, data in run.datasets.items()],
        eval_prompts=[_eval_prompts(run, task, data) for task, data in run.eval_datasets.items()],
        inference={
            "height": height,
            "width": width,
            "num_inference_steps": len(run.eval_schedule),
            **run.family.call_arguments(run.student_policy.guidance_scale, args.max_sequence_length),
        },
        guidance_scale=run.student_policy.guidance_scale,
        pipeline_class=run.family.pipeline_class.__name__,
        dtype="bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        settings={**changed_settings(args, run.defaults), **lora_settings(run.transformer.peft_config[STUDENT])},
        rounds=state.global_step,
        planned_rounds=max(0, state.max_steps or args.max_steps),
        images_per_round=run.rounds.prompts_per_round * args.world_size,
        seconds=outcome.seconds,
        hardware=hardware(run),
        gallery=outcome.gallery,
        results=outcome.results,
        evaluation=last_evaluation(state.log_history),
        reward_names={task: [reward_name(func) for func in funcs] for task, funcs in run.reward_funcs.items()},
        reward_docs={reward_name(func): inspect.getdoc(func).split("\n")[0] for func in functions if func.__doc__},
        grid=outcome.grid,
        curves=outcome.curves,
        paper=run.paper,
        versions=library_versions(),
        date=date.today().isoformat(),
        has_no_effect=state.global_step > 0 and has_no_effect(_saved_weights(run)),
        **described,
    )


def _saved_weights(run: RecordedRun) -> dict[str, torch.Tensor]:
    """The student's weights as they are saved: the moving average if there is one."""
    parameters = {name: p for name, p in run.transformer.named_parameters() if f".{STUDENT}." in name}
    weights = parameters if run.ema is None else run.ema.state_dict()
    return {name.replace(f".{STUDENT}.", "."): tensor for name, tensor in weights.items()}


def resume_record(run: RecordedRun, checkpoint: str | Path) -> None:
    """Takes the time spent so far, and the images that are still there, from a checkpoint's record."""
    record = RunRecord.load(checkpoint)
    record.drop_missing(run.args.output_dir)
    outcome = run.outcome
    outcome.seconds = record.seconds
    outcome.gallery, outcome.grid, outcome.curves = record.gallery, record.grid, record.curves


def changed_settings(args: TrainingArguments, of_base: Defaults) -> dict[str, Any]:
    """
    The settings that differ from the defaults that all trainers share, some of which the base has, without those that
    name a machine.
    """

    def default(f) -> Any:
        # Not from a default instance: constructing one resets accelerate's state in the middle of the run.
        return f.default if f.default is not MISSING else f.default_factory() if callable(f.default_factory) else None

    defaults = {f.name: default(f) for f in (*fields(args), *fields(DiffusionConfig))} | of_base.of_a_run()
    return {
        name: value
        for name, value in public_settings(args.to_dict()).items()
        if value != defaults[name]
        and (value is not None or name not in of_base.of_a_run())  # None stands for the default
        and not (value in ([], {}) and not defaults[name])  # filled in by the config class, or not to be shown
        and name not in _RESOLVED
        and not name.startswith(_NOT_SETTINGS)
    }


def lora_settings(config: LoraConfig) -> dict[str, Any]:
    """Rank, alpha and targets of a LoRA, named as in a recipe, and what else differs from the default LoRA."""
    ours, default = config.to_dict(), default_lora().to_dict()
    targets = ours["target_modules"]
    settings = {
        "lora_r": ours["r"],
        "lora_alpha": ours["lora_alpha"],
        "lora_target_modules": targets if isinstance(targets, str) else sorted(targets),
    }
    for name, value in ours.items():
        if name not in ("r", "lora_alpha", "target_modules", *_NOT_LORA_SETTINGS) and value != default[name]:
            settings[name if name.startswith("lora_") else f"lora_{name}"] = (
                sorted(value) if isinstance(value, set) else value
            )
    return settings


def last_evaluation(log_history: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics by task of the last evaluation in a trainer's history, with its step."""
    for entry in reversed(log_history):
        metrics = {name: value for name, value in entry.items() if name.startswith("eval_") and "/" in name}
        if metrics:
            return {"step": entry["step"], **metrics}
    return {}


def hardware(run: RecordedRun) -> dict[str, Any]:
    """Device, number of processes and peak memory of a run."""
    facts: dict[str, Any] = {
        "device": device_name(run.accelerator.device),
        "num_processes": run.args.world_size,
    }
    if run.metrics.peak_memory:
        facts["peak_memory_gb"] = round(run.metrics.peak_memory / 2**30, 2)
    return facts


def library_versions(libraries: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Versions of installed libraries."""
    return {name: importlib.metadata.version(name) for name in libraries}


def _prompts(run: RecordedRun, task: str, data: Prompts) -> PromptSet:
    return PromptSet(task, run.prompt_origins[task], num_prompts(data), examples=_examples(run, data))


def _eval_prompts(run: RecordedRun, task: str, data: Prompts) -> PromptSet:
    column, number, trained = run.args.prompt_column, num_prompts(data), run.datasets[task]
    num_seen = None
    if number is not None and num_prompts(trained) is not None:
        seen = set(trained[column])
        num_seen = sum(prompt in seen for prompt in data[column])
    return PromptSet(
        task,
        run.eval_prompt_origins[task],
        number,
        num_images=run.args.num_eval_images or number,
        num_seen=num_seen,
        examples=_examples(run, data),
    )


def _examples(run: RecordedRun, data: Prompts) -> list[str]:
    return [data[position][run.args.prompt_column] for position in spread(data, _NUM_EXAMPLES)]
