# SPDX-License-Identifier: Apache-2.0
"""The teachers, loaded beside the student and frozen."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..hub.locations import Origin
from ..lora.adapters import add_lora, has_no_effect, lora_scaling
from ..lora.files import LoraWeights, load_lora
from ..lora.fingerprints import adapter_sha256, backbone_sha256, weights_sha256
from ..models.family import ModelFamily
from ..models.transformer_places import load_transformer
from .backbones import FoundTeacher, check_backbone, find_teacher, owner_of
from .config import TeacherConfig, normalize_teachers


logger = logging.getLogger(__name__)


@dataclass
class Teacher:
    """
    A loaded teacher: an adapter on the student's transformer or on another one, or a model of its own.

    Args:
        name (`str`):
            The task it teaches.
        guidance_scale (`float`):
            Classifier-free guidance it is queried with.
        adapter_name (`str`, *optional*):
            Its adapter, of a LoRA; not set for a full model.
        model (`torch.nn.Module`, *optional*):
            The transformer it is or is on, which teachers may share; not set for that of the student.
        fingerprint (`str`):
            SHA-256 of its weights as loaded. See [`teacher_fingerprint`].
        source (`str`):
            Where it came from, as it was named.
        origin ([`Origin`]):
            Where it came from, with the Hub commit and without naming this machine.
        base ([`Origin`], *optional*):
            Where the base of a LoRA came from, if it is another one than the student's.
        adapters (`tuple[str, ...]`, *optional*, defaults to `()`):
            What is active when it is queried: its adapter, or those that a full model came with.
    """

    name: str
    guidance_scale: float
    adapter_name: str | None
    model: nn.Module | None = field(repr=False)
    fingerprint: str
    source: str
    origin: Origin
    base: Origin | None = None
    adapters: tuple[str, ...] = ()

    @property
    def commit(self) -> str | None:
        """The Hub commit it came from."""
        return self.origin.commit


def fetch_teachers(configs: Mapping[str, TeacherConfig], family: ModelFamily) -> dict[str, FoundTeacher]:
    """
    Finds all teachers, before anything large is loaded: the files of LoRAs are on this machine then and can be read.

    Args:
        configs (`Mapping[str, TeacherConfig]`):
            What [`normalize_teachers`] returns.
        family ([`ModelFamily`]):
            Family of the student's base.

    Returns:
        `dict[str, FoundTeacher]`: what each is, by task.

    Raises:
        `SourceError`: one cannot be found or fetched; the message says what to do.
        `ValueError`: one cannot be right; the message says why.
    """
    found = {}
    for task, config in configs.items():
        found[task] = find_teacher(task, config, family)
        if found[task].lora is not None:
            _load_lora(task, config, found[task], family)
    return found


def read_fingerprints(
    configs: Mapping[str, TeacherConfig],
    files: Mapping[str, FoundTeacher],
    guidance_scale: float,
    family: ModelFamily,
) -> dict[str, dict[str, Any]]:
    """
    What can be told of teachers before they are loaded.

    Args:
        configs (`Mapping[str, TeacherConfig]`), guidance_scale (`float`):
            As of [`load_teachers`].
        files (`Mapping[str, FoundTeacher]`):
            What [`fetch_teachers`] returned.
        family ([`ModelFamily`]):
            As of [`fetch_teachers`].

    Returns:
        `dict`: by task, the `guidance_scale`; the `backbone`, with its repository and its sizes if it is not that of the
        student; and of LoRAs the SHA-256 of their tensors in float32, `tensors`, which is equal for equal tensors in
        files of any format.
    """
    known: dict[str, dict[str, Any]] = {}
    for task, config in configs.items():
        found = files[task]
        known[task] = {"guidance_scale": _guidance(config, guidance_scale), "backbone": "that of the student"}
        if found.other is not None:
            known[task]["backbone"] = found.other.told()
        if found.lora is not None:
            weights, _ = _load_lora(task, config, found, family)
            known[task]["tensors"] = weights_sha256({name: t.float() for name, t in weights.state_dict.items()})
    return known


def _load_lora(
    task: str, config: TeacherConfig, found: FoundTeacher, family: ModelFamily
) -> tuple[LoraWeights, Origin]:
    return load_lora(
        config.source(),
        weight_name=config.weight_name,
        owner=owner_of(task, config),
        found=found.lora,
        convert=family.convert_lora,
    )


def _guidance(config: TeacherConfig, guidance_scale: float) -> float:
    return float(guidance_scale if config.guidance_scale is None else config.guidance_scale)


def load_teachers(
    teachers: Mapping[str, Any] | Iterable[Any],
    transformer: nn.Module,
    *,
    guidance_scale: float,
    family: ModelFamily,
    vae: nn.Module | None = None,
    files: Mapping[str, FoundTeacher] | None = None,
    dtype: torch.dtype = torch.float32,
    show_progress: bool = True,
) -> dict[str, Teacher]:
    """
    Loads all teachers, frozen: LoRAs as fp32 adapters `teacher_<i>` on their backbone, which is `transformer` if they
    name no other, and full models. A backbone is loaded once, however many teachers are on it.

    The active adapter of `transformer` and its trainable parameters stay as they were.

    Args:
        teachers (`Mapping` or `Iterable`):
            Anything that [`normalize_teachers`] takes.
        transformer (`torch.nn.Module`):
            The student's transformer.
        guidance_scale (`float`):
            Guidance of the student, for the teachers that set none.
        family ([`ModelFamily`]):
            Family of the student's base.
        vae (`torch.nn.Module`, *optional*):
            The student's VAE. If given, that of a teacher's pipeline must have the same latents.
        files (`Mapping[str, FoundTeacher]`, *optional*):
            What [`fetch_teachers`] returned, which is called if it is not given.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Precision of backbones that are loaded here. What was given in memory stays as it is.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `dict[str, Teacher]`: the loaded teachers by task.
    """
    configs = normalize_teachers(teachers)
    files = fetch_teachers(configs, family) if files is None else files
    loaded, backbones = {}, _Backbones(transformer, family, vae, dtype)
    for index, (task, config) in enumerate(tqdm(configs.items(), desc="Loading teachers", disable=not show_progress)):
        found = files[task]
        host = backbones.get(task, found)
        teacher = Teacher(
            name=task,
            guidance_scale=_guidance(config, guidance_scale),
            adapter_name=None,
            model=None if found.other is None else host,
            fingerprint="",
            source=_named(config, host),
            origin=Origin("") if found.place is None else found.place.origin,
        )
        if found.lora is None:
            teacher.adapters = found.adapters
        else:
            teacher.base = None if found.other is None else found.other.origin
            teacher.adapter_name = f"teacher_{index}"
            teacher.adapters = (teacher.adapter_name,)
            weights, teacher.origin = _load_lora(task, config, found, family)
            add_lora(host, weights, teacher.adapter_name)
            if has_no_effect(weights.state_dict, lora_scaling(host, teacher.adapter_name)):
                logger.warning(
                    f"{weights.owner}: the LoRA changes nothing, all its updates `B @ A` are zero: the student would only "
                    "learn to be the base. Pass one that was trained."
                )
        teacher.fingerprint = teacher_fingerprint(teacher, transformer, backbones.sha256)
        loaded[task] = teacher
    return loaded


class _Backbones:
    """The transformers that teachers are on, each loaded and hashed once."""

    def __init__(self, transformer: nn.Module, family: ModelFamily, vae: nn.Module | None, dtype: torch.dtype):
        self.transformer, self.family, self.vae, self.dtype = transformer, family, vae, dtype
        self._loaded: dict[tuple, nn.Module] = {}
        self._digests: dict[int, str] = {}

    def get(self, task: str, found: FoundTeacher) -> nn.Module:
        place = found.other
        if place is None:
            return self.transformer
        check_backbone(task, place, self.transformer, self.family, self.vae)
        if place.key not in self._loaded:
            self._loaded[place.key] = load_transformer(place, self.dtype, self.family)
        return self._loaded[place.key]

    def sha256(self, host: nn.Module) -> str:
        if id(host) not in self._digests:
            self._digests[id(host)] = backbone_sha256(host)
        return self._digests[id(host)]


def _named(config: TeacherConfig, host: nn.Module) -> str:
    if isinstance(config.name_or_path, str | Path):
        return str(config.source())
    return str(host.config.get("_name_or_path") or type(host).__name__)


def teacher_fingerprint(
    teacher: Teacher, transformer: nn.Module, of_backbone: Callable[[nn.Module], str] = backbone_sha256
) -> str:
    """
    Computes the SHA-256 of the live weights of a teacher: names, dtypes, shapes, bytes and, for a LoRA, the scaling. Of a
    LoRA on another base than the student's, that base is part.

    Args:
        teacher ([`Teacher`]):
            The teacher.
        transformer (`torch.nn.Module`):
            The student's transformer, which holds the adapters.
        of_backbone (`Callable`, *optional*):
            Computes that of a backbone, or knows it.

    Returns:
        `str`: the hexadecimal digest. It equals `teacher.fingerprint` as long as nothing changed the teacher.
    """
    host = transformer if teacher.model is None else teacher.model
    if teacher.adapter_name is None:
        return weights_sha256(host.state_dict()) if teacher.adapters else of_backbone(host)
    own = adapter_sha256(host, teacher.adapter_name)
    return own if teacher.model is None else hashlib.sha256(f"{of_backbone(host)} {own}".encode()).hexdigest()
