# SPDX-License-Identifier: Apache-2.0
"""LoRAs as other programs write them, and what a family makes of them."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from tests.support.tiny_transformers import linear_layers, pipeline_class, tiny_transformer_of, velocity_of
from trl_diffusion_opd.lora.adapters import add_lora, use_adapter
from trl_diffusion_opd.lora.files import LoraWeights, read_lora
from trl_diffusion_opd.lora.foreign import to_diffusers
from trl_diffusion_opd.lora.names import TABLES


# Modules of each family under the names of its original checkpoint, whose LoRAs diffusers converts too, with their
# shapes `[out, in]`.
ORIGINALS: dict[str, dict[str, tuple[int, int]]] = {
    "FluxPipeline": {
        "double_blocks.0.img_attn.qkv": (96, 32),
        "double_blocks.0.img_attn.proj": (32, 32),
        "double_blocks.0.img_mlp.0": (128, 32),
        "double_blocks.0.img_mlp.2": (32, 128),
        "double_blocks.0.img_mod.lin": (192, 32),
        "double_blocks.0.txt_attn.qkv": (96, 32),
        "double_blocks.0.txt_attn.proj": (32, 32),
        "double_blocks.0.txt_mlp.0": (128, 32),
        "single_blocks.1.linear2": (32, 160),
        "single_blocks.0.modulation.lin": (96, 32),
    },
    "Flux2KleinPipeline": {
        "double_blocks.0.img_attn.qkv": (96, 32),
        "double_blocks.0.img_attn.proj": (32, 32),
        "double_blocks.0.img_mlp.0": (192, 32),
        "double_blocks.0.txt_attn.qkv": (96, 32),
        "double_blocks.0.txt_mlp.2": (32, 96),
        "single_blocks.0.linear1": (288, 32),
        "single_blocks.1.linear2": (32, 128),
        "img_in": (32, 16),
        "final_layer.linear": (16, 32),
    },
    "ZImagePipeline": {
        "layers.0.attention.qkv": (96, 32),
        "layers.1.attention.out": (32, 32),
        "layers.1.feed_forward.w1": (85, 32),
        "layers.0.feed_forward.w2": (32, 85),
        "noise_refiner.0.attention.qkv": (96, 32),
        "context_refiner.0.feed_forward.w3": (85, 32),
        "layers.0.adaLN_modulation.0": (128, 32),
    },
    "QwenImagePipeline": {
        "transformer_blocks.0.attn.to_q": (32, 32),
        "transformer_blocks.1.attn.to_out.0": (32, 32),
        "transformer_blocks.0.attn.add_k_proj": (32, 32),
        "transformer_blocks.0.attn.to_add_out": (32, 32),
        "transformer_blocks.1.img_mlp.net.0.proj": (128, 32),
        "transformer_blocks.0.txt_mod.1": (192, 32),
        "img_in": (32, 16),
    },
}
SD3_ORIGINALS = {
    "joint_blocks.0.x_block.attn.qkv": (96, 32),
    "joint_blocks.0.x_block.attn2.qkv": (96, 32),
    "joint_blocks.0.x_block.attn2.proj": (32, 32),
    "joint_blocks.1.x_block.attn.proj": (32, 32),
    "joint_blocks.0.context_block.attn.qkv": (96, 32),
    "joint_blocks.1.context_block.attn.qkv": (96, 32),
    "joint_blocks.0.context_block.attn.proj": (32, 32),
    "joint_blocks.0.x_block.mlp.fc1": (128, 32),
    "joint_blocks.0.context_block.mlp.fc2": (32, 128),
    "joint_blocks.0.context_block.adaLN_modulation.1": (192, 32),
    "joint_blocks.1.context_block.adaLN_modulation.1": (64, 32),
    "joint_blocks.0.x_block.adaLN_modulation.1": (288, 32),
    "final_layer.adaLN_modulation.1": (64, 32),
    "t_embedder.mlp.0": (32, 256),
    "context_embedder": (32, 32),
}


def draw(*shape: int, seed: int = 0, scale: float = 0.2) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1000 * shape[0])) * scale


def kohya(shapes: Mapping[str, tuple[int, int]], *, alpha: bool = True) -> dict[str, torch.Tensor]:
    """As kohya's scripts write it, with another rank and alpha in each module."""
    return _written(shapes, lambda name: f"lora_unet_{name.replace('.', '_')}", ("lora_down", "lora_up"), alpha)


def dotted(shapes: Mapping[str, tuple[int, int]], prefix: str = "diffusion_model.", *, alpha: bool = False) -> dict:
    """As ai-toolkit writes it, by default for ComfyUI."""
    return _written(shapes, lambda name: f"{prefix}{name}", ("lora_A", "lora_B"), alpha)


def _written(shapes, rename, ends, alpha) -> dict[str, torch.Tensor]:
    tensors = {}
    for index, (name, (rows, columns)) in enumerate(shapes.items()):
        rank, module = 1 + index % 4, rename(name)
        tensors[f"{module}.{ends[0]}.weight"] = draw(rank, columns, seed=index)
        tensors[f"{module}.{ends[1]}.weight"] = draw(rows, rank, seed=index)
        if alpha:
            tensors[f"{module}.alpha"] = torch.tensor(0.75 * (index + 1))
    return tensors


def read(family: str, tensors: Mapping[str, torch.Tensor], folder: Path) -> LoraWeights:
    """What this package reads of a file with these tensors."""
    file = folder / "lora.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return read_lora(file, owner="mine", convert=partial(to_diffusers, table=TABLES[family]))


def velocity_with(family: str, weights: LoraWeights, transformer: nn.Module | None = None) -> torch.Tensor:
    """The velocity of the family's transformer with a LoRA as this package applies it."""
    transformer = tiny_transformer_of(family) if transformer is None else transformer
    add_lora(transformer, weights, "teacher")
    with torch.no_grad(), use_adapter(transformer, "teacher"):
        return velocity_of(family, transformer)


def stock_velocity(family: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The same by diffusers' own converter and loader."""
    transformer, pipeline = tiny_transformer_of(family), pipeline_class(family)
    converted = pipeline.lora_state_dict({name: tensor.clone() for name, tensor in tensors.items()})
    alphas = {"network_alphas": None} if family == "FluxPipeline" else {}
    pipeline.load_lora_into_transformer(converted, transformer=transformer, adapter_name="stock", **alphas)
    return velocity_of(family, transformer)


def merged_velocity(family: str, deltas: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The velocity with updates added to the weights."""
    transformer = tiny_transformer_of(family)
    for name, delta in deltas.items():
        transformer.get_submodule(name).weight.data += delta.to(torch.float32)
    return velocity_of(family, transformer)


def updates_of(weights: LoraWeights, modules: Iterable[str]) -> dict[str, torch.Tensor]:
    """`alpha / rank * B @ A` of a LoRA, in float64."""
    from trl_diffusion_opd.lora.options import module_alpha, module_rank

    pairs = {m: [weights.state_dict[f"{m}.lora_{kind}.weight"].double() for kind in "BA"] for m in modules}
    return {
        m: module_alpha(weights.config, m) / module_rank(weights.config, m) * up @ down
        for m, (up, down) in pairs.items()
    }


def modules_of(weights: LoraWeights) -> set[str]:
    return {name.rpartition(".lora_")[0] for name in weights.state_dict}


def shapes_of(family: str) -> dict[str, tuple[int, int]]:
    return {name: tuple(module.weight.shape) for name, module in linear_layers(family).items()}
