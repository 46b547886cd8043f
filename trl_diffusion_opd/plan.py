# SPDX-License-Identifier: Apache-2.0
"""What a run is going to do and to need, told before it starts."""

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn


if TYPE_CHECKING:
    from .opd_trainer import DiffusionOPDTrainer


def describe_plan(trainer: "DiffusionOPDTrainer") -> str:
    """Tasks, teachers, rounds and an estimate of the memory, as text."""
    args, sampler = trainer.args, trainer.sampler
    rounds = args.max_steps
    if rounds < 0:
        rounds = math.ceil(args.num_train_epochs * sampler.rounds_per_epoch)
    processes = args.world_size
    trained = len(trainer.schedule) - args.skip_last_steps
    objective = "mean matching, Eq. 12" if args.noise_level == 0 else "closed-form KL, Eq. 11"
    _, height, width = trainer.latent_shape
    factor = trainer.pipeline.vae_scale_factor
    rank = trainer.transformer.peft_config["default"].r
    lines = [
        f"base       {trainer.base_model or 'in memory'}, {width * factor}x{height * factor} px",
        f"student    LoRA of rank {rank}, {_count(_trainable(trainer)):,} parameters, guidance {args.guidance_scale:g}",
        "tasks",
    ]
    for task, teacher in trainer.loaded_teachers.items():
        held_out = len(trainer.eval_datasets.get(task, ()))
        kind = "full model" if teacher.model is not None else "LoRA"
        lines.append(
            f"  {task:<12} {len(trainer.datasets[task]):,} prompts ({held_out:,} held out), weight "
            f"{sampler.weights[task]}; teacher: {kind} {teacher.source}, guidance {teacher.guidance_scale:g}"
        )
    lines += [
        f"rollout    {len(trainer.schedule)} steps of {args.solver} at noise level {args.noise_level:g}, {trained} of "
        f"them trained ({objective})",
        f"rounds     {rounds:,} of {sampler.prompts_per_round * processes} images on {processes} process(es); "
        f"{sampler.rounds_per_epoch:,} rounds see every prompt once",
        f"memory     about {_size(sum(memory_estimate(trainer).values()))} per process: "
        + ", ".join(f"{name} {_size(size)}" for name, size in memory_estimate(trainer).items()),
        f"disk       {_size(checkpoint_bytes(trainer))} per checkpoint in {args.output_dir}",
    ]
    return "\n".join(lines)


def memory_estimate(trainer: "DiffusionOPDTrainer") -> dict[str, int]:
    """
    Bytes on the training device during rounds. Weights and optimizer state are exact; activations are estimated as
    what the transformer's blocks keep for the backward (about 20 hidden states each, or one with activation
    checkpointing, of which one block at a time is recomputed).
    """
    args, config = trainer.args, trainer.transformer.config
    trainable = _trainable(trainer)
    encoders = (trainer.pipeline.text_encoder, trainer.pipeline.text_encoder_2, trainer.pipeline.text_encoder_3)
    _, height, width = trainer.latent_shape
    tokens = height * width // config.patch_size**2 + 77 + args.max_sequence_length
    rows = args.per_device_train_batch_size * (2 if args.guidance_scale > 1 else 1)
    bytes_each = 2 if args.bf16 or args.fp16 else 4
    hidden = rows * tokens * config.num_attention_heads * config.attention_head_dim * bytes_each
    kept = config.num_layers + 20 if trainer.transformer.is_gradient_checkpointing else 20 * config.num_layers
    return {
        "transformer and teachers": _bytes(trainer.transformer)
        + sum(_bytes(teacher.model) for teacher in trainer.loaded_teachers.values() if teacher.model is not None),
        "gradients, AdamW, average": 4 * _count(trainable) * (4 if trainer.ema is not None else 3),
        "text encoders": 0 if args.offload_text_encoders else sum(_bytes(m) for m in encoders if m is not None),
        "activations": hidden * kept,
    }


def checkpoint_bytes(trainer: "DiffusionOPDTrainer") -> int:
    """Size of a checkpoint: weights, their average, two moments of AdamW."""
    return 4 * _count(_trainable(trainer)) * (4 if trainer.ema is not None else 3)


def check_disk(trainer: "DiffusionOPDTrainer") -> None:
    """
    Raises an `OSError` if the output folder's disk cannot hold what the run is going to write.

    With `save_total_limit` that many checkpoints and the one being written; else two, the least to make any sense.
    """
    args = trainer.args
    if args.save_strategy == "no":
        return
    needed = checkpoint_bytes(trainer) * ((args.save_total_limit or 1) + 1)
    free = shutil.disk_usage(Path(args.output_dir)).free
    if free < needed:
        raise OSError(
            f"`output_dir` {args.output_dir!r} is on a disk with {_size(free)} free, but checkpoints need "
            f"{_size(needed)}. Free some, choose another `output_dir`, or lower `save_total_limit`."
        )


def _trainable(trainer: "DiffusionOPDTrainer") -> list[nn.Parameter]:
    return [parameter for parameter in trainer.transformer.parameters() if parameter.requires_grad]


def _count(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
