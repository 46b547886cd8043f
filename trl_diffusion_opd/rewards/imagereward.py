# SPDX-License-Identifier: Apache-2.0
"""ImageReward: human preference by a BLIP that reads the prompt with the image in view. The parts of transformers."""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .base import Reward
from .models import ScoreHead, find_file, load_pretrained, read_weights
from .preprocessing import clip_pixels, to_pil


# Mean and standard deviation of the head's output over the authors' data.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
# In both towers, at every published size of ViT and BERT.
HEAD_SIZE = 64
# The names of the published weights -> those of `BlipVisionModel`; the names of the text tower are the same.
VISION_NAMES = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^blocks\.": "encoder.layers.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.attn\.proj\.": ".self_attn.projection.",
    r"\.norm([12])\.": r".layer_norm\1.",
    r"^norm\.": "post_layernorm.",
}
# Projections of BLIP's pre-training, and a buffer of positions that old versions of transformers saved.
UNUSED = re.compile(r"^(vision_proj|text_proj)\.|\.position_ids$")


def rename_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The published weights of ImageReward under the names of [`ImageRewardModel`], without those that it lacks."""
    renamed = {}
    for name, tensor in weights.items():
        name = name.removeprefix("blip.")
        if UNUSED.search(name):
            continue
        if name.startswith("visual_encoder."):
            name = name.removeprefix("visual_encoder.")
            for pattern, replacement in VISION_NAMES.items():
                name = re.sub(pattern, replacement, name)
            name = f"vision.{name}"
        elif name.startswith("text_encoder."):
            name = f"text.{name.removeprefix('text_encoder.')}"
        renamed[name] = tensor
    return renamed


class ImageRewardModel(nn.Module):
    """
    The network: a ViT, a BERT with cross-attention to its tokens, and a linear head on the first token of the text.

    Args:
        vision_config ([`~transformers.BlipVisionConfig`]), text_config ([`~transformers.BlipTextConfig`]):
            Sizes of the towers.
    """

    def __init__(self, vision_config: Any, text_config: Any):
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(vision_config)
        self.text = BlipTextModel(text_config, add_pooling_layer=False)
        self.mlp = ScoreHead(text_config.hidden_size)

    @classmethod
    def from_weights(cls, weights: dict[str, torch.Tensor]) -> "ImageRewardModel":
        """
        Builds the network with published weights. All its sizes are read from these.

        Raises:
            `ValueError`: weights that are missing or left over.
        """
        weights = rename_weights(weights)
        try:
            model = cls(*_configs(weights))
        except KeyError as error:
            raise ValueError(f"imagereward: these are not the weights of ImageReward: there is no {error}.") from None
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if missing or unexpected:
            raise ValueError(
                f"imagereward: the weights do not fit: {len(missing)} are missing ({missing[:3]}) and "
                f"{len(unexpected)} are left over ({unexpected[:3]})."
            )
        return model

    def forward(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Scores `[B]` of images with the text of the same place."""
        # `is_decoder` in the config is what makes the cross-attention; here it would make the text causal.
        hidden_states = self.text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=self.vision(pixel_values).last_hidden_state,
            is_decoder=False,
        ).last_hidden_state
        return (self.mlp(hidden_states[:, 0]).float() - MEAN) / STD


def _configs(weights: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    from transformers import BlipTextConfig, BlipVisionConfig

    def num_layers(prefix: str) -> int:
        return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})

    width, _, patch_size, _ = weights["vision.embeddings.patch_embedding.weight"].shape
    num_patches = weights["vision.embeddings.position_embedding"].shape[1] - 1
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights["vision.encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=num_layers("vision.encoder.layers."),
        num_attention_heads=width // HEAD_SIZE,
        image_size=patch_size * math.isqrt(num_patches),
        patch_size=patch_size,
        layer_norm_eps=1e-6,  # transformers has 1e-5
    )
    vocab_size, hidden_size = weights["text.embeddings.word_embeddings.weight"].shape
    text = BlipTextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        encoder_hidden_size=width,
        intermediate_size=len(weights["text.encoder.layer.0.intermediate.dense.bias"]),
        num_hidden_layers=num_layers("text.encoder.layer."),
        num_attention_heads=hidden_size // HEAD_SIZE,  # transformers has 8, BERT 12
        max_position_embeddings=len(weights["text.embeddings.position_embeddings.weight"]),
        is_decoder=True,
    )
    return vision, text


class ImageRewardReward(Reward):
    """
    ImageReward (https://huggingface.co/papers/2304.05977), about -2 to 2.

    Args:
        model_name_or_path (`str` or `Path`, *optional*, defaults to `"THUDM/ImageReward"`):
            Where `ImageReward.pt` is: a repo, a folder, or the file itself.
        tokenizer_name_or_path (`str` or `Path`, *optional*, defaults to `"google-bert/bert-base-uncased"`):
            The tokenizer of the text tower.
        kwargs:
            `device`, `dtype` and `batch_size` of [`~rewards.base.Reward`].
    """

    name = "imagereward"

    def __init__(
        self,
        *,
        model_name_or_path: str | Path = "THUDM/ImageReward",
        tokenizer_name_or_path: str | Path = "google-bert/bert-base-uncased",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.model_name_or_path = model_name_or_path
        self.tokenizer_name_or_path = tokenizer_name_or_path

    def load_models(self) -> dict[str, Any]:
        from transformers import AutoTokenizer

        weights = read_weights(find_file(self.model_name_or_path, "ImageReward.pt", self.name))
        return {
            "model": ImageRewardModel.from_weights(weights),
            "tokenizer": load_pretrained(
                AutoTokenizer, self.tokenizer_name_or_path, self.name, probe="tokenizer_config.json"
            ),
        }

    def score(self, images: torch.Tensor, prompts: list[str]) -> list[float]:
        model, tokenizer = self.models["model"], self.models["tokenizer"]
        tokens = tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        pixels = clip_pixels(to_pil(images), model.vision.config.image_size, center=round)
        scores = model(pixels.to(self.device, self.dtype), tokens["input_ids"], tokens["attention_mask"])
        return scores.tolist()
