# SPDX-License-Identifier: Apache-2.0
"""Check free disk space before training."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.hardware import format_bytes


if TYPE_CHECKING:
    from .base_trainer import DiffusionTrainer


def checkpoint_bytes(trainer: "DiffusionTrainer") -> int:
    """Size of a checkpoint: weights, their average, two moments of AdamW, and what else the method keeps."""
    count = sum(parameter.numel() for parameter in trainer.transformer.parameters() if parameter.requires_grad)
    return 4 * count * ((4 if trainer.ema is not None else 3) + trainer.num_kept_policies)


def check_disk(trainer: "DiffusionTrainer") -> None:
    """
    Raises an `OSError` if the output folder's disk cannot hold what the run is going to write.

    With `save_total_limit` that many checkpoints and the one being written; else two, the least to make any sense.
    """
    args = trainer.args
    if args.save_strategy == "no" or not args.should_save:  # the other processes write next to nothing
        return
    needed = checkpoint_bytes(trainer) * ((args.save_total_limit or 1) + 1)
    free = shutil.disk_usage(Path(args.output_dir)).free
    if free < needed:
        raise OSError(
            f"`output_dir` {args.output_dir!r} is on a disk with {format_bytes(free)} free, but checkpoints need "
            f"{format_bytes(needed)}. Free some, choose another `output_dir`, or lower `save_total_limit`."
        )
