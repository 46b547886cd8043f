# SPDX-License-Identifier: Apache-2.0
"""A tiny stand-in for a larger base of the same latents and text encoders, and LoRAs that were trained on it."""

from pathlib import Path

from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from tests.support.tiny import random_lora, save_diffusers_lora, tiny_pipeline, tiny_transformer
from trl_diffusion_opd import TeacherConfig


def large_transformer(seed: int = 9) -> SD3Transformer2DModel:
    return tiny_transformer(seed=seed, num_layers=3)


def large_pipeline(seed: int = 9) -> StableDiffusion3Pipeline:
    pipeline = tiny_pipeline()
    pipeline.register_modules(transformer=large_transformer(seed))
    return pipeline


def save_large(folder: Path, seed: int = 9) -> Path:
    """Saves the larger base as `large` and two LoRAs on it as `large_count` and `large_scene`."""
    large_pipeline(seed).save_pretrained(folder / "large")
    for number, name in enumerate(("count", "scene"), start=1):
        lora = random_lora(large_transformer().config, seed=number, targets=["attn.to_q", "attn.to_v"])
        save_diffusers_lora(folder / f"large_{name}", *lora)
    return folder


def large_teachers(folder: Path, base: str = "large") -> dict[str, TeacherConfig]:
    """Two LoRA teachers on the larger base, which [`save_large`] saved."""
    return {
        "count": TeacherConfig(folder / "large_count", base=folder / base),
        "scene": TeacherConfig(folder / "large_scene", base=str(folder / base), guidance_scale=1.0),
    }
