# SPDX-License-Identifier: Apache-2.0
"""ClipScore: how well an image fits its text, by OpenAI's CLIP."""

from pathlib import Path
from typing import Any

import torch

from .base import Reward
from .models import cosines, load_pretrained
from .preprocessing import clip_pixels_bilinear


class ClipScoreReward(Reward):
    """
    The cosine between image and text, about 0.28. It is neither cut at 0 nor multiplied by 2.5, and it works on the
    floats of the image, bilinear, as the paper's numbers do.

    Args:
        model_name_or_path (`str` or `Path`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            The CLIP with its tokenizer: a local folder or `owner/name[@revision]`.
        kwargs:
            `device`, `dtype` and `batch_size` of [`~rewards.base.Reward`].
    """

    name = "clipscore"

    def __init__(self, *, model_name_or_path: str | Path = "openai/clip-vit-large-patch14", **kwargs: Any):
        super().__init__(**kwargs)
        self.model_name_or_path = model_name_or_path

    def load_models(self) -> dict[str, Any]:
        from transformers import AutoTokenizer, CLIPModel

        clip = load_pretrained(CLIPModel, self.model_name_or_path, "clipscore", dtype=torch.float32)
        return {
            "clip": clip,
            "scale": clip.logit_scale.exp().item() / 100,  # the published score is logits / 100
            "tokenizer": load_pretrained(
                AutoTokenizer, self.model_name_or_path, "clipscore", probe="tokenizer_config.json"
            ),
        }

    def score(self, images: torch.Tensor, prompts: list[str]) -> list[float]:
        clip = self.models["clip"]
        pixels = clip_pixels_bilinear(images, clip.config.vision_config.image_size)
        return (self.models["scale"] * cosines(clip, self.models["tokenizer"], pixels, prompts)).tolist()
