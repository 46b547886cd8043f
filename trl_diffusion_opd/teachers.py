# SPDX-License-Identifier: Apache-2.0
"""The teachers: what they are, how they are loaded beside the student, and how one of them is switched on."""

import hashlib
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm.auto import tqdm

from .lora import add_lora, lora_scaling, lora_state_dict, read_lora
from .sources import Source, check_not_pickle, parse_source, resolve


if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline, SD3Transformer2DModel


@dataclass
class TeacherConfig:
    r"""
    Where one teacher comes from and how it is queried.

    Args:
        name_or_path (`str`, `Path`, `SD3Transformer2DModel` or `DiffusionPipeline`):
            A LoRA as a local file or folder or as `"owner/repo"`, `"owner/repo/sub/folder"` or
            `"owner/repo/sub/folder@revision"` on the Hub; or a full model, already loaded.
        subfolder (`str`, *optional*):
            Folder of the LoRA inside the repository or the local folder.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.
        weight_name (`str`, *optional*):
            Safetensors file to load, if it has not one of the usual names.
        guidance_scale (`float`, *optional*):
            Classifier-free guidance of this teacher. Not set means the one of the student. A teacher that was trained
            without guidance should be queried at 1.0.
        task (`str`, *optional*):
            Task this teacher teaches, needed if the teachers are given as a list.

    Example:

    ```python
    >>> TeacherConfig("quanhaol/DiffusionOPD", subfolder="GenEvalTeacher/lora", guidance_scale=1.0)
    ```
    """

    name_or_path: "str | Path | SD3Transformer2DModel | DiffusionPipeline" = field(
        metadata={
            "help": "A LoRA as a local file or folder or as `owner/repo/sub/folder@revision` on the Hub; or a full "
            "model, already loaded."
        },
    )
    subfolder: str | None = field(
        default=None, metadata={"help": "Folder of the LoRA inside the repository or the local folder."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the Hub repository."})
    weight_name: str | None = field(
        default=None, metadata={"help": "Safetensors file to load, if it has not one of the usual names."}
    )
    guidance_scale: float | None = field(
        default=None,
        metadata={
            "help": "Classifier-free guidance of this teacher. Not set means the one of the student. A teacher that "
            "was trained without guidance should be queried at 1.0."
        },
    )
    task: str | None = field(
        default=None, metadata={"help": "Task this teacher teaches, needed if the teachers are given as a list."}
    )

    def __post_init__(self):
        scale = self.guidance_scale
        if scale is not None and not (_is_number(scale) and math.isfinite(scale) and scale >= 0):
            raise ValueError(f"`guidance_scale` of a teacher must be a finite number of at least 0, but is {scale!r}.")
        if isinstance(self.name_or_path, str | Path):
            self.source()
        else:
            _full_model(self.name_or_path)
            for name in ("subfolder", "revision", "weight_name"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}={getattr(self, name)!r}` was given for a teacher that is already loaded as a "
                        f"{type(self.name_or_path).__name__}. Leave it out, or pass a path or a Hub name."
                    )

    def source(self) -> Source:
        """Returns the location of a LoRA teacher, with the subfolder and the revision put in."""
        source = parse_source(self.name_or_path)
        for name in ("subfolder", "revision"):
            if getattr(self, name) is not None and getattr(source, name) is not None:
                raise ValueError(
                    f"The {name} of a teacher was given twice: {getattr(source, name)!r} in {self.name_or_path!r} and "
                    f"`{name}={getattr(self, name)!r}`. Keep one of them."
                )
        if self.weight_name is not None:
            check_not_pickle(self.weight_name, f"teacher {source}")
        if source.path is not None:
            if self.revision is not None:
                raise ValueError(
                    f"`revision={self.revision!r}` was given for the local teacher {str(source.path)!r}, but only Hub "
                    "repositories have revisions. Leave it out."
                )
            return Source(path=source.path / self.subfolder if self.subfolder else source.path)
        return Source(source.repo_id, self.subfolder or source.subfolder, self.revision or source.revision)


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
            Where it came from.
        commit (`str`, *optional*):
            The Hub commit it came from.
    """

    name: str
    guidance_scale: float
    adapter_name: str | None
    model: nn.Module | None = field(repr=False)
    fingerprint: str
    source: str
    commit: str | None


def normalize_teachers(teachers: Mapping[str, Any] | Iterable[Any]) -> dict[str, TeacherConfig]:
    """
    Brings all ways to name the teachers into one: a dict from task to [`TeacherConfig`].

    Args:
        teachers (`Mapping` or `Iterable`):
            Either a mapping from task to a path, a Hub name, a [`TeacherConfig`], a dict with its fields, or a loaded
            `SD3Transformer2DModel` or pipeline; or a list of [`TeacherConfig`] or dicts, each with its `task`.

    Returns:
        `dict[str, TeacherConfig]`: one entry per task, in the given order. A loaded model is its `name_or_path`.
    """
    if isinstance(teachers, str | Path | TeacherConfig):
        raise TypeError(f"`teachers` must map each task to a teacher, as in {{'ocr': teacher}}, but is {teachers!r}.")
    if isinstance(teachers, Mapping):
        pairs = [(task, _as_config(teacher, f"the teacher of task {task!r}")) for task, teacher in teachers.items()]
    else:
        configs = [_as_config(teacher, f"teacher number {i}") for i, teacher in enumerate(teachers)]
        pairs = [(config.task, config) for config in configs]
    if not pairs:
        raise ValueError("`teachers` is empty. Give at least one, as in {'ocr': 'owner/repo/subfolder'}.")
    normalized: dict[str, TeacherConfig] = {}
    seen: dict[str, str] = {}
    for task, config in pairs:
        if task is None:
            raise ValueError(f"{config!r} has no `task`. In a list of teachers each must name the task it teaches.")
        if not isinstance(task, str) or not task or task != task.strip():
            raise ValueError(f"A task must be a non-empty string without spaces around it, but is {task!r}.")
        if config.task is not None and config.task != task:
            raise ValueError(f"The teacher under task {task!r} says `task={config.task!r}`. Leave out one of the two.")
        if task.lower() in seen:
            raise ValueError(
                f"The tasks {seen[task.lower()]!r} and {task!r} are the same up to the case, but a task must be bound "
                "to one teacher only. Rename or remove one of them."
            )
        seen[task.lower()] = task
        normalized[task] = config
    return normalized


def check_tasks(teachers: Iterable[str], prompts: Iterable[str]) -> None:
    """
    Raises a `ValueError` unless the tasks of the teachers are exactly the tasks of the prompts.

    Args:
        teachers (`Iterable[str]`):
            Tasks of the teachers, for example the dict that [`normalize_teachers`] returns.
        prompts (`Iterable[str]`):
            Tasks of the prompts: a `task` column, or a mapping from task to prompts, in which an empty list is as good
            as none.
    """
    if isinstance(prompts, Mapping):
        prompts = [task for task, rows in prompts.items() if len(rows) > 0]
    taught, asked = sorted(set(teachers)), sorted(set(prompts))
    problems = []
    if unknown := sorted(set(asked) - set(taught)):
        problems.append(f"there are prompts of tasks without a teacher: {unknown}")
    if idle := sorted(set(taught) - set(asked)):
        problems.append(f"there are teachers without prompts: {idle}")
    if problems:
        raise ValueError(
            f"The tasks of the teachers {taught} and of the prompts {asked} must be the same, but "
            f"{' and '.join(problems)}. Rename the tasks, or add or remove what is left over."
        )


def load_teachers(
    teachers: Mapping[str, Any] | Iterable[Any],
    transformer: nn.Module,
    *,
    guidance_scale: float,
    vae: "AutoencoderKL | None" = None,
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
        vae (`AutoencoderKL`, *optional*):
            The student's VAE. If given, that of a teacher pipeline must have the same latents.

    Returns:
        `dict[str, Teacher]`: the loaded teachers by task.
    """
    loaded = {}
    configs = normalize_teachers(teachers)
    for index, (task, config) in enumerate(tqdm(configs.items(), desc="Loading teachers", disable=None)):
        teacher = Teacher(
            name=task,
            guidance_scale=float(guidance_scale if config.guidance_scale is None else config.guidance_scale),
            adapter_name=None,
            model=None,
            fingerprint="",
            source="",
            commit=None,
        )
        if isinstance(config.name_or_path, str | Path):
            source = config.source()
            owner = f"teacher {task!r} ({source})"
            resolved = resolve(source, weight_name=config.weight_name, owner=owner)
            teacher.adapter_name = f"teacher_{index}"
            teacher.source, teacher.commit = str(source), resolved.commit
            weight_name = config.weight_name if resolved.path.is_dir() else None
            add_lora(transformer, read_lora(resolved.path, weight_name=weight_name, owner=owner), teacher.adapter_name)
        else:
            teacher.model = _full_model(config.name_or_path)
            name = teacher.model.config.get("_name_or_path")
            teacher.source = str(name or type(teacher.model).__name__)
            _check_full_model(task, config.name_or_path, teacher.model, transformer, vae)
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
    digest = hashlib.sha256()
    if teacher.model is not None:
        tensors = teacher.model.state_dict()
    else:
        tensors = lora_state_dict(transformer, teacher.adapter_name)
        for name, scaling in sorted(lora_scaling(transformer, teacher.adapter_name).items()):
            digest.update(f"{name} {float(scaling)!r}\n".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def use_adapter(transformer: nn.Module, *adapter_names: str) -> Iterator[None]:
    """
    Activates an adapter for forwards without gradient and puts the previous one (the student) back, whatever happens.

    No `requires_grad` flag is touched: the student stays trainable and the teachers stay frozen.

    Args:
        transformer (`torch.nn.Module`):
            The model that has the adapter, without any wrapper of a parallel backend.
        adapter_names (`str`):
            The adapter to activate; with several, their updates add up.
    """
    for adapter_name in adapter_names:
        if adapter_name not in getattr(transformer, "peft_config", {}):
            present = sorted(getattr(transformer, "peft_config", {}))
            raise ValueError(f"The transformer has no adapter called {adapter_name!r}; it has: {present}.")
    with _switch(transformer, list(adapter_names), False):
        yield


@contextmanager
def base_only(transformer: nn.Module) -> Iterator[None]:
    """
    Turns all adapters off for forwards without gradient and puts the previous state back, whatever happens.

    Args:
        transformer (`torch.nn.Module`):
            The model, with or without adapters.
    """
    with _switch(transformer, None, True):
        yield


# Transformer -> (its adapters' configs, its tuner layers). Walking over all modules for each switch would cost more
# than the switch itself. A new set of adapters has new config objects, which makes an entry stale.
_TUNER_LAYERS: "weakref.WeakKeyDictionary[nn.Module, tuple[list, list[BaseTunerLayer]]]" = weakref.WeakKeyDictionary()


def _tuner_layers(transformer: nn.Module) -> list[BaseTunerLayer]:
    configs = list(getattr(transformer, "peft_config", {}).values())
    known, layers = _TUNER_LAYERS.get(transformer, ([], []))
    if len(known) != len(configs) or any(a is not b for a, b in zip(known, configs, strict=True)):
        layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
        _TUNER_LAYERS[transformer] = (configs, layers)
    return layers


@contextmanager
def _switch(transformer: nn.Module, active: list[str] | None, disabled: bool) -> Iterator[None]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "Adapters can only be switched with gradients disabled, because activation checkpointing runs the student "
            "again during the backward and would find another adapter active. Wrap the call in `torch.no_grad()`."
        )
    layers = _tuner_layers(transformer)
    # PEFT's own attributes are set, because its public `set_adapter` and `enable_adapters` also flip `requires_grad`
    # of every adapter: that freezes the student, unfreezes the teacher and can cost as much as a forward.
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            _set_state(layer, layer._active_adapter if active is None else active, disabled)
        yield
    finally:
        for layer, (was_active, was_disabled) in zip(layers, before, strict=True):
            _set_state(layer, was_active, was_disabled)


def _set_state(layer: BaseTunerLayer, active: str | list[str], disabled: bool) -> None:
    layer._active_adapter = active
    if layer._disable_adapters is not disabled:  # writing an attribute of a module is slow
        layer._disable_adapters = disabled


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_config(teacher: Any, which: str) -> TeacherConfig:
    if isinstance(teacher, TeacherConfig):
        return teacher
    if not isinstance(teacher, Mapping):
        return TeacherConfig(teacher)
    names = [item.name for item in fields(TeacherConfig)]
    if "name_or_path" not in teacher or not set(teacher) <= set(names):
        raise ValueError(
            f"{which.capitalize()} must be a dict with `name_or_path` and, if needed, other fields out of {names}, "
            f"but has the fields {list(teacher)}."
        )
    return TeacherConfig(**teacher)


def _full_model(teacher: Any) -> "SD3Transformer2DModel":
    """Returns the transformer of a teacher that was given as an object."""
    from diffusers import DiffusionPipeline, SD3Transformer2DModel

    model = getattr(teacher, "transformer", None) if isinstance(teacher, DiffusionPipeline) else teacher
    if not isinstance(model, SD3Transformer2DModel):
        raise TypeError(
            "A teacher must be a path or Hub name of a LoRA, a `TeacherConfig`, a dict with its fields, an "
            f"`SD3Transformer2DModel` or a pipeline that has one, but is a {type(teacher).__name__}."
        )
    return model


def _check_full_model(task: str, given: Any, model: nn.Module, transformer: nn.Module, vae: nn.Module | None) -> None:
    if model is transformer:
        raise ValueError(
            f"The teacher of task {task!r} is the student's own transformer. Load the teacher as a separate model."
        )
    for name in ("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim"):
        theirs, ours = model.config[name], transformer.config[name]
        if theirs != ours:
            raise ValueError(
                f"The teacher of task {task!r} has `{name}={theirs}` but the student has `{name}={ours}`. They are "
                "given the same latents and the same text embeddings: use a teacher of the same model family."
            )
    if given is model or vae is None or getattr(given, "vae", None) is None:
        return
    for name in ("latent_channels", "scaling_factor", "shift_factor"):
        theirs, ours = given.vae.config[name], vae.config[name]
        if theirs != ours:
            raise ValueError(
                f"The VAE of the teacher of task {task!r} has `{name}={theirs}` but that of the student has "
                f"`{name}={ours}`. They must share the latent space: use a teacher with the same VAE."
            )
