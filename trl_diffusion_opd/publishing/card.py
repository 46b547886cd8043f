# SPDX-License-Identifier: Apache-2.0
"""The model card of a run, rendered from its record alone."""

import json
from importlib import resources

import jinja2
import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..hub.locations import DIFFUSERS_WEIGHT_NAME
from ..models.registry import DEFAULT_PIPELINE
from ..utils.markdown import code, escape, fenced
from . import card_sections as card_parts
from .card_sections import benchmark_table
from .model_index import model_index
from .record import RunRecord


# What a LoRA gallery of the Hub looks for.
_GALLERY_TAGS = ("text-to-image", "diffusers", "diffusers-training", "lora", "template:sd-lora")


def render_card(
    record: RunRecord,
    *,
    model_name: str | None = None,
    dataset_name: str | list[str] | None = None,
    tags: str | list[str] | None = None,
) -> ModelCard:
    """
    The model card of a run.

    Args:
        record ([`RunRecord`]):
            The run. Nothing else is looked at: no file, no network.
        model_name (`str`, *optional*):
            Title; by default the name of the run.
        dataset_name (`str` or `list[str]`, *optional*):
            Hub ids of datasets to name beside those that the record has.
        tags (`str` or `list[str]`, *optional*):
            Tags to add.
    """
    title = model_name or record.name
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"code": code, "escape": escape, "python": _python}
    template = (resources.files(__package__) / "templates" / "model_card.md").read_text(encoding="utf-8")
    text = environment.from_string(template).render(
        front_matter=front_matter(record, title, _listed(dataset_name), _listed(tags)).to_yaml(),
        title=escape(title),
        record=record,
        parts=card_parts,
        benchmarks=benchmark_table(record),
        weight_name=DIFFUSERS_WEIGHT_NAME,
        settings=fenced(yaml.safe_dump(record.settings, allow_unicode=True).strip(), "yaml"),
        pipeline=record.pipeline_class or DEFAULT_PIPELINE,
    )
    return ModelCard(text)


def front_matter(record: RunRecord, title: str, datasets: list[str], tags: list[str]) -> ModelCardData:
    """What the Hub reads of a card."""
    base = record.base.repo_id
    origins = [prompts.origin for prompts in (*record.prompts, *record.eval_prompts)]
    datasets = [*(origin.repo_id for origin in origins if origin.repo_id is not None), *datasets]
    results = model_index(record)
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=base,
        base_model_relation="adapter" if base else None,
        license=record.base_license.id,
        license_name=record.base_license.name,
        license_link=record.base_license.link,
        datasets=list(dict.fromkeys(datasets)) or None,
        tags=[*_GALLERY_TAGS, *record.tags, *tags],
        widget=[{"text": image.prompt, "output": {"url": image.file}} for image in record.gallery] or None,
        model_name=title if results else None,
        eval_results=results or None,
    )


def _python(value: str | int | float) -> str:
    """A text or a number as Python writes it, texts between double quotes."""
    return json.dumps(value, ensure_ascii=False)


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
