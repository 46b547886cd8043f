# SPDX-License-Identifier: Apache-2.0
"""The teachers, loaded beside the student and frozen."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..hub.download import resolve
from ..hub.locations import Origin, Resolved
from ..lora.adapters import add_lora, has_no_effect, lora_scaling
from ..lora.files import load_lora
from ..lora.fingerprints import adapter_sha256, weights_sha256
from ..models.family import ModelFamily
from .config import TeacherConfig, full_model, normalize_teachers


logger = logging.getLogger(__name__)


@dataclass
class Teacher:
    """
    A loaded teacher: an adapter on the student's transformer or a model of its own.

    Args:
        name (`str`):
            The task it teaches.
        guidance_scale (`float`):
            Classifier-free guidance it is queried with.
        adapter_name (`str`, *optional*):
            Its adapter on the student's transformer; not set for a full model.
        model (`torch.nn.Module`, *optional*):
            The full model; not set for an adapter.
        fingerprint (`str`):
            SHA-256 of its weights as loaded. See [`teacher_fingerprint`].
        source (`str`):
            Where it came from, as it was named.
        origin ([`Origin`]):
            Where it came from, with the Hub commit and without naming this machine.
    """

    name: str
    guidance_scale: float
    adapter_name: str | None
    model: nn.Module | None = field(repr=False)
    fingerprint: str
    source: str
    origin: Origin

    @property
    def commit(self) -> str | None:
        """The Hub commit it came from."""
        return self.origin.commit


def fetch_teachers(configs: Mapping[str, TeacherConfig], family: ModelFamily | None = None) -> dict[str, Resolved]:
    """
    Makes sure that the files of all LoRA teachers are on this machine and can be read, before anything large is loaded.

    Args:
        configs (`Mapping[str, TeacherConfig]`):
            What [`normalize_teachers`] returns.
        family ([`ModelFamily`], *optional*):
            Family of the base, for LoRAs under the names of other programs.

    Returns:
        `dict[str, Resolved]`: the files of each LoRA teacher, by task.

    Raises:
        `SourceError`: one cannot be found or fetched; the message says what to do.
        `ValueError`: one cannot be right; the message says why.
    """
    files = {}
    for task, config in configs.items():
        if isinstance(config.name_or_path, str | Path):
            source, owner = config.source(), _owner(task, config)
            files[task] = resolve(source, weight_name=config.weight_name, owner=owner)
            convert = family and family.convert_lora
            load_lora(source, weight_name=config.weight_name, owner=owner, found=files[task], convert=convert)
    return files


def read_fingerprints(
    configs: Mapping[str, TeacherConfig],
    files: Mapping[str, Resolved],
    guidance_scale: float,
    family: ModelFamily | None = None,
) -> dict[str, dict[str, Any]]:
    """
    What can be told of teachers before they are loaded.

    Args:
        configs (`Mapping[str, TeacherConfig]`), guidance_scale (`float`):
            As of [`load_teachers`].
        files (`Mapping[str, Resolved]`):
            What [`fetch_teachers`] returned.
        family ([`ModelFamily`], *optional*):
            As of [`fetch_teachers`].

    Returns:
        `dict`: by task, the `guidance_scale`, and of LoRAs the SHA-256 of their tensors in float32, `tensors`, which is
        equal for equal tensors in files of any format.
    """
    known: dict[str, dict[str, Any]] = {}
    for task, config in configs.items():
        known[task] = {"guidance_scale": _guidance(config, guidance_scale)}
        if task in files:
            weights, _ = load_lora(
                config.source(),
                weight_name=config.weight_name,
                owner=_owner(task, config),
                found=files[task],
                convert=family and family.convert_lora,
            )
            known[task]["tensors"] = weights_sha256({name: t.float() for name, t in weights.state_dict.items()})
    return known


def _guidance(config: TeacherConfig, guidance_scale: float) -> float:
    return float(guidance_scale if config.guidance_scale is None else config.guidance_scale)


def _owner(task: str, config: TeacherConfig) -> str:
    return f"teacher {task!r} ({config.source()})"


def load_teachers(
    teachers: Mapping[str, Any] | Iterable[Any],
    transformer: nn.Module,
    *,
    guidance_scale: float,
    family: ModelFamily,
    vae: nn.Module | None = None,
    files: Mapping[str, Resolved] | None = None,
    show_progress: bool = True,
) -> dict[str, Teacher]:
    """
    Loads all teachers, frozen: LoRAs as fp32 adapters `teacher_<i>` on `transformer`, full models as they are.

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
            The student's VAE. If given, that of a teacher pipeline must have the same latents.
        files (`Mapping[str, Resolved]`, *optional*):
            What [`fetch_teachers`] returned, which is called if it is not given.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `dict[str, Teacher]`: the loaded teachers by task.
    """
    loaded = {}
    configs = normalize_teachers(teachers)
    files = fetch_teachers(configs, family) if files is None else files
    for index, (task, config) in enumerate(tqdm(configs.items(), desc="Loading teachers", disable=not show_progress)):
        teacher = Teacher(
            name=task,
            guidance_scale=_guidance(config, guidance_scale),
            adapter_name=None,
            model=None,
            fingerprint="",
            source="",
            origin=Origin(""),
        )
        if isinstance(config.name_or_path, str | Path):
            source, owner = config.source(), _owner(task, config)
            teacher.adapter_name = f"teacher_{index}"
            weights, teacher.origin = load_lora(
                source, weight_name=config.weight_name, owner=owner, found=files[task], convert=family.convert_lora
            )
            teacher.source = str(source)
            add_lora(transformer, weights, teacher.adapter_name)
            if has_no_effect(weights.state_dict, lora_scaling(transformer, teacher.adapter_name)):
                logger.warning(
                    f"{owner}: the LoRA changes nothing, all its updates `B @ A` are zero: the student would only learn "
                    "to be the base. Pass one that was trained."
                )
        else:
            teacher.model = full_model(config.name_or_path)
            name = teacher.model.config.get("_name_or_path")
            teacher.source = str(name or type(teacher.model).__name__)
            teacher.origin = Origin.of_model(config.name_or_path)
            _check_full_model(task, config.name_or_path, teacher.model, transformer, family, vae)
            teacher.model.eval().requires_grad_(False)
        teacher.fingerprint = teacher_fingerprint(teacher, transformer)
        loaded[task] = teacher
    return loaded


def teacher_fingerprint(teacher: Teacher, transformer: nn.Module) -> str:
    """
    Computes the SHA-256 of the live weights of a teacher: names, dtypes, shapes, bytes and, for a LoRA, the scaling.

    Args:
        teacher ([`Teacher`]):
            The teacher.
        transformer (`torch.nn.Module`):
            The student's transformer, which holds the adapters.

    Returns:
        `str`: the hexadecimal digest. It equals `teacher.fingerprint` as long as nothing changed the teacher.
    """
    if teacher.model is not None:
        return weights_sha256(teacher.model.state_dict())
    return adapter_sha256(transformer, teacher.adapter_name)


def _check_full_model(
    task: str,
    given: Any,
    model: nn.Module,
    transformer: nn.Module,
    family: ModelFamily,
    vae: nn.Module | None,
) -> None:
    if not isinstance(model, family.transformer_class):
        raise ValueError(
            f"The teacher of task {task!r} is a {type(model).__name__} but the student is a "
            f"{family.transformer_class.__name__}. Use a teacher of the same model family."
        )
    if model is transformer:
        raise ValueError(
            f"The teacher of task {task!r} is the student's own transformer. Load the teacher as a separate model."
        )
    for name in family.same_transformer:
        theirs, ours = model.config[name], transformer.config[name]
        if theirs != ours:
            raise ValueError(
                f"The teacher of task {task!r} has `{name}={theirs}` but the student has `{name}={ours}`. They are "
                "given the same latents and the same text embeddings: use a teacher of the same model family."
            )
    if given is model or vae is None or getattr(given, "vae", None) is None:
        return
    for name in family.same_vae:
        theirs, ours = given.vae.config[name], vae.config[name]
        if theirs != ours:
            raise ValueError(
                f"The VAE of the teacher of task {task!r} has `{name}={theirs}` but that of the student has "
                f"`{name}={ours}`. They must share the latent space: use a teacher with the same VAE."
            )
