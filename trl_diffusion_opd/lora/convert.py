# SPDX-License-Identifier: Apache-2.0
"""Converting LoRA files between the formats of diffusers and PEFT, exactly."""

import json
import re
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig
from safetensors.torch import save_file

from ..hub.download import resolve
from ..hub.locations import DIFFUSERS_WEIGHT_NAME, PEFT_CONFIG_NAME, PEFT_WEIGHT_NAME
from .files import DIFFUSERS_PREFIX, METADATA_KEY, PEFT_PREFIX, LoraWeights, read_lora


FORMATS = ("diffusers", "peft")


def convert_lora(
    source: str | Path,
    destination: str | Path,
    to: Literal["diffusers", "peft"] | None = None,
    *,
    weight_name: str | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Writes a LoRA in another format. The base model is not needed.

    The tensors are the same to the bit, in their dtype, and so are the options, but for two: a base model that is not
    named by its Hub id is left out, and in the diffusers format `lora_dropout` is 0. A diffusers file without a config
    gets an explicit one: that of its `alpha` tensors, or the scaling of 1 that diffusers gives it.

    Args:
        source (`str` or `Path`):
            A local file or folder, or `owner/repo[/sub/folder][@revision]` on the Hub.
        destination (`str` or `Path`):
            Folder to write into: new or empty.
        to (`str`, *optional*):
            `"diffusers"` or `"peft"`. By default the format that `source` is not in.
        weight_name (`str`, *optional*):
            File inside `source`. By default `adapter_model.safetensors` or `pytorch_lora_weights.safetensors`.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether `destination` may hold files; those of the same names are replaced.

    Returns:
        `Path`: the written weights. With PEFT, `adapter_config.json` is beside them.
    """
    destination = Path(destination)
    if to not in (None, *FORMATS):
        raise ValueError(f"`to` must be one of {', '.join(map(repr, FORMATS))}, but is {to!r}.")
    if destination.is_file() or destination.suffix == ".safetensors":
        raise ValueError(f"The destination {str(destination)!r} must be a folder, not a file. Name the folder.")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise ValueError(
            f"The destination {str(destination)!r} is not empty. Choose another folder, or overwrite (`--overwrite`)."
        )
    resolved = resolve(source, weight_name=weight_name)
    weights = read_lora(resolved.path, weight_name=weight_name)
    if to is None:
        to = "peft" if weights.saved_format == "diffusers" else "diffusers"
    destination.mkdir(parents=True, exist_ok=True)
    options = _options(weights)
    header = {"format": "pt"}
    if to == "peft":
        file, prefix = destination / PEFT_WEIGHT_NAME, PEFT_PREFIX
        (destination / PEFT_CONFIG_NAME).write_text(_dump(options) + "\n", encoding="utf-8")
    else:
        file, prefix = destination / DIFFUSERS_WEIGHT_NAME, DIFFUSERS_PREFIX
        # diffusers 0.42 leaves the dropout of a LoRA that it loads in training mode: every image would be random.
        options["lora_dropout"] = 0.0
        header[METADATA_KEY] = _dump({f"{prefix}{name}": value for name, value in options.items()})
    save_file({f"{prefix}{name}": tensor for name, tensor in weights.state_dict.items()}, file, metadata=header)
    return file


def _options(weights: LoraWeights) -> dict[str, Any]:
    """All options of a LoRA. The base model is kept if it is named by its Hub id: a path is only good on one machine."""
    config = weights.config
    if weights.saved_options is not None:
        config = LoraConfig.from_peft_type(**{**weights.saved_options, "peft_type": "LORA"})
    options = config.to_dict()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", options["base_model_name_or_path"] or ""):
        options["base_model_name_or_path"] = None
    # A set has no order: sorting it makes the same LoRA give the same file.
    return {name: sorted(value) if isinstance(value, set) else value for name, value in options.items()}


def _dump(options: dict[str, Any]) -> str:
    return json.dumps(options, indent=2, sort_keys=True)
