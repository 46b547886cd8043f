# SPDX-License-Identifier: Apache-2.0
"""What a run was: everything that its model card and its demo tell, saved as `run.json` beside the LoRA."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..hub.licenses import License, read_license
from ..hub.locations import Origin, parse_source
from ..utils.serialization import write_json


RECORD_FILE = "run.json"


@dataclass
class PromptSet:
    """
    The prompts of a task.

    Args:
        task (`str`):
            Name of the task.
        origin ([`Origin`]):
            Where they come from.
        num_prompts (`int`, *optional*):
            How many there are; not set for a streamed set.
        num_images (`int`, *optional*):
            Images that an evaluation draws of them.
        num_seen (`int`, *optional*):
            How many prompts of an evaluation are training prompts too.
        examples (`list[str]`, *optional*):
            A few of them.
    """

    task: str
    origin: Origin
    num_prompts: int | None = None
    num_images: int | None = None
    num_seen: int | None = None
    examples: list[str] = field(default_factory=list)


@dataclass
class TeacherRecord:
    """
    A teacher.

    Args:
        task (`str`):
            The task it teaches.
        origin ([`Origin`]):
            Where it comes from.
        guidance_scale (`float`):
            Classifier-free guidance it is queried with.
        sha256 (`str`):
            Fingerprint of its weights as loaded.
        is_lora (`bool`, *optional*, defaults to `True`):
            Whether it is a LoRA; else a full model.
        base ([`Origin`], *optional*):
            The base that it is a LoRA on, if that is another one than the student's.
    """

    task: str
    origin: Origin
    guidance_scale: float
    sha256: str
    is_lora: bool = True
    base: Origin | None = None


@dataclass
class GalleryImage:
    """
    An image of the student, drawn with a fixed seed.

    Args:
        prompt (`str`):
            Its prompt.
        file (`str`):
            Its path in the run's folder.
        task (`str`, *optional*):
            The task of the prompt.
        seed (`int`, *optional*):
            Seed of its noise.
        round (`int`, *optional*):
            Optimizer steps after which it was drawn.
    """

    prompt: str
    file: str
    task: str | None = None
    seed: int | None = None
    round: int | None = None


@dataclass
class BenchmarkScore:
    """
    A score of the LoRA on a benchmark, from `trl-diffusion-opd eval`.

    Args:
        benchmark (`str`):
            Name of the benchmark.
        metric (`str`):
            Name of the score.
        metric_type (`str`):
            Its name for machines.
        value (`float`):
            The mean, in the scale of published tables.
        origin ([`Origin`]):
            Where the prompts come from.
        num_images (`int`):
            Images that were scored.
        num_failed (`int`, *optional*, defaults to `0`):
            Images for which scoring failed, which the mean leaves out.
        base (`dict[str, float]`, *optional*):
            The same score of the base, by what that row is called.
    """

    benchmark: str
    metric: str
    metric_type: str
    value: float
    origin: Origin
    num_images: int
    num_failed: int = 0
    base: dict[str, float] = field(default_factory=dict)


@dataclass
class Outcome:
    """
    What a run has come to so far, beside its weights.

    Args:
        seconds (`float`, *optional*, defaults to `0.0`):
            Time spent training, resumed parts included.
        gallery (`list[GalleryImage]`, *optional*):
            The last images of the student.
        grid (`str`, *optional*), curves (`str`, *optional*):
            Paths of the last image grid and of the curves in the run's folder.
        results (`dict`, *optional*):
            The table of [`compare`].
    """

    seconds: float = 0.0
    gallery: list[GalleryImage] = field(default_factory=list)
    grid: str | None = None
    curves: str | None = None
    results: dict[str, Any] = field(default_factory=dict)


@dataclass
class RunRecord:
    """
    What a run was made from, how it was made and what came of it. Names no machine and holds no token.

    Args:
        name (`str`):
            Title: the last part of the repository or of the folder.
        summary (`str`):
            What the model is, in one or two sentences.
        base ([`Origin`]):
            The base model.
        repo_id (`str`, *optional*):
            Hub repository that the run is pushed to.
        revision (`str`, *optional*):
            Branch of that repository, if it is not the main one.
        base_license ([`License`], *optional*):
            License of the base, which the LoRA inherits.
        tags (`list[str]`, *optional*):
            Tags of the method.
        teachers (`list[TeacherRecord]`, *optional*), prompts (`list[PromptSet]`, *optional*), eval_prompts (`list[PromptSet]`, *optional*):
            What it was trained and evaluated on.
        inference (`dict`, *optional*):
            Arguments for the stock pipeline's call: `height`, `width`, `num_inference_steps`, and those of the family,
            such as `guidance_scale` and `max_sequence_length`.
        guidance_scale (`float`, *optional*):
            Classifier-free guidance, where 1 is none. By default that of `inference`.
        dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Precision to load the pipeline in.
        pipeline_class (`str`, *optional*):
            Class of diffusers to load the base with; the first of [`models.registry.FAMILIES`] if it is not set.
        has_no_effect (`bool`, *optional*, defaults to `False`):
            Whether the LoRA that was saved changes nothing.
        settings (`dict`, *optional*):
            All settings that differ from the defaults.
        rounds (`int`, *optional*, defaults to `0`):
            Optimizer steps so far.
        planned_rounds (`int`, *optional*, defaults to `0`):
            Optimizer steps that the run is going to take; 0 if that is not known.
        images_per_round (`int`, *optional*, defaults to `0`):
            Images per optimizer step over all processes.
        seconds (`float`, *optional*, defaults to `0.0`):
            Time spent training so far, resumed parts included.
        hardware (`dict`, *optional*):
            `device`, `num_processes`, `peak_memory_gb` of this very run.
        gallery (`list[GalleryImage]`, *optional*):
            Images in the folder.
        results (`dict`, *optional*):
            The table of [`compare`], as `results.json` holds it.
        evaluation (`dict`, *optional*):
            Metrics of the last evaluation during training, and the `step` after which it took place.
        reward_names (`dict[str, list[str]]`, *optional*):
            Names of the reward functions of each task.
        reward_docs (`dict[str, str]`, *optional*):
            What each of them says it measures.
        benchmarks (`list[BenchmarkScore]`, *optional*), benchmark_settings (`dict`, *optional*):
            Scores on benchmarks, and how their images were drawn.
        grid (`str`, *optional*), curves (`str`, *optional*):
            Paths of the image grid and of the curves in the run's folder.
        paper (`dict`, *optional*):
            `title`, `id`, `citation` of the method.
        versions (`dict[str, str]`, *optional*):
            Versions of the libraries.
        date (`str`, *optional*):
            Day of the last save, as `YYYY-MM-DD`.
    """

    name: str
    summary: str
    base: Origin
    repo_id: str | None = None
    revision: str | None = None
    base_license: License = field(default_factory=License)
    tags: list[str] = field(default_factory=list)
    teachers: list[TeacherRecord] = field(default_factory=list)
    prompts: list[PromptSet] = field(default_factory=list)
    eval_prompts: list[PromptSet] = field(default_factory=list)
    inference: dict[str, Any] = field(default_factory=dict)
    guidance_scale: float | None = None
    dtype: str = "bfloat16"
    settings: dict[str, Any] = field(default_factory=dict)
    rounds: int = 0
    planned_rounds: int = 0
    images_per_round: int = 0
    seconds: float = 0.0
    hardware: dict[str, Any] = field(default_factory=dict)
    gallery: list[GalleryImage] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    reward_names: dict[str, list[str]] = field(default_factory=dict)
    reward_docs: dict[str, str] = field(default_factory=dict)
    benchmarks: list[BenchmarkScore] = field(default_factory=list)
    benchmark_settings: dict[str, Any] = field(default_factory=dict)
    grid: str | None = None
    curves: str | None = None
    paper: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    date: str | None = None
    pipeline_class: str | None = None
    has_no_effect: bool = False

    def __post_init__(self):
        if self.guidance_scale is None:
            self.guidance_scale = self.inference.get("guidance_scale", 1.0)

    def save(self, folder: str | Path) -> Path:
        """Writes `run.json` into a folder."""
        return write_json(Path(folder) / RECORD_FILE, asdict(self), sort_keys=False)

    def drop_missing(self, folder: str | Path) -> None:
        """Forgets the images that a folder, such as a checkpoint, does not have."""
        folder = Path(folder)
        self.gallery = [image for image in self.gallery if (folder / image.file).is_file()]
        self.grid = self.grid if self.grid and (folder / self.grid).is_file() else None
        self.curves = self.curves if self.curves and (folder / self.curves).is_file() else None

    def set_base(self, base_model: str, token: str | None = None) -> None:
        """
        Names the base on the Hub, for a run that was made with a local folder, and reads its license.

        Args:
            base_model (`str`):
                `owner/name[@revision]`.
            token (`str`, *optional*):
                Token to use instead of the one of `hf auth login` or `HF_TOKEN`.

        Raises:
            `ValueError`: it is no repository of the Hub.
        """
        source = parse_source(base_model, kind="base")
        if source.repo_id is None or source.subfolder is not None:
            raise ValueError(
                f"`base_model` must be a repository of the Hub as `owner/name` or `owner/name@revision`, but is "
                f"{base_model!r}."
            )
        self.base = Origin(str(source), source.repo_id)
        if self.base_license.id is None:
            self.base_license = read_license(self.base, token=token)

    @classmethod
    def load(cls, folder: str | Path) -> "RunRecord":
        """
        Reads `run.json` of a folder.

        Raises:
            `ValueError`: there is none, or it is not one of this version.
        """
        file = Path(folder) / RECORD_FILE
        if not file.is_file():
            raise ValueError(
                f"There is no {RECORD_FILE!r} in {str(folder)!r}. Pass the `output_dir` of a run, or its repository."
            )
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            content["base"] = Origin(**content["base"])
            content["base_license"] = License(**content["base_license"])
            for key, item in (
                ("teachers", TeacherRecord),
                ("prompts", PromptSet),
                ("eval_prompts", PromptSet),
                ("benchmarks", BenchmarkScore),
            ):
                content[key] = [item(**{**row, "origin": Origin(**row["origin"])}) for row in content.get(key, [])]
            for teacher in content["teachers"]:
                teacher.base = None if teacher.base is None else Origin(**teacher.base)
            content["gallery"] = [GalleryImage(**row) for row in content["gallery"]]
            record = cls(**content)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{str(file)!r} is no record of a run that this version reads: {error!r}.") from error
        if record.pipeline_class is not None and not str(record.pipeline_class).isidentifier():
            raise ValueError(f"{str(file)!r}: `pipeline_class` is no name of a class: {record.pipeline_class!r}.")
        return record
