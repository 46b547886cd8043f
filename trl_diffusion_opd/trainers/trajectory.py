# SPDX-License-Identifier: Apache-2.0
"""What defines the course of a run, and so must not change when it is resumed."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..data.rounds import Prompts, StreamedPrompts, is_plain
from ..publishing.push import TRAINING_ARGS_FILE
from ..utils.serialization import dump_json
from .checkpoints import ResumeError, read_json, read_notes


logger = logging.getLogger(__name__)
# Beside our own settings, of which only these may change: what is checked in other ways, and what no sample depends on.
_DEFINING = ("seed", "bf16", "fp16", "optim")
_FREE = (
    "allow_changes model_init_kwargs task_weights reward_weights prompt_column prompt_cache_size prompt_batch_size "
    "offload_text_encoders offload_teachers num_eval_images num_grid_prompts save_curves reward_workers reward_timeout"
).split()
_NOT_TOLD = tuple(
    "allow_changes model_init_kwargs output_dir logging_dir report_to run_name hub_ push_to_hub use_cpu disable_tqdm "
    "dataloader resume_from_checkpoint project trackio local_rank log_ ddp_ accelerator_config do_ no_cuda".split()
)
# What may be other where a run is only finished
_OF_THE_END = (
    *"max_steps num_train_epochs save_ eval_ logging_ per_device_eval greater_is_better metric_for load_best".split(),
    *_FREE,
)
TRAJECTORY_KEY = "trajectory"  # in the provenance
_ROUND, _PROMPTS = "images_per_round", "prompts"


def defining_settings(config: type[TrainingArguments]) -> list[str]:
    """The settings that define the course of a run: ours, with those of the method, and a few of transformers'."""
    theirs = {field.name for field in fields(TrainingArguments)}
    ours = [field.name for field in fields(config) if field.name not in theirs and field.name not in _FREE]
    return [*_DEFINING, *(name for name in ours if not name.startswith("eval_"))]


def check_allow_changes(args: TrainingArguments) -> None:
    """Raises a `ValueError` if `allow_changes` names what is not checked when a run is resumed."""
    known = [*defining_settings(type(args)), _ROUND, _PROMPTS]
    names = args.allow_changes or []
    if isinstance(names, str) or (unknown := [name for name in names if name not in known]):
        wrong = names if isinstance(names, str) else unknown
        raise ValueError(f"`allow_changes` must be a list of names out of {', '.join(known)}, but holds {wrong!r}.")


def describe_trajectory(datasets: Mapping[str, Prompts], args: TrainingArguments) -> dict[str, Any]:
    """
    What defines the course of a run, to be kept in each checkpoint.

    Args:
        datasets (`Mapping[str, Prompts]`):
            Prompts of each task.
        args ([`DiffusionConfig`]):
            Settings of the run.

    Returns:
        `dict`: the settings that define it; `"prompts"`, the SHA-256 of those of each task (of the first row of a
        stream); and `"images_per_round"`, of a task of weight 1. The number of processes does not matter in itself.
    """
    content = {name: getattr(args, name) for name in defining_settings(type(args))}
    content[_ROUND] = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    content[_PROMPTS] = {task: _fingerprint(data, args.prompt_column) for task, data in datasets.items()}
    return json.loads(dump_json(content))


def _fingerprint(data: Prompts, prompt_column: str) -> str:
    if isinstance(data, StreamedPrompts):
        columns = {name: [value] for name, value in data[0].items()}
    else:
        plain = [name for name, value in data[0].items() if is_plain(value)]
        columns = {name: data[name][:] for name in plain}
    digest = hashlib.sha256()
    for name in sorted(columns, key=lambda name: (name != prompt_column, name)):
        digest.update(json.dumps(["prompt" if name == prompt_column else name, columns[name]], default=str).encode())
    return digest.hexdigest()


def check_trajectory(folder: str | Path, trajectory: dict[str, Any], allowed: list[str] | None) -> None:
    """
    Checks that a run goes on as it was going when a checkpoint was saved.

    Args:
        folder (`str` or `Path`):
            The checkpoint.
        trajectory (`dict`):
            What [`describe_trajectory`] returns.
        allowed (`list[str]`, *optional*):
            What of it may be other.

    Raises:
        `ResumeError`: something else is other.
    """
    saved = read_notes(folder, TRAJECTORY_KEY)
    changes = [
        f"other prompts of {', '.join(_differing(saved[name], now)) or 'its tasks'}"
        if name == _PROMPTS
        else f"{name} {saved[name]!r} (now {now!r})"
        for name, now in trajectory.items()
        if name in saved and saved[name] != now and name not in (allowed or [])
    ]
    if changes:
        raise ResumeError(
            f"The checkpoint {str(folder)!r} was saved with {', '.join(changes)}. This defines the course of a run: resume "
            "with the saved values, name in `allow_changes` what is to change, or start a new run in another "
            "`output_dir`."
        )


def check_changes(
    folder: str | Path, trajectory: dict[str, Any], settings: dict[str, Any], *, at_end: bool, tell: bool
) -> None:
    """
    Looks for what is other than in the run that saved a checkpoint, of its trajectory and its settings, and logs it in one
    line if `tell`.

    Raises:
        `ResumeError`: the run is at its end, where such a setting has no effect any more but would be told on the card.
    """
    saved = {**read_json(folder, TRAINING_ARGS_FILE), **read_notes(folder, TRAJECTORY_KEY)}
    now = {**json.loads(dump_json(settings)), **trajectory}
    changes = [
        name if name == _PROMPTS else f"{name} {saved[name]!r} -> {now[name]!r}"
        for name in sorted(saved.keys() & now.keys())
        if saved[name] != now[name] and not name.startswith(_NOT_TOLD)
    ]
    if at_end and (idle := [change for change in changes if not change.startswith(_OF_THE_END)]):
        raise ResumeError(
            f"The run of {str(folder)!r} is at its end, where other settings change nothing any more: {', '.join(idle)}. "
            "Resume with those of the run, or train further with a larger `max_steps`."
        )
    if changes and tell:
        logger.warning(f"The run goes on from {str(folder)!r} with other settings: {', '.join(changes)}.")


def _differing(first: Any, second: dict[str, Any]) -> list[str]:
    return [name for name in second if not isinstance(first, dict) or first.get(name) != second[name]]
