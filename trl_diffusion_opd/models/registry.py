# SPDX-License-Identifier: Apache-2.0
"""The model families, found by the class of the pipeline. Importing this module imports no model."""

import importlib
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .family import ModelFamily

# `_class_name` of a pipeline's `model_index.json` -> "module:Class", or a family that was registered.
FAMILIES: "dict[str, str | ModelFamily]" = {
    "StableDiffusion3Pipeline": "sd3:StableDiffusion3",
    "StableDiffusion3SDEPipeline": "sd3:StableDiffusion3",
    "ZImagePipeline": "zimage:ZImage",
    "Flux2KleinPipeline": "flux2_klein:Flux2Klein",
    "FluxPipeline": "flux:Flux",
    "QwenImagePipeline": "qwen_image:QwenImage",
}
DEFAULT_PIPELINE = next(iter(FAMILIES))


def register_family(family: "ModelFamily") -> None:
    """
    Makes a model family known to trainers, evaluation, cards and demos.

    Args:
        family ([`ModelFamily`]):
            Found from now on by the name of its `pipeline_class`.
    """
    FAMILIES[family.pipeline_class.__name__] = family


def family_named(class_name: str | None, owner: str = "model") -> "ModelFamily":
    """
    The family of a pipeline's class.

    Args:
        class_name (`str`):
            The `_class_name` of a `model_index.json`.
        owner (`str`, *optional*, defaults to `"model"`):
            Whose it is, for the error message.

    Raises:
        `ValueError`: no family has such a pipeline.
    """
    if not isinstance(class_name, str) or class_name not in FAMILIES:
        close = get_close_matches(str(class_name), FAMILIES, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"`{owner}` is a {class_name!r}, which no known model family has. The pipelines that are supported are "
            f"{', '.join(FAMILIES)}.{hint}"
        )
    found = FAMILIES[class_name]
    if isinstance(found, str):
        module, name = found.split(":")
        found = getattr(importlib.import_module(f".{module}", __package__), name)()
    return found


def family_of(pipeline: Any, owner: str = "model") -> "ModelFamily":
    """
    The family of a pipeline in memory, by its class or one that this derives from.

    Raises:
        `ValueError`: no family has such a pipeline.
    """
    names = [kind.__name__ for kind in type(pipeline).__mro__]
    return family_named(next((name for name in names if name in FAMILIES), names[0]), owner)
