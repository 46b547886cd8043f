# SPDX-License-Identifier: Apache-2.0
"""SHA-256 of what a LoRA, or a model, does: equal for equal weights, whatever file they are in."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import nn

from .adapters import lora_scaling, lora_state_dict
from .files import LoraWeights


def weights_sha256(state_dict: Mapping[str, torch.Tensor], scaling: str = "") -> str:
    """
    The fingerprint of tensors: names, dtypes, shapes and bytes.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            The tensors, in any order and on any device.
        scaling (`str`, *optional*):
            What else decides what they do.

    Returns:
        `str`: the hexadecimal digest.
    """
    digest = hashlib.sha256(scaling.encode())
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def lora_sha256(weights: LoraWeights) -> str:
    """The fingerprint of a LoRA as it was read: its tensors in their dtype, and its scaling. See [`weights_sha256`]."""
    config = weights.config
    scaling = [config.r, config.lora_alpha, config.use_rslora, config.rank_pattern, config.alpha_pattern]
    return weights_sha256(weights.state_dict, json.dumps(scaling, sort_keys=True))


def adapter_sha256(transformer: nn.Module, adapter_name: str = "default") -> str:
    """The fingerprint of an adapter as it is now: its float32 tensors, and the factor of each layer."""
    factors = sorted(lora_scaling(transformer, adapter_name).items())
    scaling = "".join(f"{name} {float(factor)!r}\n" for name, factor in factors)
    return weights_sha256(lora_state_dict(transformer, adapter_name), scaling)


def backbone_sha256(model: nn.Module) -> str:
    """The fingerprint of a model without its adapters: the same before and after they were added."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    return weights_sha256({name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items()})
