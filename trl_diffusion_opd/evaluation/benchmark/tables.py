# SPDX-License-Identifier: Apache-2.0
"""The tables of an evaluation, as text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...rewards.geneval2_rules import SKILLS
from ...rewards.geneval_rules import TAGS
from ...utils.markdown import table as markdown_table
from ..statistics import STATISTICS
from .average import average, paper_table


# (benchmark, reward) -> column of the paper's Table 1.
PAPER_COLUMNS = {
    ("geneval", "geneval"): "GenEval",
    ("ocr", "ocr"): "OCR",
    ("drawbench", "pickscore"): "PickScore",
    ("drawbench", "clipscore"): "ClipScore",
    ("drawbench", "hpsv2"): "HPSv2.1",
    ("drawbench", "aesthetic"): "Aesthetic",
    ("drawbench", "imagereward"): "ImageReward",
    ("drawbench", "unifiedreward"): "UnifiedReward",
}
REWARD_TITLES = {reward: title for (_, reward), title in PAPER_COLUMNS.items()} | {
    "hpsv3": "HPSv3",
    "geneval2": "GenEval 2",
}
NOTHING = "–"
STATISTICS_NOTES = [
    "They judge nothing; the base's are what to compare with. A score that rises while brightness, contrast, saturation "
    "or sharpness moves away from the base's may pay for that look and not for better images, and one that rises while "
    "diversity falls may pay for drawing the same image again.",
    "Brightness: mean luma, 0 to 1. Contrast: its standard deviation, 0 to 0.5. Saturation: that of HSV, 0 to 1. "
    "Sharpness: standard deviation of the Laplacian of the luma, 0 to 4.",
]
DIVERSITY_NOTE = (
    "Diversity: mean distance between images of one prompt that were drawn from different noise, 0 to 1: the root mean "
    "square of their difference at 32 x 32 pixels."
)
GENEVAL2_NOTE = (
    "GM: mean over the images of the geometric mean of the probabilities of their right answers, about whole prompts. AM: "
    "of the arithmetic mean, about atoms. Skills: mean over all answers. Published scores are 100 times these."
)
UNIFIED_REWARD_NOTE = (
    "UnifiedReward: its model is told what to look at in this package's own words, and is not the paper's. Its scores "
    "compare with each other, not with published ones."
)


@dataclass
class Table:
    """
    A table of text.

    Args:
        title (`str`):
            What it shows.
        header (`list[str]`), rows (`list[list[str]]`):
            Its cells. The first column holds names.
        notes (`list[str]`, *optional*):
            What to know about it.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def make_tables(summary: dict[str, Any]) -> list[Table]:
    """
    The tables of a `summary.json`: the paper's Table 1 as far as it was measured, GenEval by kind of prompt, what was
    measured beside it, GenEval 2 by skill and by number of atoms, what the images look like, where there is an Average
    the paper's own rows, and what the models are.
    """
    settings, results = summary["settings"], summary["results"]
    models = [
        name for name in settings["models"] if any(row["model"] == name and row["num_scored"] for row in results)
    ]
    paper = [row for row in results if row["built_in"] and (row["benchmark"], row["reward"]) in PAPER_COLUMNS]
    tables = [_paper_table(summary, models, paper), _geneval_table(models, results)]
    others: dict[str, list[dict[str, Any]]] = {}
    for row in results:
        if row not in paper:
            title, _ = _parts(settings, row["benchmark"])
            others.setdefault(title, []).append(row)
    for title, rows in others.items():
        tables.append(_scores_table(title, settings, models, rows))
    tables += _geneval2_tables(models, results)
    tables.append(_statistics_table(settings, summary["statistics"]))
    if any(value is not None for value in summary["average"].values()):
        tables.append(_reference_table())
    tables.append(_models_table(settings))
    return [table for table in tables if table is not None]


