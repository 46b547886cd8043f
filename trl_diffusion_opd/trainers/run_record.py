# SPDX-License-Identifier: Apache-2.0
"""Writing down what a run is: from a trainer to its [`RunRecord`], and back when it is resumed."""

import importlib.metadata
import inspect
import os
from dataclasses import MISSING, fields
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.rounds import Prompts, num_prompts, spread
from ..lora.adapters import has_no_effect
from ..models.loading import STUDENT, default_lora
from ..publishing.card_sections import link
from ..publishing.record import PromptSet, RunRecord
from ..rewards.functions import reward_name
from ..utils.hardware import device_name
from ..utils.serialization import public_settings
from .base_config import DiffusionConfig


if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import TrainingArguments

    from .base_trainer import DiffusionTrainer

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


def record_run(trainer: "DiffusionTrainer") -> RunRecord:
    """The record of a trainer's run as it stands."""
    args, state, outcome = trainer.args, trainer.state, trainer.outcome
    name = trainer.hub_model_id or Path(args.output_dir).resolve().name
    height, width = trainer.family.image_size(trainer.pipeline, trainer.latent_shape)
    functions = [func for funcs in trainer.reward_funcs.values() for func in funcs]
    described = trainer.describe_run()
    if trainer.adapter_origin is not None:
        described["summary"] += f" It started from the LoRA {link(trainer.adapter_origin)}."
    return RunRecord(
        name=name.split("/")[-1],
        base=trainer.base_origin,
        repo_id=trainer.hub_model_id,
        revision=args.hub_revision,
        base_license=trainer.base_license,
        tags=[
            *trainer.family.card_tags(trainer.base_origin.repo_id),
            *trainer._tag_names,
            *(["hf_jobs"] if "JOB_ID" in os.environ else []),
        ],
        prompts=[_prompts(trainer, task, data) for task, data in trainer.datasets.items()],
        eval_prompts=[_eval_prompts(trainer, task, data) for task, data in trainer.eval_datasets.items()],
        inference={
            "height": height,
            "width": width,
            "num_inference_steps": len(trainer.eval_schedule),
            **trainer.family.call_arguments(trainer.student_policy.guidance_scale, args.max_sequence_length),
        },
        pipeline_class=trainer.family.pipeline_class.__name__,
        dtype="bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        settings={**changed_settings(args), **lora_settings(trainer.transformer.peft_config[STUDENT])},
        rounds=state.global_step,
        planned_rounds=max(0, state.max_steps or args.max_steps),
        images_per_round=trainer.rounds.prompts_per_round * args.world_size,
        seconds=outcome.seconds,
        hardware=hardware(trainer),
        gallery=outcome.gallery,
        results=outcome.results,
        evaluation=last_evaluation(state.log_history),
        reward_names={task: [reward_name(func) for func in funcs] for task, funcs in trainer.reward_funcs.items()},
        reward_docs={reward_name(func): inspect.getdoc(func).split("\n")[0] for func in functions if func.__doc__},
        grid=outcome.grid,
        curves=outcome.curves,
        paper=trainer._paper,
        versions=library_versions(),
        date=date.today().isoformat(),
        has_no_effect=state.global_step > 0 and has_no_effect(_saved_weights(trainer)),
        **described,
    )


def _saved_weights(trainer: "DiffusionTrainer") -> dict[str, torch.Tensor]:
    """The student's weights as they are saved: the moving average if there is one."""
    parameters = {name: p for name, p in trainer.transformer.named_parameters() if f".{STUDENT}." in name}
    weights = parameters if trainer.ema is None else trainer.ema.state_dict()
    return {name.replace(f".{STUDENT}.", "."): tensor for name, tensor in weights.items()}


def resume_record(trainer: "DiffusionTrainer", checkpoint: str | Path) -> None:
    """Takes the time spent so far, and the images that are still there, from a checkpoint's record."""
    record = RunRecord.load(checkpoint)
    record.drop_missing(trainer.args.output_dir)
    outcome = trainer.outcome
    outcome.seconds = record.seconds
    outcome.gallery, outcome.grid, outcome.curves = record.gallery, record.grid, record.curves


def changed_settings(args: "TrainingArguments") -> dict[str, Any]:
    """The settings that differ from the defaults that all trainers share, without those that name a machine."""

    def default(f) -> Any:
        # Not from a default instance: constructing one resets accelerate's state in the middle of the run.
        return f.default if f.default is not MISSING else f.default_factory() if callable(f.default_factory) else None

    defaults = {f.name: default(f) for f in (*fields(args), *fields(DiffusionConfig))}
    return {
        name: value
        for name, value in public_settings(args.to_dict()).items()
        if value != defaults[name]
        and not (value in ([], {}) and not defaults[name])  # filled in by the config class, or not to be shown
        and name not in _RESOLVED
        and not name.startswith(_NOT_SETTINGS)
    }


def lora_settings(config: "LoraConfig") -> dict[str, Any]:
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


def hardware(trainer: "DiffusionTrainer") -> dict[str, Any]:
    """Device, number of processes and peak memory of a run."""
    facts: dict[str, Any] = {
        "device": device_name(trainer.accelerator.device),
        "num_processes": trainer.args.world_size,
    }
    if trainer.metrics.peak_memory:
        facts["peak_memory_gb"] = round(trainer.metrics.peak_memory / 2**30, 2)
    return facts


def library_versions(libraries: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Versions of installed libraries."""
    return {name: importlib.metadata.version(name) for name in libraries}


def _prompts(trainer: "DiffusionTrainer", task: str, data: Prompts) -> PromptSet:
    return PromptSet(task, trainer.prompt_origins[task], num_prompts(data), examples=_examples(trainer, data))


def _eval_prompts(trainer: "DiffusionTrainer", task: str, data: Prompts) -> PromptSet:
    column, number, trained = trainer.args.prompt_column, num_prompts(data), trainer.datasets[task]
    num_seen = None
    if number is not None and num_prompts(trained) is not None:
        seen = set(trained[column])
        num_seen = sum(prompt in seen for prompt in data[column])
    return PromptSet(
        task,
        trainer.eval_prompt_origins[task],
        number,
        num_images=trainer.args.num_eval_images or number,
        num_seen=num_seen,
        examples=_examples(trainer, data),
    )


def _examples(trainer: "DiffusionTrainer", data: Prompts) -> list[str]:
    return [data[position][trainer.args.prompt_column] for position in spread(data, _NUM_EXAMPLES)]
