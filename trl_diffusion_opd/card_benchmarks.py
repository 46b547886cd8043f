# SPDX-License-Identifier: Apache-2.0
"""What the model card says of benchmarks, for people and for the Hub."""

import math

from huggingface_hub import EvalResult

from .card_parts import link, slug, table
from .record import RunRecord


def benchmark_table(record: RunRecord) -> str:
    """The scores on benchmarks beside those of the base; empty if there are none."""
    if not record.benchmarks:
        return ""
    bases = list(dict.fromkeys(name for score in record.benchmarks for name in score.base))
    rows = []
    for score in record.benchmarks:
        pictures = f"{score.num_images:,}" + (
            f", {score.num_failed:,} more without a score" if score.num_failed else ""
        )
        others = (f"{score.base[name]:.3f}" if name in score.base else "–" for name in bases)
        cells = [score.benchmark, score.metric, *others, f"**{score.value:.3f}**"]
        rows.append([*cells, pictures, link(score.origin)])
    return table(["benchmark", "score", *bases, "**this LoRA**", "pictures", "prompts"], rows)


def benchmark_results(record: RunRecord) -> list[EvalResult]:
    """The scores on benchmarks in the form of the Hub's `model-index`."""
    return [
        EvalResult(
            task_type="text-to-image",
            task_name="Text-to-Image",
            dataset_type=score.origin.repo_id or slug(score.origin.name),
            dataset_name=score.benchmark,
            dataset_revision=score.origin.commit,
            metric_type=score.metric_type,
            metric_name=score.metric,
            metric_value=round(score.value, 4),
        )
        for score in record.benchmarks
        if math.isfinite(score.value)
    ]
