# SPDX-License-Identifier: Apache-2.0
"""What a run is going to do and to need, told before it starts."""

import math
from typing import TYPE_CHECKING

from torch import nn

from .disk import checkpoint_bytes, format_bytes


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
    estimate = memory_estimate(trainer)
    encoding = estimate["transformer and teachers"] + _bytes(*_text_encoders(trainer))
    peak = max(sum(estimate.values()), encoding)
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
        f"memory     about {format_bytes(peak)} per process; during rounds: "
        + ", ".join(f"{name} {format_bytes(size)}" for name, size in estimate.items())
        + f"; while prompts are encoded: {format_bytes(encoding)}",
        f"disk       {format_bytes(checkpoint_bytes(trainer))} per checkpoint in {args.output_dir}",
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
    _, height, width = trainer.latent_shape
    tokens = height * width // config.patch_size**2 + trainer.pipeline.tokenizer_max_length + args.max_sequence_length
    rows = args.per_device_train_batch_size * (2 if args.guidance_scale > 1 else 1)
    bytes_each = 2 if args.bf16 or args.fp16 else 4
    hidden = rows * tokens * config.num_attention_heads * config.attention_head_dim * bytes_each
    kept = config.num_layers + 20 if args.activation_checkpointing else 20 * config.num_layers
    return {
        "transformer and teachers": _bytes(
            trainer.transformer, *(t.model for t in trainer.loaded_teachers.values() if t.model is not None)
        ),
        "gradients, AdamW, average": 4 * _count(trainable) * (4 if trainer.ema is not None else 3),
        "text encoders": 0 if args.offload_text_encoders else _bytes(*_text_encoders(trainer)),
        "activations": hidden * kept,
    }


def _trainable(trainer: "DiffusionOPDTrainer") -> list[nn.Parameter]:
    return [parameter for parameter in trainer.transformer.parameters() if parameter.requires_grad]


def _count(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _text_encoders(trainer: "DiffusionOPDTrainer") -> list[nn.Module]:
    pipe = trainer.pipeline
    return [m for m in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3) if m is not None]


def _bytes(*modules: nn.Module) -> int:
    """Size of parameters and buffers (the position embedding of SD3 is a large one)."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
