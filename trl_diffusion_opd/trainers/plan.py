# SPDX-License-Identifier: Apache-2.0
"""Summary of a run, printed by `--dry_run`."""

import math

from torch import nn

from ..data.rounds import Prompts, num_prompts
from ..models.family import PIXELS_AT_ONCE
from ..models.loading import STUDENT
from ..rewards.base import Reward
from ..utils.hardware import format_bytes, module_bytes
from .base_trainer import DiffusionTrainer
from .disk import checkpoint_bytes
from .method_plan import format_origin


def describe_plan(trainer: DiffusionTrainer) -> str:
    """Tasks, what they are learned from, rounds and an estimate of the memory, as text."""
    args, rounds_of, family, pipe = trainer.args, trainer.rounds, trainer.family, trainer.pipeline
    rounds = args.max_steps
    per_epoch = rounds_of.rounds_per_epoch
    if rounds < 0:
        rounds = math.ceil(args.num_train_epochs * per_epoch)
    processes = args.world_size
    trained = len(trainer.schedule) - trainer.args.skip_last_steps
    height, width = family.image_size(pipe, trainer.latent_shape)
    rank = trainer.transformer.peft_config[STUDENT].r
    method = trainer.plan()
    estimate = memory_estimate(trainer) | method.memory
    estimate["models"] += method.models
    encoding = estimate["models"] + module_bytes(*_text_encoders(trainer))
    judges = any(isinstance(reward, Reward) for funcs in trainer.reward_funcs.values() for reward in funcs)
    start = trainer.adapter_origin
    most = max(args.per_device_train_batch_size, args.per_device_eval_batch_size) * height * width
    at_once = min(most, max(PIXELS_AT_ONCE, height * width))
    decoding = (
        sum(estimate.values())
        - estimate["activations"]
        + module_bytes(pipe.vae)
        + family.decoding_bytes(pipe.vae, at_once)
    )
    peak = max(sum(estimate.values()), encoding, decoding)
    lines = [
        f"base       {format_origin(trainer.base_origin)}, {width}x{height} px",
        f"student    LoRA of rank {rank}, {_count(_trainable(trainer)):,} parameters, guidance {args.guidance_scale:g}"
        + (f", starts from {format_origin(start)}" if start else ""),
        "tasks",
    ]
    for task, source in method.tasks.items():
        held_out = _amount(trainer.eval_datasets[task]) if task in trainer.eval_datasets else "0"
        lines.append(
            f"  {task:<12} {_amount(trainer.datasets[task])} prompts ({held_out} held out), weight "
            f"{rounds_of.weights[task]}; {source}"
        )
    lines += [
        f"rollout    {len(trainer.schedule)} steps of {args.solver} at noise level {args.noise_level:g}, {trained} of "
        f"them trained ({method.objective})",
        *(f"{title:<10} {text}" for title, text in method.lines.items()),
        f"rounds     {rounds:,} of {rounds_of.prompts_per_round * processes} images on {processes} process(es)"
        + (f"; {per_epoch:,} rounds see every prompt once" if per_epoch else ""),
        f"memory     about {format_bytes(peak)} per process; during rounds: "
        + ", ".join(f"{name} {format_bytes(size)}" for name, size in estimate.items())
        + f"; while prompts are encoded: {format_bytes(encoding)}, while images are decoded: {format_bytes(decoding)}"
        + ("; without the models of the rewards" if judges else ""),
        f"disk       {format_bytes(checkpoint_bytes(trainer))} per checkpoint in {args.output_dir}",
    ]
    return "\n".join(lines)


def _amount(data: Prompts) -> str:
    total = num_prompts(data)
    return "streamed" if total is None else f"{total:,}"


def memory_estimate(trainer: DiffusionTrainer) -> dict[str, int]:
    """
    Bytes on the training device during rounds, without the other models of the method. Weights and optimizer state are
    exact; activations are estimated as what the transformer's blocks keep for the backward (`states_per_block` hidden
    states each, or one with activation checkpointing, of which one block at a time is recomputed).
    """
    args, family, pipe = trainer.args, trainer.family, trainer.pipeline
    trainable = _trainable(trainer)
    tokens = family.image_tokens(pipe, trainer.latent_shape) + family.text_tokens(pipe, args.max_sequence_length)
    blocks, block_width = family.blocks(trainer.transformer)
    rows = args.per_device_train_batch_size * (2 if family.needs_negative(args.guidance_scale) else 1)
    bytes_each = 2 if args.bf16 or args.fp16 else 4
    hidden = rows * tokens * block_width * bytes_each
    states = family.states_per_block
    kept = blocks + states if args.activation_checkpointing else states * blocks
    return {
        "models": module_bytes(trainer.transformer),
        "gradients, AdamW, average": 4 * _count(trainable) * (4 if trainer.ema is not None else 3),
        "text encoders": 0 if args.offload_text_encoders else module_bytes(*_text_encoders(trainer)),
        "activations": hidden * kept,
    }


def _trainable(trainer: DiffusionTrainer) -> list[nn.Parameter]:
    return [parameter for parameter in trainer.transformer.parameters() if parameter.requires_grad]


def _count(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _text_encoders(trainer: DiffusionTrainer) -> list[nn.Module]:
    encoders = (getattr(trainer.pipeline, name) for name in trainer.family.text_encoders)
    return [encoder for encoder in encoders if encoder is not None]
