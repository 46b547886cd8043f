# SPDX-License-Identifier: Apache-2.0
"""Check before training that what the run is going to write can be written, and save the LoRA elsewhere if it could not."""

import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import nn
from transformers import TrainingArguments

from ..lora.ema import StudentEMA
from ..utils.files import written_whole
from ..utils.hardware import format_bytes
from .checkpoints import list_checkpoints


class SaveError(OSError):
    """Something of a run could not be written. The message says where the LoRA was saved instead."""


class SavedRun(Protocol):
    """What has to be known of a run to tell how much it is going to write."""

    args: TrainingArguments
    transformer: nn.Module  # with the student's LoRA as its trainable parameters
    ema: StudentEMA | None
    num_kept_policies: int  # LoRAs in a checkpoint beside the student and its average
    planned_steps: int
    first_step: int


def lora_bytes(run: SavedRun) -> int:
    """Size of the student's LoRA, with its average if there is one."""
    count = sum(parameter.numel() for parameter in run.transformer.parameters() if parameter.requires_grad)
    return 4 * count * (2 if run.ema is not None else 1)


def checkpoint_bytes(run: SavedRun) -> int:
    """Size of a checkpoint: weights, their average, two moments of AdamW, and what else the method keeps."""
    count = sum(parameter.numel() for parameter in run.transformer.parameters() if parameter.requires_grad)
    return lora_bytes(run) + 4 * count * (2 + run.num_kept_policies)


def num_checkpoints(run: SavedRun) -> int:
    """How many checkpoints a run adds to those in its folder at most, before `save_total_limit` has old ones removed."""
    args = run.args
    steps = max(0, run.planned_steps - run.first_step)
    intervals = {"steps": args.save_steps, "best": args.eval_steps or args.logging_steps}
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return 0
    interval = intervals.get(strategy, run.planned_steps / max(1, math.ceil(args.num_train_epochs)))
    if strategy == "steps" and interval < 1:  # a share of the run
        interval = max(1, math.ceil(interval * run.planned_steps))
    number = math.ceil(steps / max(1, interval))
    if args.save_total_limit:
        there = len(list_checkpoints(args.output_dir)) if run.first_step else 0
        number = min(number, max(1, args.save_total_limit + 1 - there))
    return number


def check_disk(run: SavedRun) -> None:
    """
    Raises an `OSError` if the output folder's disk cannot hold what the run is going to write: all of its checkpoints, or
    with `save_total_limit` that many and the one being written, and the LoRA.
    """
    args = run.args
    if not args.should_save:  # the other processes write next to nothing
        return
    number = num_checkpoints(run)
    needed = checkpoint_bytes(run) * number + lora_bytes(run)
    free = shutil.disk_usage(Path(args.output_dir)).free
    if free < needed:
        need = f"checkpoints need {format_bytes(needed)} ({number} of them and the LoRA)"
        raise OSError(
            f"`output_dir` {args.output_dir!r} is on a disk with {format_bytes(free)} free, but "
            + (need if number else f"the LoRA needs {format_bytes(needed)}")
            + ". Free some, or choose another `output_dir`"
            + (", or set or lower `save_total_limit`." if number > 1 else ".")
        )


def save_elsewhere(output_dir: str | Path, save: Callable[[Path], None]) -> str:
    """
    Saves something that could not be saved into a folder: beside it, or else among the temporary files.

    Args:
        output_dir (`str` or `Path`):
            The folder.
        save (`Callable`):
            Writes into the folder that it is given.

    Returns:
        `str`: a sentence that says where it is.
    """
    home = Path(output_dir).absolute()
    for parent in (home.parent, Path(tempfile.gettempdir())):
        folder = None
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"{home.name}-rescued-", dir=parent))
            with written_whole(folder) as staging:
                save(staging)
            return f"The LoRA as it is now was saved to {str(folder)!r} instead."
        except Exception:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
    return "The LoRA could not be saved elsewhere either."
