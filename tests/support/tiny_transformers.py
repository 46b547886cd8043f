# SPDX-License-Identifier: Apache-2.0
"""A tiny real transformer of each family, by the class of its pipeline, and the inputs of one forward."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import nn


def _sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )


def _z_image() -> nn.Module:
    return ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )


def _flux2() -> nn.Module:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )


def _flux() -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def _qwen() -> nn.Module:
    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux,
    "Flux2KleinPipeline": _flux2,
    "ZImagePipeline": _z_image,
    "QwenImagePipeline": _qwen,
}


@cache
def _weights(family: str) -> dict[str, torch.Tensor]:
    """All matrices are drawn anew: the default initializations hide the prompt and the time."""
    generator = torch.Generator().manual_seed(0)
    weights = _empty(family).state_dict()
    for tensor in weights.values():
        if tensor.ndim >= 2:
            tensor.normal_(0, 1 / math.sqrt(tensor[0].numel()), generator=generator)
    return weights


def _empty(family: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return BUILDERS[family]().eval().requires_grad_(False)


def tiny_transformer_of(family: str) -> nn.Module:
    """The transformer of a family, with the same weights at every call."""
    transformer = _empty(family)
    transformer.load_state_dict(_weights(family))
    return transformer


def pipeline_class(family: str) -> type:
    return getattr(diffusers, family)


def linear_layers(family: str) -> dict[str, nn.Linear]:
    return {n: module for n, module in _empty(family).named_modules() if isinstance(module, nn.Linear)}


def velocity_of(family: str, transformer: nn.Module) -> torch.Tensor:
    """One forward of two samples, or of one where the transformer takes lists."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(next(transformer.parameters()).dtype)

    time = draw(2).abs() / 2
    inputs: dict[str, Any]
    if family == "StableDiffusion3Pipeline":
        inputs = {"hidden_states": draw(2, 4, 8, 8), "encoder_hidden_states": draw(2, 6, 32), "timestep": 1000 * time}
        inputs["pooled_projections"] = draw(2, 32)
    elif family == "ZImagePipeline":
        inputs = {"x": [draw(4, 1, 8, 8)], "t": time[:1], "cap_feats": [draw(6, 16)]}
    elif family == "QwenImagePipeline":
        inputs = {"hidden_states": draw(2, 16, 16), "encoder_hidden_states": draw(2, 6, 16), "timestep": time}
        inputs |= {"encoder_hidden_states_mask": torch.ones(2, 6, dtype=torch.bool), "img_shapes": [[(1, 4, 4)]] * 2}
    else:
        columns, width = (3, 32) if family == "FluxPipeline" else (4, 48)
        inputs = {"hidden_states": draw(2, 16, 16), "encoder_hidden_states": draw(2, 6, width), "timestep": time}
        image = torch.zeros(4, 4, columns)
        image[..., 1], image[..., 2] = torch.arange(4.0)[:, None], torch.arange(4.0)
        inputs |= {"img_ids": image.flatten(0, 1), "txt_ids": torch.zeros(6, columns), "guidance": None}
        if family == "FluxPipeline":
            inputs |= {"pooled_projections": draw(2, 16), "guidance": 3 * torch.ones(2)}
    with torch.no_grad():
        output = transformer(**inputs, return_dict=False)[0]
    return output[0] if isinstance(output, list) else output
