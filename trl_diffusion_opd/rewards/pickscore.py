# SPDX-License-Identifier: Apache-2.0
"""PickScore: a CLIP trained on people's choices between two images of one prompt."""

from pathlib import Path
from typing import Any

import torch

from .base import Reward
from .models import cosines, load_pretrained
from .preprocessing import clip_pixels, to_pil


class PickScoreReward(Reward):
    """
    PickScore (https://huggingface.co/papers/2305.01569) divided by 26: about 0.86 for good images, where published
    tables print about 22.3.

    Args:
        model_name_or_path (`str` or `Path`, *optional*, defaults to `"yuvalkirstain/PickScore_v1"`):
            The CLIP: a local folder or `owner/name[@revision]`.
        tokenizer_name_or_path (`str` or `Path`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            The tokenizer, in the same form.
        kwargs:
            `device`, `dtype` and `batch_size` of [`~rewards.base.Reward`].
    """

    name = "pickscore"
    table_factor = 26.0

    def __init__(
        self,
        *,
        model_name_or_path: str | Path = "yuvalkirstain/PickScore_v1",
        tokenizer_name_or_path: str | Path = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.model_name_or_path = model_name_or_path
        self.tokenizer_name_or_path = tokenizer_name_or_path

    def load_models(self) -> dict[str, Any]:
        from transformers import AutoTokenizer, CLIPModel

        clip = load_pretrained(CLIPModel, self.model_name_or_path, "pickscore", dtype=torch.float32)
        return {
            "clip": clip,
            "scale": clip.logit_scale.exp().item(),  # not in `dtype`: bfloat16 takes 1 % from it
            "tokenizer": load_pretrained(
                AutoTokenizer, self.tokenizer_name_or_path, "pickscore", probe="tokenizer_config.json"
            ),
        }

    def score(self, images: torch.Tensor, prompts: list[str]) -> list[float]:
        clip = self.models["clip"]
        pixels = clip_pixels(to_pil(images), clip.config.vision_config.image_size)
        raw = self.models["scale"] * cosines(clip, self.models["tokenizer"], pixels, prompts)
        return (raw / self.table_factor).tolist()
