# SPDX-License-Identifier: Apache-2.0
"""Tiny distillation runs shared by the trainer's tests: real components, two teachers in both LoRA formats."""

from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig

from tests.support.tiny import random_lora, save_diffusers_lora, save_peft_lora, tiny_pipeline
from trl_diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer, TeacherConfig
from trl_diffusion_opd.data.rounds import TaskBatch


PROMPTS = {
    "count": ["a red circle", "two blue squares", "three green circles", "one red square", "two yellow circles"],
    "scene": ["a boat at night", "a house at noon", "a tree at dawn"],
}

SAVING_RUN = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


def make_teachers(folder: Path, scale: float = 0.1, **overrides) -> dict:
    """Two teachers on disk: `count` in the diffusers format, `scene` in PEFT's with another rank, without guidance."""
    save_diffusers_lora(folder / "count", *random_lora(seed=1, scale=scale))
    save_peft_lora(folder / "scene", *random_lora(rank=2, alpha=3, seed=2, scale=scale))
    teachers = {"count": str(folder / "count"), "scene": TeacherConfig(str(folder / "scene"), guidance_scale=1.0)}
    return {**teachers, **overrides}


def make_config(folder: Path, **overrides) -> DiffusionOPDConfig:
    settings = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "max_steps": 3,
        "num_inference_steps": 4,
        "guidance_scale": 2.0,
        "max_sequence_length": 16,
        "learning_rate": 0.01,  # large, so that a few steps move the weights measurably
        "logging_steps": 1,
        "save_strategy": "no",
        "num_grid_prompts": 0,
        "save_curves": False,
        "disable_tqdm": True,
        "use_cpu": True,
        **overrides,
    }
    return DiffusionOPDConfig(**settings)


def make_trainer(folder: Path, *, teachers=None, pipeline=None, peft_config=None, data=None, **settings):
    """A trainer on the tiny pipeline; `settings` are fields of the config or arguments of the trainer."""
    arguments = {
        name: settings.pop(name)
        for name in ("eval_dataset", "reward_funcs", "callbacks", "optimizers", "student_prompt")
        if name in settings
    }
    return DiffusionOPDTrainer(
        model=pipeline or tiny_pipeline(),
        teachers=teachers or make_teachers(folder),
        args=make_config(folder, **settings),
        train_dataset=data or PROMPTS,
        peft_config=peft_config or small_lora(),
        **arguments,
    )


def small_lora(**overrides) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian", "target_modules": ["attn.to_q", "attn.to_v"]}
    return LoraConfig(**{**settings, **overrides})


def student_state(trainer: DiffusionOPDTrainer) -> dict[str, torch.Tensor]:
    """The student's LoRA tensors, copied."""
    return {
        name: parameter.detach().clone()
        for name, parameter in trainer.transformer.named_parameters()
        if ".default." in name
    }


def stock_images(lora: str | Path, batch: TaskBatch, noise: torch.Tensor, num_inference_steps: int) -> torch.Tensor:
    """What diffusers' own pipeline draws with a LoRA from the same noise."""
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(lora), weight_name="pytorch_lora_weights.safetensors")
    return StableDiffusion3Pipeline.__call__(
        pipe,
        batch.prompts,
        latents=noise,
        num_inference_steps=num_inference_steps,
        guidance_scale=2.0,
        max_sequence_length=16,
        height=16,
        width=16,
        output_type="pt",
    ).images
