# SPDX-License-Identifier: Apache-2.0
"""What teachers are on: the backbone of the student, or another one that is found, checked and run beside it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..hub.download import resolve
from ..hub.errors import AbsentError, SourceError
from ..hub.locations import DIFFUSERS_WEIGHT_NAME, PEFT_CONFIG_NAME, Origin, Resolved
from ..lora.adapters import active_adapters
from ..models.family import ModelFamily
from ..models.transformer_places import TransformerPlace, find_base, find_transformer
from ..models.velocity import VelocityModel
from ..utils.turns import Turns
from .config import TeacherConfig, full_model


@dataclass(frozen=True)
class FoundTeacher:
    """
    What a teacher was found to be, before anything large is loaded.

    Args:
        lora ([`Resolved`], *optional*):
            Its files, if it is a LoRA.
        place ([`TransformerPlace`], *optional*):
            The backbone it is or is on, if it named one.
        shared (`bool`, *optional*, defaults to `False`):
            Whether that is the backbone of the student.
        adapters (`tuple[str, ...]`, *optional*, defaults to `()`):
            Adapters that a full model in memory has active.
    """

    lora: Resolved | None = None
    place: TransformerPlace | None = None
    shared: bool = False
    adapters: tuple[str, ...] = ()

    @property
    def other(self) -> TransformerPlace | None:
        """The backbone, if it is another one than that of the student."""
        return None if self.shared else self.place


class Backbone(VelocityModel):
    """
    A frozen transformer that teachers are on, which comes to the device when it is run.

    Args:
        transformer (`torch.nn.Module`):
            With the adapters of its teachers.
        family ([`ModelFamily`]):
            How it is called.
        turns ([`Turns`]):
            Brings it there, if it was added to them.
    """

    def __init__(self, transformer: nn.Module, family: ModelFamily, turns: Turns):
        super().__init__(transformer, family)
        self.turns = turns

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.turns.take(self)
        return super().forward(*args, **kwargs)


def owner_of(task: str, config: TeacherConfig) -> str:
    """What error messages call a teacher."""
    return f"teacher {task!r} ({config.source()})"


def find_teacher(task: str, config: TeacherConfig, family: ModelFamily) -> FoundTeacher:
    """
    Finds out whether a teacher is a LoRA or a full model, and looks at the backbone.

    A folder with a LoRA and a model is taken for the LoRA.

    Args:
        task (`str`), config ([`TeacherConfig`]):
            The teacher.
        family ([`ModelFamily`]):
            Family of the student's base.

    Raises:
        `SourceError`: it cannot be found or fetched.
        `ValueError`: it is of another family.
    """
    given = config.name_or_path
    if not isinstance(given, str | Path):
        model, vae = full_model(given), getattr(given, "vae", None) if isinstance(given, DiffusionPipeline) else None
        vae_config = None if vae is None else vae.config
        owner = f"teacher {task!r}"
        place = TransformerPlace(owner, Origin.of_model(given), model.config, None, model, vae_config)
        return FoundTeacher(place=place, adapters=active_adapters(model))
    lora, place = _lora_or_model(config, owner_of(task, config), family)
    if config.base is not None:
        if place is not None:
            raise ValueError(
                f"{place.owner}: `base={str(config.base)!r}` was given, but it is a full model, not a LoRA. Leave "
                "`base` out."
            )
        place = find_base(config.base, f"base of teacher {task!r}", family)
        if place.model is not None and getattr(place.model, "peft_config", None):
            raise ValueError(
                f"{place.owner}: it has adapters already ({', '.join(place.model.peft_config)}). Pass it without them."
            )
    return FoundTeacher(lora, place)


def _lora_or_model(
    config: TeacherConfig, owner: str, family: ModelFamily
) -> tuple[Resolved | None, TransformerPlace | None]:
    source, folder = config.source(), config.source().path
    named = config.weight_name is not None
    if folder is not None:
        holds_lora = any((folder / name).is_file() for name in (DIFFUSERS_WEIGHT_NAME, PEFT_CONFIG_NAME))
        place = None if named or holds_lora else find_transformer(source, owner, family)
        return (resolve(source, weight_name=config.weight_name, owner=owner) if place is None else None), place
    try:
        return resolve(source, weight_name=config.weight_name, owner=owner), None
    except SourceError as error:
        if named:
            raise
        # Without an answer of the Hub it may still be in the cache
        place = find_transformer(source, owner, family, cached_only=not isinstance(error, AbsentError))
        if place is None:
            raise
        return None, place


def on_students_base(
    found: Mapping[str, FoundTeacher], key: tuple, config: Mapping[str, Any], family: ModelFamily
) -> dict[str, FoundTeacher]:
    """
    Compares the backbones of teachers with that of the student, before any of them is loaded.

    Args:
        found (`Mapping[str, FoundTeacher]`):
            The teachers by task.
        key (`tuple`), config (`Mapping`):
            Of the student's transformer: its [`~models.transformer_places.base_key`] and its config.
        family ([`ModelFamily`]):
            Its family.

    Returns:
        `dict[str, FoundTeacher]`: the teachers; those whose backbone is that of the student share it.

    Raises:
        `ValueError`: a backbone that takes other latents or other embeddings.
    """
    settled = {}
    for task, teacher in found.items():
        if teacher.place is not None and teacher.place.key == key:
            # One that was passed in memory as the teacher itself is refused when it is loaded.
            teacher = replace(teacher, shared=teacher.lora is not None or teacher.place.source is not None)
        elif teacher.place is not None and config:
            check_config(task, teacher.place.config, config, family.same_transformer)
        settled[task] = teacher
    return settled


def check_config(task: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Raises a `ValueError` if a teacher's transformer takes other latents or embeddings than the student's."""
    for name in names:
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"The teacher of task {task!r} has `{name}={theirs.get(name)}` but the student has "
                f"`{name}={ours.get(name)}`. They are given the same latents and the same text embeddings: use a "
                "teacher of the same model family."
            )


def check_backbone(
    task: str, place: TransformerPlace, transformer: nn.Module, family: ModelFamily, vae: nn.Module | None
) -> None:
    """
    Checks a teacher's backbone against the loaded student.

    Args:
        task (`str`), place ([`TransformerPlace`]):
            The teacher, and its backbone.
        transformer (`torch.nn.Module`), vae (`torch.nn.Module`, *optional*):
            Of the student's base.
        family ([`ModelFamily`]):
            Its family.

    Raises:
        `ValueError`: another class, other latents or embeddings, or the student's own transformer.
    """
    if place.model is not None and not isinstance(place.model, family.transformer_class):
        raise ValueError(
            f"The teacher of task {task!r} is a {type(place.model).__name__} but the student is a "
            f"{family.transformer_class.__name__}. Use a teacher of the same model family."
        )
    if place.model is transformer:
        raise ValueError(
            f"The teacher of task {task!r} is the student's own transformer. Load the teacher as a separate model."
        )
    check_config(task, place.config, transformer.config, family.same_transformer)
    if vae is None or place.vae_config is None:
        return
    for name in family.same_vae:
        theirs, ours = place.vae_config.get(name), vae.config[name]
        if theirs != ours:
            raise ValueError(
                f"The VAE of the teacher of task {task!r} has `{name}={theirs}` but that of the student has "
                f"`{name}={ours}`. They must share the latent space: use a teacher with the same VAE."
            )
