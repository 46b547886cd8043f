# SPDX-License-Identifier: Apache-2.0
"""Settings of transformers that a LoRA student cannot be trained with, and weights of tasks."""

import os
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments


def check_supported(args: TrainingArguments) -> None:
    """Raises a `ValueError` for settings of transformers that are not supported, with what to do instead."""
    # `accelerate launch` tells of them by the environment, the command line by fields
    sharded = [flag for flag in ("DEEPSPEED", "FSDP") if os.environ.get(f"ACCELERATE_USE_{flag}") == "true"]
    if args.deepspeed or args.fsdp or sharded:
        raise ValueError(
            "DeepSpeed and FSDP are not supported: the student is a LoRA, whose optimizer state is small. Launch "
            "with plain data parallelism (`accelerate launch --multi_gpu`)."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "`auto_find_batch_size` is not supported: the samples of a round follow from "
            "`per_device_train_batch_size`. Lower it, and raise `gradient_accumulation_steps` for the same rounds."
        )
    if args.bf16_full_eval or args.fp16_full_eval:
        raise ValueError(
            "`bf16_full_eval` and `fp16_full_eval` are not supported: evaluation runs in the precision of training. "
            "Set `bf16` or `fp16`."
        )


def check_task_weights(task_weights: Mapping[str, Any]) -> None:
    """Raises a `ValueError` unless each weight is a whole number of batches."""
    for task, weight in task_weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int) or weight < 1:
            raise ValueError(
                f"`task_weights[{task!r}]` must be a whole number of batches, at least 1, but is {weight!r}. "
                "Scale the weights up to whole numbers, or leave the task out of the run."
            )
