# SPDX-License-Identifier: Apache-2.0
"""Write JSON, and leave out of it what is nobody else's business: paths of this machine and credentials."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


# The settings whose text may leave the machine (cards, records, loggers). Of all others only numbers, `True`, `False`
# and `None` do: a setting that is not known to be harmless, such as one of a subclass, may hold a password.
_PUBLIC_TEXT = frozenset(
    """
    output_dir lr_scheduler_type optim optim_target_modules torch_compile_backend torch_compile_mode logging_strategy
    include_num_input_tokens_seen log_level log_level_replica report_to project eval_strategy include_for_metrics
    save_strategy hub_model_id hub_strategy hub_revision metric_for_best_model dataloader_multiprocessing_context
    label_names train_sampling_strategy length_column_name ddp_backend debug resume_from_checkpoint solver
    prompt_column scale_rewards loss_type
    """.split()
)
# The settings that are mappings whose keys are ours, upstream's or names of tasks, with values that are numbers.
_PUBLIC_MAPPINGS = frozenset(
    """
    lr_scheduler_kwargs activation_checkpointing_kwargs gradient_checkpointing_kwargs liger_kernel_config
    accelerator_config task_weights
    """.split()
)
# Of `model_init_kwargs`, what says which weights were loaded; the rest (`token`, `proxies`, ...) says how.
_PUBLIC_INIT_KWARGS = frozenset({"revision", "variant", "dtype", "torch_dtype", "use_safetensors"})


def is_absolute(value: Any) -> bool:
    """Whether a value is the path of a place on this machine, which names the machine or its user."""
    return isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~"))


def without_paths(content: Any) -> Any:
    """JSON-like content with the last part alone of every absolute path, which would name a machine or a user."""
    if isinstance(content, dict):
        return {key: without_paths(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_paths(value) for value in content]
    return Path(content).name if is_absolute(content) else content


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """
    The settings of a run that may be shown to anybody: an allow-list.

    Args:
        settings (`Mapping[str, Any]`):
            Settings by name, as [`~transformers.TrainingArguments.to_dict`] gives them.

    Returns:
        `dict[str, Any]`: numbers, `True`, `False` and `None` under any name; text, and lists of it, under the names
        that are known to hold no credentials, with the last part alone of absolute paths; mappings whose keys are
        known, with the numbers in them; and of `model_init_kwargs` what tells which weights were loaded.
    """
    shown = {}
    for name, value in settings.items():
        if name == "model_init_kwargs" and isinstance(value, Mapping):
            known = {key: item for key, item in value.items() if key in _PUBLIC_INIT_KWARGS}
            shown[name] = {key: item for key, item in known.items() if _is_plain(item) and not is_absolute(item)}
        elif name in _PUBLIC_MAPPINGS and isinstance(value, Mapping):
            shown[name] = {key: item for key, item in value.items() if _is_number(item)}
        elif isinstance(value, (list, tuple)) and all(map(_is_number, value)):
            shown[name] = list(value)
        elif name in _PUBLIC_TEXT and isinstance(value, (list, tuple)) and all(map(_is_plain, value)):
            shown[name] = without_paths(list(value))
        elif _is_number(value) or (name in _PUBLIC_TEXT and isinstance(value, str)):
            shown[name] = without_paths(value)
    return shown


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float))


def _is_plain(value: Any) -> bool:
    return _is_number(value) or isinstance(value, str)


def dump_json(content: Any, *, sort_keys: bool = True, ensure_ascii: bool = True) -> str:
    """JSON as all files of this package have it: two spaces, a line feed at the end, what JSON lacks as text."""
    return json.dumps(content, indent=2, sort_keys=sort_keys, ensure_ascii=ensure_ascii, default=str) + "\n"


def write_text(file: str | Path, text: str) -> Path:
    """Writes a file whole or not at all: a process that is killed leaves the old one, or none."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)
    return file


def write_json(file: str | Path, content: Any, **options: bool) -> Path:
    """[`dump_json`] into a file, by [`write_text`]."""
    return write_text(file, dump_json(content, **options))
