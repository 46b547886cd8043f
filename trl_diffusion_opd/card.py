# SPDX-License-Identifier: Apache-2.0
"""The model card of a student, written beside its LoRA at every save."""

import importlib.metadata
from dataclasses import MISSING, fields
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from huggingface_hub import ModelCard, ModelCardData

from .config import DiffusionOPDConfig
from .sources import DIFFUSERS_WEIGHT_NAME
from .teachers import Teacher


if TYPE_CHECKING:
    from .opd_trainer import DiffusionOPDTrainer

_LIBRARIES = ("trl-diffusion-opd", "trl", "diffusers", "transformers", "peft", "torch")
# Settings of the machine or of the run's bookkeeping, which say nothing about the method.
_NOT_SETTINGS = ("output_dir", "logging", "report_to", "run_name", "hub_", "push_to_hub", "use_cpu", "disable_tqdm")
# Settings that the config class itself fills in or consumes.
_RESOLVED = ("bf16", "activation_checkpointing", "gradient_checkpointing", "accelerator_config")


def make_card(
    trainer: "DiffusionOPDTrainer",
    model_name: str | None = None,
    dataset_name: str | list[str] | None = None,
    tags: str | list[str] | None = None,
) -> ModelCard:
    """
    The card of a trainer's student.

    Args:
        trainer ([`DiffusionOPDTrainer`]):
            Whose student it is.
        model_name (`str`, *optional*):
            Title; by default the name of the Hub repository or of the output folder.
        dataset_name (`str` or `list[str]`, *optional*):
            Hub ids of the prompt sets.
        tags (`str` or `list[str]`, *optional*):
            Tags to add.
    """
    args = trainer.args
    own_tags = ["text-to-image", "diffusers", "diffusers-training", "lora", "template:sd-lora", *trainer._tag_names]
    base_is_public = bool(trainer.base_model) and not Path(trainer.base_model).exists()
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=trainer.base_model if base_is_public else None,
        base_model_relation="adapter" if base_is_public else None,
        datasets=[dataset_name] if isinstance(dataset_name, str) else dataset_name,
        tags=list(dict.fromkeys([*own_tags, *([tags] if isinstance(tags, str) else tags or [])])),
    )
    base = trainer.base_model if base_is_public else Path(trainer.base_model or "the base model").name
    policy = trainer.student_policy
    template = resources.files("trl_diffusion_opd") / "templates" / "model_card.md"
    with resources.as_file(template) as path:
        return ModelCard.from_template(
            data,
            template_path=str(path),
            model_name=model_name or (trainer.hub_model_id or Path(args.output_dir).resolve().name).split("/")[-1],
            repo_id=trainer.hub_model_id or Path(args.output_dir).resolve().name,
            base_link=f"[{base}](https://huggingface.co/{base})" if base_is_public else f"`{base}`",
            base_model=base,
            num_teachers=len(trainer.teachers),
            paper_id=trainer._paper["id"],
            weight_name=DIFFUSERS_WEIGHT_NAME,
            example_prompt=repr(next(iter(trainer.datasets.values()))[0][args.prompt_column]),
            guidance_scale=policy.guidance_scale,
            teachers=[
                {
                    "task": task,
                    "source": _public_name(teacher),
                    "guidance_scale": teacher.guidance_scale,
                }
                for task, teacher in trainer.loaded_teachers.items()
            ],
            num_rounds=trainer.state.global_step,
            images_per_round=trainer.sampler.prompts_per_round * args.world_size,
            settings=yaml.safe_dump(changed_settings(args), sort_keys=True).strip(),
            versions=", ".join(f"{name} {_version(name)}" for name in _LIBRARIES),
            citation=trainer._paper["citation"],
        )


def changed_settings(args: DiffusionOPDConfig) -> dict:
    """The settings that differ from the defaults of the config class, without those that name a machine."""
    # Not from a default instance: constructing one resets accelerate's state in the middle of the run.
    defaults = {f.name: f.default if f.default is not MISSING else None for f in fields(args)}
    return {
        name: value
        for name, value in args.to_dict().items()
        if value != defaults[name]
        and not isinstance(value, dict | list)
        and name not in _RESOLVED
        and not name.startswith(_NOT_SETTINGS)
        and "token" not in name
    }


def _public_name(teacher: Teacher) -> str:
    """A Hub source as a link to its commit; a local path by its last parts alone, which name no machine."""
    if teacher.commit is None:
        return f"`{'/'.join(Path(teacher.source).parts[-2:])}`"
    repo = "/".join(teacher.source.split("@")[0].split("/")[:2])
    return f"[{teacher.source}](https://huggingface.co/{repo}/tree/{teacher.commit})"


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "(source)"
