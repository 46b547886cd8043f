# SPDX-License-Identifier: Apache-2.0
"""Find, check and set aside the checkpoints of a run."""

import json
import logging
import os
import re
import shutil
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..hub.locations import DIFFUSERS_WEIGHT_NAME
from ..lora.files import read_lora
from ..publishing.push import RAW_WEIGHT_NAME, TRAINING_ARGS_FILE
from ..utils.files import STAGING_FOLDER, recover_folders, written_whole


logger = logging.getLogger(__name__)
PROVENANCE_FILE = "provenance.json"
SOURCES_KEY = "sources"  # in the provenance
RUN_ID_FILE = "run_id"
CHECKPOINT_STAGING_FOLDER = "_staging"
_FILES = (
    DIFFUSERS_WEIGHT_NAME,
    PROVENANCE_FILE,
    TRAINING_ARGS_FILE,
    OPTIMIZER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
)


class ResumeError(ValueError):
    """A run cannot be resumed from a checkpoint."""


def checkpoint_step(folder: Path) -> int:
    """The step in the name of a checkpoint, -1 of any other folder."""
    match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
    return int(match[1]) if match else -1


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-N` folders, by step."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    return sorted((path for path in found if checkpoint_step(path) >= 0), key=checkpoint_step)


def read_run_id(folder: str | Path) -> str:
    """The run that an `output_dir` or a checkpoint belongs to; empty if it does not say."""
    path = Path(folder) / RUN_ID_FILE
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The last checkpoint of the run that an `output_dir` belongs to; `None` if it has none."""
    run = read_run_id(output_dir)
    return next((path for path in reversed(list_checkpoints(output_dir)) if read_run_id(path) == run), None)


def find_checkpoint(resume_from_checkpoint: str | Path | bool | None, output_dir: str | Path) -> Path | None:
    """
    The checkpoint to resume from.

    Args:
        resume_from_checkpoint (`str`, `Path` or `bool`, *optional*):
            Its path, or `True` (or `"true"`) for the last one of `output_dir`'s run.
        output_dir (`str` or `Path`):
            The folder of the run.

    Returns:
        `Path` or `None`: the checkpoint; `None` if a new run is to be started.
    """
    wanted = str(resume_from_checkpoint).lower()
    if resume_from_checkpoint is None or wanted == "false":
        return None
    return last_checkpoint(output_dir) if wanted == "true" else Path(resume_from_checkpoint)


def clean_up(output_dir: Path) -> None:
    """Ends or removes what a killed process has left half done."""
    recover_folders(output_dir)
    for name in (STAGING_FOLDER, CHECKPOINT_STAGING_FOLDER):
        shutil.rmtree(output_dir / name, ignore_errors=True)


def begin_run(output_dir: str | Path, resume_from_checkpoint: str | Path | bool | None) -> tuple[str | None, str]:
    """
    Makes an `output_dir` that of one run: a new one, or the one that is resumed. The checkpoints of other runs, and those
    that lie behind the one to resume from, are moved aside, so that nothing ever takes or removes them by mistake.

    Args:
        output_dir (`str` or `Path`):
            The folder, which no other process writes into.
        resume_from_checkpoint (`str`, `Path` or `bool`, *optional*):
            As of [`find_checkpoint`].

    Returns:
        `tuple[str | None, str]`: the checkpoint to resume from, if any, and the id of the run.

    Raises:
        `ResumeError`: the checkpoint to resume from cannot be resumed from.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    clean_up(output_dir)
    checkpoint = find_checkpoint(resume_from_checkpoint, output_dir)
    if checkpoint is None:
        if str(resume_from_checkpoint).lower() == "true":
            logger.warning(
                f"There is no checkpoint of this run in {str(output_dir)!r} to resume from: it starts anew."
            )
        run, last = uuid.uuid4().hex, -1
    else:
        check_files(checkpoint)
        run, last = read_run_id(checkpoint), read_step(checkpoint)
    others = [
        path for path in list_checkpoints(output_dir) if read_run_id(path) != run or checkpoint_step(path) > last
    ]
    _set_aside(output_dir, [path for path in others if checkpoint is None or not path.samefile(checkpoint)])
    if read_run_id(output_dir) != run:
        with written_whole(output_dir) as staging:
            write_run_id(staging, run)
    return None if checkpoint is None else str(checkpoint), run


def write_run_id(folder: Path, run: str) -> None:
    (folder / RUN_ID_FILE).write_text(f"{run}\n", encoding="utf-8")


def _set_aside(output_dir: Path, checkpoints: list[Path]) -> None:
    if not checkpoints:
        return
    taken = {path.name for path in output_dir.glob("earlier_run_*")}
    folder = next(output_dir / name for n in range(1, len(taken) + 2) if (name := f"earlier_run_{n}") not in taken)
    folder.mkdir()
    for path in checkpoints:
        os.replace(path, folder / path.name)
    names = ", ".join(path.name for path in checkpoints)
    logger.warning(
        f"{names} in {str(output_dir)!r} are not of the run that begins: moved to {str(folder)!r}. Nothing removes them."
    )


# Checks


def check_files(folder: str | Path) -> None:
    """
    Checks that a folder is a checkpoint that training can be resumed from, without loading what is in it.

    Args:
        folder (`str` or `Path`):
            The checkpoint.

    Raises:
        `ResumeError`: a file is missing or damaged; the message names it.
    """
    folder = Path(folder)
    for file in _FILES:
        # Upstream starts the optimizer afresh without a word if its file is missing.
        if not (folder / file).is_file():
            raise ResumeError(
                f"There is no checkpoint in {str(folder)!r}: it has no {file!r}. Pass a `checkpoint-N` folder of an "
                "earlier run's `output_dir`, saved without `save_only_model`."
            )
    for file in (OPTIMIZER_NAME, SCHEDULER_NAME):
        if not zipfile.is_zipfile(folder / file):  # as torch.save writes it
            raise ResumeError(_damaged(folder, file))
    read_step(folder)
    for file in (PROVENANCE_FILE, TRAINING_ARGS_FILE):
        read_json(folder, file)


def read_json(folder: str | Path, file: str) -> dict[str, Any]:
    """A JSON file of a checkpoint; a `ResumeError` if it is damaged."""
    try:
        content = json.loads((Path(folder) / file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResumeError(_damaged(folder, file)) from error
    if not isinstance(content, dict):
        raise ResumeError(_damaged(folder, file))
    return content


def read_notes(folder: str | Path, key: str) -> dict[str, Any]:
    """One of the mappings in the provenance of a checkpoint, empty if it has none; a `ResumeError` if it is damaged."""
    notes = read_json(folder, PROVENANCE_FILE).get(key, {})
    if not isinstance(notes, dict):
        raise ResumeError(_damaged(folder, PROVENANCE_FILE))
    return notes


def read_step(folder: str | Path) -> int:
    """The number of optimizer steps that a checkpoint was saved after."""
    step = read_json(folder, TRAINER_STATE_NAME).get("global_step")
    if not isinstance(step, int):
        raise ResumeError(_damaged(folder, TRAINER_STATE_NAME))
    return step


def check_student(folder: str | Path, config: LoraConfig, ema_decay: float | None) -> None:
    """
    Checks that a checkpoint holds a student of the run's shape.

    Args:
        folder (`str` or `Path`):
            The checkpoint.
        config ([`~peft.LoraConfig`]):
            LoRA of the run.
        ema_decay (`float`, *optional*):
            Whether the run keeps a moving average, and with which decay.

    Raises:
        `ResumeError`: the LoRA is damaged, has another shape, or there is a moving average in one of the two alone.
    """
    check_average(folder, ema_decay)
    names = [DIFFUSERS_WEIGHT_NAME] if ema_decay is None else [DIFFUSERS_WEIGHT_NAME, RAW_WEIGHT_NAME]
    for name in names:
        saved = read_lora(Path(folder) / name, owner=f"checkpoint {str(folder)!r}").config
        for option in ("r", "lora_alpha", "target_modules"):
            then, now = (_sorted(getattr(each, option)) for each in (saved, config))
            if then != now:
                raise ResumeError(
                    f"The checkpoint {str(folder)!r} was saved with another LoRA config: {option} {then} "
                    f"instead of {now}. Resume with the LoRA config of the saved run, or start a new "
                    "run in another `output_dir`."
                )


def check_sources(folder: str | Path, sources: Mapping[str, Any]) -> None:
    """
    Checks that a run is made from what it was made from when a checkpoint was saved, as far as that can be told before
    anything is loaded: only what both of them know is compared.

    Args:
        folder (`str` or `Path`):
            The checkpoint.
        sources (`Mapping[str, Any]`):
            What the run is made from.

    Raises:
        `ResumeError`: something is other.
    """
    saved = read_notes(folder, SOURCES_KEY)
    for name, now in json.loads(json.dumps(sources, default=str)).items():
        if name in saved and (differing := _differing(saved[name], now)):
            raise ResumeError(
                f"The checkpoint {str(folder)!r} belongs to a run with other {name}: {', '.join(differing)}. Resume with "
                f"the same {name}, or start a new run in another `output_dir`."
            )


def _differing(then: Any, now: Any) -> list[str]:
    """What is other, in words; of mappings, only what both of them have."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return [] if then == now else [f"{now!r} instead of {then!r}"]
    return [f"{key} {text}" for key in sorted(then.keys() & now.keys()) for text in _differing(then[key], now[key])]


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, list, tuple)) else value


def check_average(folder: str | Path, ema_decay: float | None) -> bool:
    """Whether a checkpoint holds a moving average; a `ResumeError` if the run has one and the checkpoint not, or vice versa."""
    averaged = (Path(folder) / RAW_WEIGHT_NAME).is_file()
    if averaged != (ema_decay is not None):
        raise ResumeError(
            f"The checkpoint {str(folder)!r} was saved {'with' if averaged else 'without'} a moving average, but "
            f"`ema_decay` is {ema_decay}. Resume with the settings of the saved run."
        )
    return averaged


def _damaged(folder: str | Path, file: str) -> str:
    return (
        f"The checkpoint {str(folder)!r} is damaged: its {file!r} cannot be read. Resume from an earlier one, or start a "
        "new run in another `output_dir`."
    )