def _paper_table(summary: dict[str, Any], models: list[str], results: list[dict[str, Any]]) -> Table | None:
    columns = [column for column in PAPER_COLUMNS.values() if any(column in row for row in summary["table"].values())]
    if not columns:
        return None
    averaged = any(value is not None for value in summary["average"].values())
    rows = []
    for model in models:
        cells = [_number(summary["table"][model].get(column)) for column in columns]
        rows.append([model, *cells, *([_number(summary["average"][model])] if averaged else [])])
    notes = [_about_errors(results, lambda row: PAPER_COLUMNS[row["benchmark"], row["reward"]]), *_failures(results)]
    notes += _about_unified_reward(results)
    if "GenEval" in columns:
        notes.append("GenEval: share of the images that are right. The benchmark's own mean over tags is below.")
    if averaged:
        notes.append(
            "Average: mean of the columns, each relative to the smallest and the largest of the paper's rows. "
            "UnifiedReward is one of them, so compare it with the paper's with care."
        )
    title = "Evaluation" if len(columns) < len(PAPER_COLUMNS) else "The paper's Table 1"
    return Table(title, ["model", *columns, *(["Average"] if averaged else [])], rows, notes)


def _geneval_table(models: list[str], results: list[dict[str, Any]]) -> Table | None:
    found = {row["model"]: row["geneval"] for row in results if row["benchmark"] == "geneval" and "geneval" in row}
    found = {model: found[model] for model in models if found.get(model, {}).get("score") is not None}
    if not found:
        return None
    header = ["model", *(tag.replace("_", " ") for tag in TAGS), "mean of tags", "mean of images"]
    keys = [*TAGS, "score", "accuracy"]
    return Table(
        "GenEval", header, [[model, *(_number(means.get(key)) for key in keys)] for model, means in found.items()]
    )


def _geneval2_tables(models: list[str], results: list[dict[str, Any]]) -> list[Table]:
    found = {row["model"]: row["geneval2"] for row in results if "geneval2" in row and row["benchmark"] == "geneval2"}
    found = {model: found[model] for model in models if found.get(model, {}).get("gm") is not None}
    if not found:
        return []
    skills = [skill for skill in SKILLS if any(skill in means["skills"] for means in found.values())]
    atoms = sorted({int(count) for means in found.values() for count in means["atoms"]})
    by_skill = [
        [model, _number(means["gm"]), _number(means["am"]), *(_number(means["skills"].get(skill)) for skill in skills)]
        for model, means in found.items()
    ]
    tables = [Table("GenEval 2, by skill", ["model", "GM", "AM", *skills], by_skill, [GENEVAL2_NOTE])]
    if atoms:
        rows = [[model, *(_number(means["atoms"].get(str(n))) for n in atoms)] for model, means in found.items()]
        tables.append(Table("GenEval 2, GM by atoms of the prompt", ["model", *map(str, atoms)], rows))
    return tables


def _scores_table(title: str, settings: dict[str, Any], models: list[str], results: list[dict[str, Any]]) -> Table:
    columns = list(dict.fromkeys((row["benchmark"], row["reward"]) for row in results))
    rewards = [reward for _, reward in columns]

    def name(row: dict[str, Any]) -> str:
        own = REWARD_TITLES[row["reward"]] if row["built_in"] else row["reward"]
        # One reward may score several benchmarks of a table.
        return own if rewards.count(row["reward"]) == 1 else f"{_parts(settings, row['benchmark'])[1]}: {own}"

    titles = {(row["benchmark"], row["reward"]): name(row) for row in results}
    values = {(row["model"], row["benchmark"], row["reward"]): row["value"] for row in results}
    rows = [[model, *(_number(values.get((model, *column))) for column in columns)] for model in models]
    notes = [_about_errors(results, name), *_failures(results), *_about_unified_reward(results)]
    return Table(title, ["model", *(titles[column] for column in columns)], rows, notes)


def _parts(settings: dict[str, Any], benchmark: str) -> tuple[str, str]:
    """The table that a benchmark is in, and what it is called there: its title before and after the comma."""
    title, _, own = settings["benchmarks"][benchmark]["title"].partition(",")
    return title, own.strip() or benchmark


