# SPDX-License-Identifier: Apache-2.0
"""Converting LoRA files between the formats of diffusers, PEFT, ComfyUI and kohya, exactly."""

import re
from functools import partial
from pathlib import Path
from typing import Any, Literal

from .files import LoraWeights, load_lora
from .foreign import to_diffusers
from .names import TABLES
from .options import build_config
from .writing import sorted_options, write_comfyui, write_diffusers, write_kohya, write_peft


FORMATS = ("diffusers", "peft", "comfyui")


def convert_lora(
    source: str | Path,
    destination: str | Path,
    to: Literal["diffusers", "peft", "comfyui"] | None = None,
    *,
    weight_name: str | None = None,
    overwrite: bool = False,
    base: str | None = None,
) -> Path:
    """
    Writes a LoRA in another format. The base model is not needed, only its kind for the names of other programs.

    The tensors are the same to the bit, in their dtype, and so are the options, but for two: a base model that is not
    named by its Hub id is left out, and in the diffusers format `lora_dropout` is 0. A diffusers file without a config
    gets an explicit one: that of its `alpha` tensors, or the scaling of 1 that diffusers gives it.

    Args:
        source (`str` or `Path`):
            A local file or folder, or `owner/repo[/sub/folder][@revision]` on the Hub.
        destination (`str` or `Path`):
            Folder to write into: new or empty.
        to (`str`, *optional*):
            `"diffusers"`, `"peft"` or `"comfyui"`. By default diffusers or PEFT, whichever `source` is not.
        weight_name (`str`, *optional*):
            File inside `source`. By default `adapter_model.safetensors` or `pytorch_lora_weights.safetensors`.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether `destination` may hold files; those of the same names are replaced.
        base (`str`, *optional*):
            Class of the base's pipeline, such as `"FluxPipeline"`. With it `source` may have the names of kohya, ComfyUI
            or ai-toolkit, and `"comfyui"` is written under those of kohya's scripts.

    Returns:
        `Path`: the written weights. With PEFT, `adapter_config.json` is beside them. For ComfyUI it is
        `comfyui_lora.safetensors`, without a `base` the diffusers format with `alpha` tensors, which `source` may be too.

    Raises:
        `SourceError`: `source` cannot be found or fetched.
        `ValueError`: it is no LoRA that can be read, or cannot be written in this format, or the destination is not new
            or empty.
    """
    destination = Path(destination)
    if to not in (None, *FORMATS):
        raise ValueError(f"`to` must be one of {', '.join(map(repr, FORMATS))}, but is {to!r}.")
    if base is not None and base not in TABLES:
        raise ValueError(f"`base` must be one of {', '.join(TABLES)}, but is {base!r}.")
    if destination.is_file() or destination.suffix == ".safetensors":
        raise ValueError(f"The destination {str(destination)!r} must be a folder, not a file. Name the folder.")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise ValueError(
            f"The destination {str(destination)!r} is not empty. Choose another folder, or overwrite (`--overwrite`)."
        )
    reader = None if base is None else partial(to_diffusers, table=TABLES[base])
    weights, _ = load_lora(source, weight_name=weight_name, convert=reader)
    if to is None:
        to = "peft" if weights.saved_format == "diffusers" else "diffusers"
    options = _options(weights)
    if to == "peft":
        return write_peft(destination, weights.state_dict, options)
    # diffusers 0.42 leaves the dropout of a LoRA that it loads in training mode: every image would be random.
    options["lora_dropout"] = 0.0
    if to == "diffusers":
        return write_diffusers(destination, weights.state_dict, options)
    if base is not None:
        return write_kohya(destination, weights.state_dict, weights.config, TABLES[base])
    return write_comfyui(destination, weights.state_dict, options, weights.config)


def _options(weights: LoraWeights) -> dict[str, Any]:
    """All options of a LoRA. The base model is kept if it is named by its Hub id: a path is only good on one machine."""
    config = weights.config
    if weights.saved_options is not None:
        config = build_config(weights.saved_options, "the file", weights.owner)
    options = sorted_options(config)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", options["base_model_name_or_path"] or ""):
        options["base_model_name_or_path"] = None
    return options
