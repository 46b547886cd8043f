# SPDX-License-Identifier: Apache-2.0
"""What the demo of a student shows, gathered from its `run.json` or its card."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..hub.download import fetch
from ..hub.errors import SourceError, hub_errors, retried
from ..hub.locations import DIFFUSERS_WEIGHT_NAME, PEFT_CONFIG_NAME, PEFT_WEIGHT_NAME, Origin, Source, parse_source
from ..models.family import Configs, ModelFamily
from ..models.loading import read_configs
from ..models.registry import DEFAULT_PIPELINE, FAMILIES, family_named
from .record import RECORD_FILE, RunRecord


CARD_FILE = "README.md"
EXAMPLES_PER_TASK = 4


@dataclass
class SpaceContent:
    """
    What a demo shows.

    Args:
        title (`str`):
            Its title.
        description (`str`):
            What the student is.
        student ([`Source`]), base ([`Source`]), teachers (`dict[str, Source]`):
            Where the models are: on the Hub, if possible at a commit, or on this machine.
        prompts (`dict[str, list[str]]`):
            Example prompts of each task.
        defaults (`dict`):
            `num_inference_steps`, `guidance_scale` (where 1 is none), and other arguments for the pipeline's call.
        guidance (`dict`):
            How the pipeline is told: the `argument`, which is `guidance_scale` plus an `offset`, `info` about it, and
            whether it is `fixed`.
        dtype (`str`):
            Precision on a GPU.
    """

    title: str
    description: str
    student: Source
    base: Source
    teachers: dict[str, Source]
    prompts: dict[str, list[str]]
    defaults: dict[str, Any]
    guidance: dict[str, Any]
    dtype: str

    @property
    def models(self) -> dict[str, Source]:
        """All models, by what the folder of each is called where it is part of a Space."""
        folders = {task: f"teachers/{name}" for task, name in _folder_names(list(self.teachers)).items()}
        teachers = {folders[task]: source for task, source in self.teachers.items()}
        return {"base": self.base, "student": self.student, **teachers}


def _folder_names(tasks: list[str]) -> dict[str, str]:
    """A name for a folder of each task, which may be called anything, such as `../..`."""
    names: dict[str, str] = {}
    for index, task in enumerate(tasks):
        name = re.sub("[^a-zA-Z0-9_-]+", "_", task)[:40]
        names[task] = f"{name}_{index}" if name in ("", *names.values()) or name != task else name
    return names


def gather(
    student: str | Path,
    base: str | Path | None = None,
    title: str | None = None,
    teachers: dict[str, str | Path] | None = None,
    prompts: dict[str, list[str]] | None = None,
    token: str | None = None,
) -> SpaceContent:
    """Gathers what the demo of a student shows; for the arguments see [`write_space`]."""
    source, record, card = _read_student(parse_source(student, kind="student"), token)
    inference = {name: value for name, value in record.inference.items() if value is not None} if record else {}
    if teachers is None:
        # Others than LoRAs on the student's base would need a pipeline of their own.
        rows = [row for row in record.teachers if row.is_lora and row.base is None] if record else []
        recorded = {row.task: _source_of(row.origin) for row in rows}
        sources = {task: teacher for task, teacher in recorded.items() if teacher is not None}
    else:
        sources = {task: parse_source(teacher) for task, teacher in teachers.items()}
    for task, teacher in sources.items():
        if teacher.path is not None:
            lora_files(teacher.path, f"teacher {task!r}")
    base_source, pipeline_class = _find_base(base, student, record, card, token)
    family = family_named(pipeline_class)
    access = {"token": token} if token else None
    configs = read_configs(base_source.path or str(base_source), Origin.of_source(base_source, None), access)
    guidance, extra = _guidance(family, configs)
    inference.pop(guidance["argument"], None)
    if record is not None:
        inference["guidance_scale"] = record.guidance_scale
    else:
        defaults = family.defaults(configs)
        names = ("num_inference_steps", "guidance_scale", "max_sequence_length")
        inference = {name: getattr(defaults, name) for name in names}
    name = source.repo_id or source.path.resolve().name
    return SpaceContent(
        title=title or (record.name if record else name.split("/")[-1]),
        description=record.summary if record else f"A LoRA for {base_source.repo_id or base_source.path.name}.",
        student=source,
        base=base_source,
        teachers=sources,
        prompts=_examples(record, card) if prompts is None else prompts,
        defaults=extra | inference,
        guidance=guidance,
        dtype=record.dtype if record else "bfloat16",
    )


def lora_files(path: Path, owner: str) -> list[Path]:
    """
    The files of a LoRA on this machine: its weights, in the format of PEFT with its config.

    Raises:
        `SourceError`: there are none.
    """
    if path.is_file() and path.name != PEFT_WEIGHT_NAME:
        return [path]
    path = path.parent if path.is_file() else path
    if (path / PEFT_CONFIG_NAME).is_file() and (path / PEFT_WEIGHT_NAME).is_file():
        return [path / PEFT_WEIGHT_NAME, path / PEFT_CONFIG_NAME]
    if (path / DIFFUSERS_WEIGHT_NAME).is_file():
        return [path / DIFFUSERS_WEIGHT_NAME]
    raise SourceError(
        f"{owner}: there is no {DIFFUSERS_WEIGHT_NAME!r} and no {PEFT_WEIGHT_NAME!r} in {str(path)!r}. Pass the folder "
        "of a LoRA."
    )


def _read_student(source: Source, token: str | None) -> tuple[Source, RunRecord | None, dict[str, Any]]:
    """The student's place, on the Hub pinned to a commit, its record if there is one, or else its card."""
    if source.path is not None:
        lora_files(source.path, "student")
        files = {name: source.path / name for name in (RECORD_FILE, CARD_FILE)}
        files = {name: file for name, file in files.items() if file.is_file()}
    else:
        source, names = pin_lora(source, "student", token)
        wanted = {RECORD_FILE, CARD_FILE}.intersection(names)
        files = {name: fetch(source, name, "student", token=token).path for name in wanted}
    if RECORD_FILE in files:
        return source, RunRecord.load(files[RECORD_FILE].parent), {}
    if CARD_FILE in files:
        from huggingface_hub import ModelCard

        return source, None, ModelCard.load(files[CARD_FILE], ignore_metadata_errors=True).data.to_dict()
    return source, None, {}