def _statistics_table(settings: dict[str, Any], statistics: list[dict[str, Any]]) -> Table | None:
    if not statistics:
        return None
    several = len({row["benchmark"] for row in statistics}) > 1
    repeated = any(row["diversity"] is not None for row in statistics)
    columns = [*STATISTICS, *(["diversity"] if repeated else [])]
    rows = []
    for row in statistics:
        names = [row["model"], *([settings["benchmarks"][row["benchmark"]]["title"]] if several else [])]
        rows.append([*names, *(_number(row[name]) for name in columns)])
    header = ["model", *(["benchmark"] if several else []), *columns]
    return Table("Image statistics", header, rows, [*STATISTICS_NOTES, *([DIVERSITY_NOTE] if repeated else [])])


def _reference_table() -> Table:
    reference = paper_table()
    return Table(
        "The paper's rows",
        ["model", *reference.columns, "Average, by its rule", "Average, as printed"],
        [
            [
                name,
                *(f"{scores[column]:g}" for column in reference.columns),
                f"{average(scores):.3f}",
                f"{reference.published[name]:.3f}",
            ]
            for name, scores in reference.rows.items()
        ],
        [f"{reference.source}. Its printed averages do not follow from its scores by its rule, which is used here."],
    )


def _models_table(settings: dict[str, Any]) -> Table:
    def loras(model: dict[str, Any]) -> str:
        names = " + ".join(origin["name"] for origin in model["origins"]) or NOTHING
        factor = model.get("merge") or (f"{model['weight']:.3g}" if "weight" in model else None)
        return f"{factor} ({names})" if factor else names

    rows = [[name, loras(model), f"{model['guidance_scale']:g}"] for name, model in settings["models"].items()]
    note = (
        f"{settings['num_inference_steps']} steps of the first-order ODE, {settings['resolution']} px, "
        f"{settings['dtype']}, seed {settings['seed']}; base {settings['base']['origin']['name']}."
    )
    return Table("Models", ["model", "LoRA", "guidance"], rows, [note])


def _about_errors(results: list[dict[str, Any]], name: Any) -> str:
    """Images and largest standard error of each column."""
    columns: dict[str, list[dict[str, Any]]] = {}
    for row in results:
        if row["num_scored"]:
            columns.setdefault(name(row), []).append(row)
    parts = []
    for column, rows in columns.items():
        numbers = sorted({row["num_scored"] for row in rows})
        images = f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}"
        errors = [row["standard_error"] for row in rows if row["standard_error"] is not None]
        parts.append(f"{column} {images}" + (f" ({max(errors):.2g})" if errors else ""))
    return f"Images of each model, and in brackets the largest standard error: {'; '.join(parts)}."


def _about_unified_reward(results: list[dict[str, Any]]) -> list[str]:
    scored = any(row["built_in"] and row["reward"] == "unifiedreward" and row["num_scored"] for row in results)
    return [UNIFIED_REWARD_NOTE] if scored else []


def _failures(results: list[dict[str, Any]]) -> list[str]:
    """What has no score, which the means leave out."""
    notes = []
    for what, count in (
        ("Scoring failed", lambda row: row["num_failed"]),
        ("Not scored yet", lambda row: row["num_images"] - row["num_scored"] - row["num_failed"]),
    ):
        parts = [
            f"{row['reward']} on {count(row):,} of {row['num_images']:,} images of {row['model']} ({row['benchmark']})"
            for row in results
            if count(row)
        ]
        if parts:
            notes.append(f"{what}: {'; '.join(parts)}.")
    return notes


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def markdown(tables: Sequence[Table]) -> str:
    """Tables as Markdown."""
    parts = []
    for table in tables:
        notes = "".join(f"\n{note}\n" for note in table.notes)
        parts.append(f"## {table.title}\n\n{markdown_table(table.header, table.rows)}\n{notes}")
    return "\n".join(parts)
