# SPDX-License-Identifier: Apache-2.0
"""From an evaluation to the model card of one of its LoRAs."""

import json
from pathlib import Path
from typing import Any

from ..evaluation.benchmark.tables import REWARD_TITLES
from ..hub.locations import Origin
from ..lora.files import LoraWeights
from ..lora.fingerprints import lora_sha256
from .record import BenchmarkScore


def benchmark_scores(
    results: str | Path, lora: LoraWeights, guidance_scale: float | None = None
) -> tuple[list[BenchmarkScore], dict[str, Any]]:
    """
    The scores of a LoRA in an evaluation, in which it is found by its weights.

    Args:
        results (`str` or `Path`):
            Folder of the evaluation, or its `summary.json`.
        lora ([`LoraWeights`]):
            The LoRA.
        guidance_scale (`float`, *optional*):
            Which of its rows to take if there are several; by default the first.

    Returns:
        `tuple[list[BenchmarkScore], dict]`: the scores, and how the images were drawn.

    Raises:
        `ValueError`: there is no evaluation, or it does not have this LoRA.
    """
    file = Path(results) / "summary.json" if Path(results).is_dir() else Path(results)
    if not file.is_file():
        raise ValueError(
            f"There are no results in {str(results)!r}. Pass the `--output_dir` of `trl-diffusion-opd eval`."
        )
    summary = json.loads(file.read_text(encoding="utf-8"))
    settings, models = summary["settings"], summary["settings"]["models"]
    rows = [name for name, model in models.items() if model["weights"] == [lora_sha256(lora)]]
    if not rows:
        raise ValueError(
            f"None of the models in {str(results)!r} has the weights of this LoRA: {', '.join(models)}. Evaluate it with "
            "`trl-diffusion-opd eval --lora FOLDER`."
        )
    row = min(rows, key=lambda name: models[name]["guidance_scale"] != guidance_scale)
    bases = [name for name, model in models.items() if not model["weights"]]
    values = {(r["model"], r["benchmark"], r["reward"]): r["value"] for r in summary["results"]}
    scores = []
    for result in summary["results"]:
        if result["model"] != row or not result["num_scored"]:
            continue
        benchmark, reward = result["benchmark"], result["reward"]
        about = settings["benchmarks"][benchmark]
        base = {name: values[name, benchmark, reward] for name in bases}
        scores.append(
            BenchmarkScore(
                benchmark=about["title"],
                metric=REWARD_TITLES[reward] if result["built_in"] else reward,
                metric_type=reward,
                value=result["value"],
                origin=Origin(**about["origin"]),
                num_images=result["num_scored"],
                num_failed=result["num_failed"],
                base={name: value for name, value in base.items() if value is not None},
            )
        )
    drawn = {name: settings[name] for name in ("num_inference_steps", "resolution", "seed", "dtype")}
    return scores, {**drawn, "guidance_scale": models[row]["guidance_scale"]}
