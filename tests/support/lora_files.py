# SPDX-License-Identifier: Apache-2.0
"""LoRA files for the tests: all that is written of one, and some with something wrong, or odd, in them."""

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.tiny import random_lora, save_diffusers_lora, save_peft_lora, tiny_transformer
from trl_diffusion_opd.lora.adapters import add_lora, save_lora
from trl_diffusion_opd.lora.convert import FORMATS, convert_lora
from trl_diffusion_opd.lora.files import LoraWeights


PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"
MODULE = "transformer_blocks.0.attn.to_k"
LORA_A, LORA_B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"

Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def peft_lora(
    folder: Path, options: dict[str, Any] | None = None, *, raw: str | None = None, change: Change | None = None
) -> Path:
    """A LoRA of PEFT with other `options`, another text instead of them (`raw`) or other tensors."""
    _write_right(folder, "peft", True)
    file = folder / PEFT_CONFIG
    text = json.dumps(json.loads(file.read_text()) | (options or {})) if raw is None else raw
    file.write_text(text)
    if change is not None:
        _rewrite(folder / PEFT_FILE, "base_model.model.", change, {"format": "pt"})
    return folder


def diffusers_lora(
    folder: Path,
    options: dict[str, Any] | None = None,
    *,
    raw: str | None = None,
    change: Change | None = None,
    metadata: bool = True,
) -> Path:
    """A LoRA of diffusers with other `options`, another text instead of them (`raw`) or other tensors."""
    _write_right(folder, "diffusers", metadata)
    file = folder / DIFFUSERS_FILE
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    if raw is not None:
        header[METADATA_KEY] = raw
    elif metadata:
        own = {f"transformer.{name}": value for name, value in (options or {}).items()}
        header[METADATA_KEY] = json.dumps(json.loads(header[METADATA_KEY]) | own)
    _rewrite(file, "transformer.", change or (lambda tensors: tensors), header)
    return folder


def all_as(dtype: torch.dtype) -> Change:
    """All tensors in another dtype."""
    return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


def with_tensor(name: str, value: torch.Tensor | Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """One tensor added or replaced."""
    return lambda tensors: tensors | {name: value(tensors[name]) if callable(value) else value}


def _write_right(folder: Path, form: str, metadata: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _right(form, metadata).items():
        (folder / name).write_bytes(content)


@cache
def _right(form: str, metadata: bool) -> dict[str, bytes]:
    """The files of a LoRA, written once: building the model for them takes longest."""
    with TemporaryDirectory() as folder:
        if form == "peft":
            save_peft_lora(folder, *random_lora(seed=1))
        else:
            save_diffusers_lora(folder, *random_lora(seed=1), metadata=metadata)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def _rewrite(file: Path, prefix: str, change: Change, header: dict[str, str]) -> None:
    tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(file).items()}
    save_file(
        {f"{prefix}{name}": tensor.contiguous() for name, tensor in change(tensors).items()}, file, metadata=header
    )


def write_all(folder: Path) -> dict[str, str]:
    """Every file that this package writes of one LoRA, and its SHA-256."""
    config, state_dict = random_lora(seed=1, alpha_pattern={"attn.to_q": 3, "attn.to_v": 1})
    transformer = tiny_transformer()
    add_lora(transformer, LoraWeights(config, state_dict), "default")
    save_lora(folder / "saved", transformer)
    for form in FORMATS:
        convert_lora(folder / "saved", folder / form, form)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
