# SPDX-License-Identifier: Apache-2.0
"""HPSv2.1: a CLIP trained on people's rankings of images of one prompt."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .base import Reward
from .models import cosines, find_file, from_weights, load_pretrained, read_weights
from .preprocessing import hps_pixels


if TYPE_CHECKING:
    from transformers import CLIPConfig

# The widths of one attention head in ViT-H-14, which the shapes of the weights do not tell.
_VISION_HEAD_WIDTH, _TEXT_HEAD_WIDTH = 80, 64
# Names of OpenCLIP and of transformers, outside the blocks and inside of them.
_OUTER = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_INNER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


def from_open_clip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Renames the weights of an OpenCLIP model for `transformers.CLIPModel`. What is not known keeps its name, so that
    loading reports it; the causal mask, which some versions save, is left out.
    """
    renamed = {}
    for name, tensor in weights.items():
        if name == "attn_mask":
            continue
        if match := _BLOCK.fullmatch(name):
            visual, number, part, kind = match.groups()
            layer = f"{'vision' if visual else 'text'}_model.encoder.layers.{number}"
            if part == "attn.in_proj":
                for projection, third in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[f"{layer}.self_attn.{projection}_proj.{kind}"] = third.clone()
            else:
                renamed[f"{layer}.{_INNER.get(part, part)}.{kind}"] = tensor
        else:
            # OpenCLIP multiplies from the left.
            transposed = name in ("visual.proj", "text_projection")
            renamed[_OUTER.get(name, name)] = tensor.T.contiguous() if transposed else tensor
    return renamed


def config_of(weights: dict[str, torch.Tensor]) -> "CLIPConfig":
    """The config of a ViT-H-14, with the sizes read from OpenCLIP's `weights`."""
    from transformers import CLIPConfig

    def depth(prefix: str) -> int:
        return len({name.split(".")[-3] for name in weights if name.startswith(prefix) and name.endswith("ln_1.bias")})

    vision_width, _, patch, _ = weights["visual.conv1.weight"].shape
    positions = weights["visual.positional_embedding"].shape[0]
    vocabulary, text_width = weights["token_embedding.weight"].shape
    embedding = weights["text_projection"].shape[1]
    return CLIPConfig(
        projection_dim=embedding,
        vision_config={
            "hidden_size": vision_width,
            "intermediate_size": weights["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": depth("visual.transformer."),
            "num_attention_heads": vision_width // _VISION_HEAD_WIDTH,
            "patch_size": patch,
            "image_size": patch * round((positions - 1) ** 0.5),
            "projection_dim": embedding,
            "hidden_act": "gelu",
        },
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": text_width,
            "intermediate_size": weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": depth("transformer."),
            "num_attention_heads": text_width // _TEXT_HEAD_WIDTH,
            "max_position_embeddings": weights["positional_embedding"].shape[0],
            "projection_dim": embedding,
            "hidden_act": "gelu",
            # The features are those of the first end-of-text token, which is the last of the vocabulary.
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
        },
    )


class HPSv2Reward(Reward):
    """
    HPSv2.1 (https://huggingface.co/papers/2306.09341): the cosine between image and text, about 0.28.

    The checkpoint is in OpenCLIP's format and is loaded into transformers' CLIP. It is published as a pickle only. It
    is read with `torch.load(weights_only=True)`, which runs no code.

    Args:
        model_name_or_path (`str` or `Path`, *optional*, defaults to `"xswu/HPSv2"`):
            A local file (`.pt` or `.safetensors`), or a folder or `owner/name[@revision]` with an
            `HPS_v2.1_compressed.pt`.
        tokenizer_name_or_path (`str` or `Path`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            The tokenizer: a local folder or `owner/name[@revision]`.
        kwargs:
            `device`, `dtype` and `batch_size` of [`~rewards.base.Reward`].
    """

    name = "hpsv2"

    def __init__(
        self,
        *,
        model_name_or_path: str | Path = "xswu/HPSv2",
        tokenizer_name_or_path: str | Path = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.model_name_or_path = model_name_or_path
        self.tokenizer_name_or_path = tokenizer_name_or_path

    def load_models(self) -> dict[str, Any]:
        from transformers import AutoTokenizer, CLIPModel

        weights = read_weights(find_file(self.model_name_or_path, "HPS_v2.1_compressed.pt", "hpsv2"))
        weights = weights.get("state_dict", weights)
        return {
            "clip": from_weights(CLIPModel, config_of(weights), from_open_clip(weights), "hpsv2"),
            "tokenizer": load_pretrained(
                AutoTokenizer, self.tokenizer_name_or_path, "hpsv2", probe="tokenizer_config.json"
            ),
        }

    def score(self, images: torch.Tensor, prompts: list[str]) -> list[float]:
        clip = self.models["clip"]
        pixels = hps_pixels(images.to(self.device), clip.config.vision_config.image_size)
        return cosines(clip, self.models["tokenizer"], pixels, prompts).tolist()
