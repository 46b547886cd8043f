# SPDX-License-Identifier: Apache-2.0
"""Writing LoRA files in the formats of diffusers, PEFT, ComfyUI and kohya: the same LoRA gives the same bytes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save

from ..hub.locations import DIFFUSERS_WEIGHT_NAME, PEFT_CONFIG_NAME, PEFT_WEIGHT_NAME
from .fused import Update, fuse
from .names import NameTable, Place
from .options import module_alpha


DIFFUSERS_PREFIX = "transformer."
PEFT_PREFIX = "base_model.model."
METADATA_KEY = "lora_adapter_metadata"
COMFYUI_WEIGHT_NAME = "comfyui_lora.safetensors"


def write_diffusers(
    folder: Path,
    state_dict: Mapping[str, torch.Tensor],
    options: Mapping[str, Any],
    weight_name: str = DIFFUSERS_WEIGHT_NAME,
) -> Path:
    """Writes tensors and options as `save_lora_weights` of a diffusers pipeline does."""
    metadata = _dump({f"{DIFFUSERS_PREFIX}{name}": value for name, value in options.items()})
    tensors = {f"{DIFFUSERS_PREFIX}{name}": tensor for name, tensor in state_dict.items()}
    return _write(folder / weight_name, tensors, {"format": "pt", METADATA_KEY: metadata})


def write_peft(folder: Path, state_dict: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> Path:
    """Writes tensors and options as `save_pretrained` of a `PeftModel` does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PEFT_CONFIG_NAME).write_text(_dump(options) + "\n", encoding="utf-8")
    tensors = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in state_dict.items()}
    return _write(folder / PEFT_WEIGHT_NAME, tensors, {"format": "pt"})


def write_comfyui(
    folder: Path,
    state_dict: Mapping[str, torch.Tensor],
    options: Mapping[str, Any],
    config: LoraConfig,
) -> Path:
    """
    Writes the diffusers format with an `alpha` tensor beside each `A` and `B`.

    ComfyUI, and what loads LoRAs with its code, multiplies `B @ A` by `alpha / rank` if there is an `alpha` tensor and by
    1 if there is none; it does not read the metadata. diffusers 0.42 refuses a file with `alpha` tensors.

    Raises:
        `ValueError`: the LoRA holds magnitudes (DoRA) or biases, which ComfyUI would apply otherwise or not at all.
    """
    _check_plain(config)
    modules = dict.fromkeys(name.rpartition(".lora_")[0] for name in state_dict)
    alphas = {f"{module}.alpha": torch.tensor(float(module_alpha(config, module))) for module in modules}
    return write_diffusers(folder, {**state_dict, **alphas}, options, COMFYUI_WEIGHT_NAME)


def write_kohya(folder: Path, state_dict: Mapping[str, torch.Tensor], config: LoraConfig, table: NameTable) -> Path:
    """
    Writes a LoRA under the names of kohya's scripts, which ComfyUI and programs built on these scripts load.

    They are `lora_unet_` and the module's name in the original checkpoint, where queries, keys and values are one
    module. What was checked, with LoRAs of all linear layers:

    - Stable Diffusion 3: added to an original checkpoint, as ComfyUI adds it, the file gives the adapted velocity.
    - Qwen-Image: diffusers' own converter gives the same updates back.
    - Z-Image, FLUX.2 klein, FLUX.1: so it does but for the layers before and after the blocks (Z-Image), the modulations
      (klein), and the last layers and queries, keys and values of narrow single blocks (FLUX.1), which it does not
      know, or not the alpha of. These come back the same through [`~lora.foreign.to_diffusers`].

    Raises:
        `ValueError`: the LoRA holds magnitudes (DoRA) or biases, or a module that has no such name.
    """
    _check_plain(config)
    places: dict[str, Place] = {}
    updates: dict[str, dict[str, Update]] = {}
    for module in sorted({name.rpartition(".lora_")[0] for name in state_dict}):
        place = table.original(module)
        pair = [state_dict.get(f"{module}.lora_{kind}.weight") for kind in "BA"]
        if place is None or any(tensor is None or tensor.ndim != 2 for tensor in pair):
            raise ValueError(
                f"The LoRA of {module!r} cannot be written for ComfyUI: {'its matrices are not complete' if place else ''}"
                f"{'' if place else 'no linear layer of this family is called so'}. Check `--base`, or leave it out."
            )
        places[place.original] = place
        updates.setdefault(place.original, {})[module] = Update(*pair, float(module_alpha(config, module)))
    tensors = {}
    for original, own in updates.items():
        update, name = fuse(own, places[original]), f"lora_unet_{original.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = update.down, update.up
        tensors[f"{name}.alpha"] = torch.tensor(update.alpha)
    return _write(folder / COMFYUI_WEIGHT_NAME, tensors, {"format": "pt"})


def _check_plain(config: LoraConfig) -> None:
    if wrong := [name for name in ("use_dora", "lora_bias") if getattr(config, name)]:
        raise ValueError(
            f"A LoRA with `{wrong[0]}=True` cannot be written for ComfyUI, which would not apply it as it was trained. "
            "Convert it to 'diffusers' or 'peft'."
        )


def sorted_options(config: LoraConfig) -> dict[str, Any]:
    """The options of a LoRA. A set has no order: sorting it makes the same LoRA give the same file."""
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}


def _dump(options: Mapping[str, Any]) -> str:
    return json.dumps(options, indent=2, sort_keys=True)


def _write(file: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> Path:
    """Writes a safetensors file. safetensors itself writes the metadata in a random order, so it is sorted here."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = memoryview(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:end]))
    header = json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors begin at a multiple of 8 bytes
    with open(file, "wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.write(content[end:])
    return file
