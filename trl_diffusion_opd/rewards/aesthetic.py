# SPDX-License-Identifier: Apache-2.0
"""Aesthetic: LAION's predictor of how people rate an image, whatever the prompt."""

from pathlib import Path
from typing import Any

import torch

from .base import Reward
from .models import ScoreHead, features, find_file, load_pretrained, read_weights
from .preprocessing import clip_pixels, to_pil


class AestheticReward(Reward):
    """
    The improved aesthetic predictor: a linear head on the image embedding of OpenAI's CLIP, about 4 to 7.

    The head is published as a pickle only. It is read with `torch.load(weights_only=True)`, which runs no code.

    Args:
        model_name_or_path (`str` or `Path`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            The CLIP: a local folder or `owner/name[@revision]`.
        predictor_name_or_path (`str` or `Path`, *optional*, defaults to `"trl-lib/ddpo-aesthetic-predictor"`):
            The head: a local file (`.pth` or `.safetensors`), or a folder or `owner/name[@revision]` with an
            `aesthetic-model.pth`. The first publication calls the file `sac+logos+ava1-l14-linearMSE.pth`.
        kwargs:
            `device`, `dtype` and `batch_size` of [`~rewards.base.Reward`].
    """

    name = "aesthetic"

    def __init__(
        self,
        *,
        model_name_or_path: str | Path = "openai/clip-vit-large-patch14",
        predictor_name_or_path: str | Path = "trl-lib/ddpo-aesthetic-predictor",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.model_name_or_path = model_name_or_path
        self.predictor_name_or_path = predictor_name_or_path

    def load_models(self) -> dict[str, Any]:
        from transformers import CLIPModel

        clip = load_pretrained(CLIPModel, self.model_name_or_path, "aesthetic", dtype=self.dtype)
        del clip.text_model, clip.text_projection  # a third of the memory, not needed
        head = ScoreHead(clip.config.projection_dim)
        head.load_state_dict(read_weights(find_file(self.predictor_name_or_path, "aesthetic-model.pth", "aesthetic")))
        return {"clip": clip, "head": head}

    def score(self, images: torch.Tensor, prompts: list[str]) -> list[float]:
        clip, head = self.models["clip"], self.models["head"]
        pixels = clip_pixels(to_pil(images), clip.config.vision_config.image_size)
        embeddings = features(clip.get_image_features(pixels.to(clip.device, clip.dtype)))
        return head(embeddings.to(clip.dtype)).tolist()
