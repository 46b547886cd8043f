# SPDX-License-Identifier: Apache-2.0
"""Tiny distillation runs of any model family, and the images of its stock pipeline."""

import os
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig

from tests.support.tiny_families import family_pipeline
from trl_diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer
from trl_diffusion_opd.lora.adapters import save_lora
from trl_diffusion_opd.models.packing import pack
from trl_diffusion_opd.models.registry import family_of


LENGTH = 48  # of a prompt in tokens, with the template
PROMPTS = {
    "count": ["a red circle", "two blue square and a green star on a dark sky"],
    "scene": ["a boat", "a tree in the city at night"],
}
SETTINGS = {
    "per_device_train_batch_size": 2,
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "max_sequence_length": LENGTH,
    "height": 16,
    "width": 16,
    "learning_rate": 0.02,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "num_grid_prompts": 0,
    "save_curves": False,
    "disable_tqdm": True,
    "use_cpu": True,
}


def make_family_teacher(name: str, folder: Path, seed: int) -> str:
    """A LoRA teacher for a tiny pipeline, on the modules that the family's LoRAs have."""
    pipe = family_pipeline(name)
    where = family_of(pipe).lora_options(pipe.transformer.config)
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, **where))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in pipe.transformer.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(std=0.3, generator=generator)
    save_lora(folder, pipe.transformer)
    return str(folder)


def make_family_trainer(name: str, folder: Path, *, model=None, **settings) -> DiffusionOPDTrainer:
    rank = os.environ.get("RANK", "0")  # each process writes its own
    return DiffusionOPDTrainer(
        model=model or family_pipeline(name),
        teachers={
            task: make_family_teacher(name, folder / f"{task}_{rank}", seed) for seed, task in enumerate(PROMPTS)
        },
        args=DiffusionOPDConfig(output_dir=str(folder / "out"), **{**SETTINGS, **settings}),
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS,
        peft_config={"r": 4, "lora_alpha": 8},
    )


def run_round(trainer: DiffusionOPDTrainer) -> None:
    """Accumulates the gradient of the first round, without an optimizer step."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    trainer.training_step(trainer.model, {"micro_round": 0})


def student(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.transformer.named_parameters() if ".default." in n}


def stock_images(
    pipe: DiffusionPipeline,
    prompts: list[str],
    noise: torch.Tensor,
    num_steps: int,
    guidance_scale: float,
    *,
    length: int = LENGTH,
    width: int = 16,
) -> torch.Tensor:
    """What diffusers' own pipeline draws from the same noise, of shape `[B, 3, H, W]`."""
    if type(pipe).__name__ in ("FluxPipeline", "QwenImagePipeline"):
        noise = pack(noise)
    return pipe(
        prompt=list(prompts),
        latents=noise,
        height=16,
        width=width,
        num_inference_steps=num_steps,
        output_type="pt",
        **family_of(pipe).call_arguments(guidance_scale, length),
    ).images
