# SPDX-License-Identifier: Apache-2.0
"""The scores of a LoRA in the form of the Hub's `model-index`, which others compare models by."""

import math
import re

from huggingface_hub import EvalResult

from ..hub.locations import Origin
from .card_sections import slug, student_scores
from .record import RunRecord


MIN_IMAGES = 30  # a mean of fewer says next to nothing


def model_index(record: RunRecord) -> list[EvalResult]:
    """
    Scores that somebody else can make sense of: on prompts that are public, over at least `MIN_IMAGES` images. Those on
    files of one machine, and those of a few images, are on the card alone.
    """
    prompts = {prompts.task: prompts for prompts in record.eval_prompts}
    found = []
    for task, value in student_scores(record).items():
        rewards, origin = "+".join(record.reward_names[task]), prompts[task].origin
        metric = f"mean reward {' + '.join(record.reward_names[task])}"
        found += _result(origin, origin.name, rewards, metric, value, prompts[task].num_images)
    for score in record.benchmarks:
        found += _result(score.origin, score.benchmark, score.metric_type, score.metric, score.value, score.num_images)
    return found


def _result(
    origin: Origin, dataset: str, metric_type: str, metric: str, value: float, num_images: int | None
) -> list[EvalResult]:
    is_public = origin.repo_id is not None or re.match("https?://", origin.name)
    if not is_public or not math.isfinite(value) or (num_images or 0) < MIN_IMAGES:
        return []
    return [
        EvalResult(
            task_type="text-to-image",
            task_name="Text-to-Image",
            dataset_type=origin.repo_id or slug(dataset),
            dataset_name=dataset,
            dataset_revision=origin.commit,
            metric_type=metric_type,
            metric_name=metric,
            metric_value=round(value, 4),
        )
    ]
