# SPDX-License-Identifier: Apache-2.0
"""What a teacher is, in all the ways that it can be named, and which task it teaches."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hub.locations import Source, check_inside, check_not_pickle, parse_source


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin


@dataclass
class TeacherConfig:
    r"""
    Where one teacher comes from and how it is queried.

    Args:
        name_or_path (`str`, `Path`, `ModelMixin` or `DiffusionPipeline`):
            A LoRA as a local file or folder or as `"owner/repo"`, `"owner/repo/sub/folder"` or
            `"owner/repo/sub/folder@revision"` on the Hub; or a full model, named in the same way (the folder of a
            transformer or of a whole pipeline) or already loaded.
        subfolder (`str`, *optional*):
            Folder inside the repository or the local folder.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.
        weight_name (`str`, *optional*):
            Safetensors file of a LoRA to load, if it has not one of the usual names.
        base (`str`, `Path`, `ModelMixin` or `DiffusionPipeline`, *optional*):
            The pipeline that a LoRA was trained on, if it is another one than the student's with the same latents and
            text encoders: `"owner/repo[@revision]"` on the Hub or a local folder, of which the transformer is loaded,
            or what is loaded already. Teachers that name the same one share it.
        guidance_scale (`float`, *optional*):
            Classifier-free guidance of this teacher. Not set means the one of the student. A teacher that was trained
            without guidance should be queried at 1.0.
        task (`str`, *optional*):
            Task this teacher teaches, needed if the teachers are given as a list.

    Example:

    ```python
    >>> TeacherConfig("quanhaol/DiffusionOPD", subfolder="GenEvalTeacher/lora", guidance_scale=1.0)
    >>> TeacherConfig("stabilityai/stable-diffusion-3.5-large", subfolder="transformer")  # a full model
    >>> TeacherConfig("path/to/lora", base="stabilityai/stable-diffusion-3.5-large")
    ```
    """

    name_or_path: "str | Path | ModelMixin | DiffusionPipeline" = field(
        metadata={
            "help": "A LoRA as a local file or folder or as `owner/repo/sub/folder@revision` on the Hub; or a full "
            "model, named in the same way or already loaded."
        },
    )
    subfolder: str | None = field(default=None, metadata={"help": "Folder inside the repository or the local folder."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the Hub repository."})
    weight_name: str | None = field(
        default=None, metadata={"help": "Safetensors file of a LoRA to load, if it has not one of the usual names."}
    )
    base: "str | Path | ModelMixin | DiffusionPipeline | None" = field(
        default=None,
        metadata={
            "help": "The pipeline that a LoRA was trained on, if it is another one than the student's: "
            "`owner/repo[@revision]` on the Hub, a local folder, or already loaded."
        },
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
        if isinstance(self.base, str | Path):
            parse_source(self.base, kind="base")
        elif self.base is not None:
            full_model(self.base)
        if isinstance(self.name_or_path, str | Path):
            self.source()
        else:
            full_model(self.name_or_path)
            for name in ("subfolder", "revision", "weight_name", "base"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}={getattr(self, name)!r}` was given for a teacher that is already loaded as a "
                        f"{type(self.name_or_path).__name__}. Leave it out, or pass a path or a Hub name."
                    )

    def source(self) -> Source:
        """Returns the location of a teacher that was named, with the subfolder and the revision put in."""
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
        for inside in (self.subfolder, self.weight_name):
            check_inside(inside or "", "teacher's")
        return Source(source.repo_id, self.subfolder or source.subfolder, self.revision or source.revision)


def normalize_teachers(teachers: Mapping[str, Any] | Iterable[Any]) -> dict[str, TeacherConfig]:
    """
    Brings all ways to name the teachers into one: a dict from task to [`TeacherConfig`].

    Args:
        teachers (`Mapping` or `Iterable`):
            Either a mapping from task to a path, a Hub name, a [`TeacherConfig`], a dict with its fields, or a loaded
            transformer or pipeline; or a list of [`TeacherConfig`] or dicts, each with its `task`.

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


def full_model(teacher: Any) -> "ModelMixin":
    """Returns the transformer of a teacher, or of a base, that was given as an object."""
    from diffusers import DiffusionPipeline, ModelMixin

    model = getattr(teacher, "transformer", None) if isinstance(teacher, DiffusionPipeline) else teacher
    if not isinstance(model, ModelMixin):
        raise TypeError(
            "A teacher must be a path or Hub name of a LoRA or a full model, a `TeacherConfig`, a dict with its fields, "
            f"a transformer of diffusers or a pipeline that has one, but is a {type(teacher).__name__}."
        )
    return model
