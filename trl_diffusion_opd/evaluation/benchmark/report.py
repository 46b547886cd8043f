# SPDX-License-Identifier: Apache-2.0
"""What an evaluation came to, from its folder alone: numbers, tables, a dataset and pages with the images."""

import json
import math
from typing import Any

from ...rewards import REWARDS, reward_class
from ...rewards.geneval2_rules import summarize as summarize_geneval2
from ...rewards.geneval_rules import parse_metadata, summarize
from ..statistics import STATISTICS
from .average import average, paper_table
from .folder import ResultsFolder
from .pages import gallery_page, summary_page
from .suites import image_seed, positions
from .tables import PAPER_COLUMNS, make_tables, markdown


# The columns of every dataset of images.
_COLUMNS = ("file_name", "model", "benchmark", "prompt", "seed", "guidance_scale")


def write_report(folder: ResultsFolder) -> dict[str, Any]:
    """
    Writes `summary.json`, `table.md`, `metadata.jsonl` (a row per image), `index.html` and a page per benchmark.

    Args:
        folder ([`ResultsFolder`]):
            All that it holds is reported, whichever run it is of.

    Returns:
        `dict`: what `summary.json` holds: `settings`, `results` (a row per model, benchmark and reward), `statistics` (a
        row per model and benchmark), `table` (the columns of the paper's Table 1 by model, in its scale) and `average`.
    """
    settings = folder.load_settings()
    images = {name: _images(folder, settings, name) for name in settings["benchmarks"]}
    results = [row for name, own in images.items() for row in _results(settings, name, own)]
    table: dict[str, dict[str, float]] = {name: {} for name in settings["models"]}
    for row in results:
        column = PAPER_COLUMNS.get((row["benchmark"], row["reward"]))
        if column is not None and row["built_in"] and row["num_scored"]:
            table[row["model"]][column] = row["value"]
    summary = {
        "settings": settings,
        "results": results,
        "statistics": [row for name, own in images.items() for row in _statistics(settings, name, own)],
        "table": table,
        "average": {name: average(scores) for name, scores in table.items()},
        "reference": {
            "source": paper_table().source,
            "average": {name: round(average(row), 6) for name, row in paper_table().rows.items()},
            "published": paper_table().published,
        },
    }
    folder.save_json("summary.json", summary)
    rows = [row for own in images.values() for row in own]
    folder.save_text("metadata.jsonl", "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in _columns(rows)))
    tables = make_tables(summary)
    folder.save_text("table.md", markdown(tables))
    folder.save_text("index.html", summary_page(settings, tables))
    for name, own in images.items():
        folder.save_text(f"{name}.html", gallery_page(settings, name, own))
    return summary


def _images(folder: ResultsFolder, settings: dict[str, Any], benchmark: str) -> list[dict[str, Any]]:
    """A row per image that is there, those of a prompt one after the other."""
    about, prompts = settings["benchmarks"][benchmark], folder.load_prompts(benchmark)
    scores = {
        model: {reward: folder.scores(model, benchmark, reward) for reward in about["rewards"]}
        for model in settings["models"]
    }
    parts = {
        model: {reward: folder.parts(model, benchmark, reward) for reward in about["rewards"]}
        for model in settings["models"]
    }
    statistics = {model: folder.statistics(model, benchmark) for model in settings["models"]}
    rows = []
    for position in positions(len(prompts), about["num_images"]):
        prompt = prompts[position % len(prompts)]
        for model, own in scores.items():
            file = folder.image_file(model, benchmark, position)
            if not file.is_file():
                continue
            found = {reward: values[position] for reward, values in own.items() if position in values}
            row = {
                "file_name": file.relative_to(folder.path).as_posix(),
                "model": model,
                "benchmark": benchmark,
                "prompt": prompt["prompt"],
                "seed": image_seed(settings["seed"], benchmark, position),
                "guidance_scale": settings["models"][model]["guidance_scale"],
                "scores": {reward: None if math.isnan(value) else value for reward, value in found.items()},
                "statistics": statistics[model].get(position, {}),
                "parts": {reward: own[position] for reward, own in parts[model].items() if position in own},
                "demands": {name: prompt.get(name) for name in ("skills", "atom_count")},
            }
            if tag := _tag(prompt, about):
                row["tag"] = tag
            rows.append(row)
    return rows


def _tag(prompt: dict[str, Any], about: dict[str, Any]) -> str | None:
    """GenEval's kind of a prompt, if GenEval's reward scores it; else `metadata` may be anything."""
    if "metadata" in prompt and _is_built_in("geneval", about["rewards"].get("geneval", "")):
        return parse_metadata(prompt["metadata"])["tag"]
    return prompt.get("tag")


def _is_built_in(reward: str, description: str) -> bool:
    return reward in REWARDS and description.split(" (")[0] == reward


def _results(settings: dict[str, Any], benchmark: str, images: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The means of each model and reward on a benchmark."""
    about = settings["benchmarks"][benchmark]
    results = []
    for model in settings["models"]:
        own = [row for row in images if row["model"] == model]
        for reward, description in about["rewards"].items():
            scored = [row for row in own if reward in row["scores"]]
            values = [row["scores"][reward] for row in scored]
            valid = [value for value in values if value is not None]
            built_in = _is_built_in(reward, description)
            factor = reward_class(reward).table_factor if built_in else 1.0
            result = {
                "model": model,
                "benchmark": benchmark,
                "reward": reward,
                "built_in": built_in,
                "mean": _mean(valid),
                "value": None if not valid else factor * _mean(valid),
                "standard_error": _standard_error(valid, factor),
                "num_images": about["num_images"],
                "num_scored": len(valid),
                "num_failed": len(values) - len(valid),
            }
            if reward == "geneval" and built_in:
                numbers = [math.nan if value is None else value for value in values]
                result["geneval"] = {
                    name: None if math.isnan(value) else value
                    for name, value in summarize([row["tag"] for row in scored], numbers).items()
                }
            if reward == "geneval2" and built_in:
                result["geneval2"] = summarize_geneval2(
                    (row["parts"][reward], row["demands"]["skills"], row["demands"]["atom_count"])
                    for row in scored
                    if row["scores"][reward] is not None
                )
            results.append(result)
    return results


def _statistics(settings: dict[str, Any], benchmark: str, images: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean statistics of each model's images of a benchmark."""
    found = []
    for model in settings["models"]:
        own = [row["statistics"] for row in images if row["model"] == model and row["statistics"]]
        if own:
            pairs = [row["diversity"] for row in own if row["diversity"] is not None]
            means = {name: _mean([row[name] for row in own]) for name in STATISTICS} | {"diversity": _mean(pairs)}
            counts = {"num_images": len(own), "num_repeated": len(pairs)}
            found.append({"model": model, "benchmark": benchmark, **means, **counts})
    return found


def _columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a dataset: a column per reward and statistic, the same in all rows."""
    rewards = list(dict.fromkeys(reward for row in rows for reward in row["scores"]))
    statistics = list(dict.fromkeys(name for row in rows for name in row["statistics"]))
    tags = any("tag" in row for row in rows)
    return [
        {
            **{name: row[name] for name in _COLUMNS},
            **({"tag": row.get("tag")} if tags else {}),
            **{reward: row["scores"].get(reward) for reward in rewards},
            **{f"image_{name}": row["statistics"].get(name) for name in statistics},
        }
        for row in rows
    ]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _standard_error(values: list[float], factor: float) -> float | None:
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return factor * math.sqrt(variance / len(values))