def pin_lora(source: Source, owner: str, token: str | None) -> tuple[Source, list[str]]:
    """
    A LoRA on the Hub at the commit that it is at, and the names of the files beside it.

    Raises:
        `SourceError`: it is not there.
    """
    from huggingface_hub import HfApi

    api, prefix = HfApi(token=token), f"{source.subfolder}/" if source.subfolder else ""
    with hub_errors(source, owner):
        info = retried(lambda: api.model_info(source.repo_id, revision=source.revision))
    names = [file.rfilename.removeprefix(prefix) for file in info.siblings if file.rfilename.startswith(prefix)]
    if DIFFUSERS_WEIGHT_NAME not in names and PEFT_WEIGHT_NAME not in names:
        raise SourceError(
            f"{owner}: there is no {DIFFUSERS_WEIGHT_NAME!r} in {source}. Check the spelling, or push the LoRA first "
            "(`trl-diffusion-opd push FOLDER`)."
        )
    return replace(source, revision=info.sha), names


def _source_of(origin: Origin) -> Source | None:
    """Where a model that a run was made from is on the Hub; `None` for what was local."""
    if origin.repo_id is None:
        return None
    subfolder = "/".join(origin.name.partition("@")[0].split("/")[2:])
    return Source(repo_id=origin.repo_id, subfolder=subfolder or None, revision=origin.commit)


def _find_base(
    base: str | Path | None,
    student: str | Path,
    record: RunRecord | None,
    card: dict[str, Any],
    token: str | None,
) -> tuple[Source, str]:
    """Where the base is, and the class of its pipeline."""
    if base is None and record is not None:
        if (source := _source_of(record.base)) is None:
            raise ValueError(
                f"The base of {str(student)!r} was the local folder {record.base.name!r}. Pass where it is as `base`."
            )
        pipeline_class = record.pipeline_class or DEFAULT_PIPELINE
        _check_pipeline(pipeline_class, record.base.name)
        return source, pipeline_class
    base = base or card.get("base_model")
    if not isinstance(base, str | Path):
        raise ValueError(
            f"Neither a {RECORD_FILE!r} nor a card of {str(student)!r} says what it is a LoRA for. Pass it as `base`."
        )
    source = parse_source(base, kind="base")
    if source.path is not None:
        index, commit = source.path / "model_index.json", None
        if not index.is_file():
            raise ValueError(
                f"`base`: there is no 'model_index.json' in {str(base)!r}. Pass the folder of a pipeline."
            )
    else:
        found = fetch(source, "model_index.json", "base", token=token)
        index, commit = found.path, found.commit
    pipeline_class = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    _check_pipeline(pipeline_class, base)
    return (source if commit is None else replace(source, revision=commit)), pipeline_class


def _guidance(family: ModelFamily, configs: Configs) -> tuple[dict[str, Any], dict[str, Any]]:
    """How a pipeline is told our guidance scale, in which 1 is none; and what else its call needs for it."""
    none, some = (family.call_arguments(scale, 1) for scale in (1.0, 2.0))
    [argument] = [name for name in none if none[name] != some[name]]
    try:
        family.check_guidance(configs, 2.0)
        fixed = False
    except ValueError:
        fixed = True
    guidance = {"argument": argument, "offset": none[argument] - 1.0, "info": family.guidance_info, "fixed": fixed}
    return guidance, {name: value for name, value in some.items() if name not in none}


def _check_pipeline(name: str | None, base: str | Path) -> None:
    if not isinstance(name, str) or name not in FAMILIES:
        known = " or ".join(map(repr, sorted(FAMILIES)))
        raise ValueError(f"`base`: {base} is a {name!r}, and the demo is made for a {known}.")


def _examples(record: RunRecord | None, card: dict[str, Any]) -> dict[str, list[str]]:
    if record is not None:
        images = [(row.task, row.prompt) for row in record.gallery]
    else:
        images = [(None, row["text"]) for row in card.get("widget") or [] if row.get("text")]
    prompts = {}
    for task, prompt in dict.fromkeys(images):
        prompts.setdefault(task or "examples", []).append(prompt)
    return {task: texts[:EXAMPLES_PER_TASK] for task, texts in prompts.items()}
