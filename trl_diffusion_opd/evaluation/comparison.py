# SPDX-License-Identifier: Apache-2.0
"""The table that tells whether a training worked: base and student on every task, and where there are teachers these too."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..data.rounds import Prompts
from ..lora.merging import adds_up
from ..models.sampler import Policy
from ..utils.serialization import write_json
from .gains import gains
from .score import Evaluator


def scored_tasks(datasets: Mapping[str, Prompts], reward_funcs: Mapping[str, Any]) -> dict[str, Prompts]:
    """
    The evaluation prompts of the tasks that have reward functions.

    Raises:
        `ValueError`: there are none.
    """
    tasks = {task: data for task, data in datasets.items() if task in reward_funcs}
    if not tasks:
        raise ValueError(
            "A comparison needs a task with prompts and a reward: pass `eval_dataset` and `reward_funcs` for it."
        )
    return tasks


def compare(
    evaluator: Evaluator,
    tasks: dict[str, Prompts],
    *,
    base: Policy,
    student: Policy,
    teachers: Mapping[str, Policy],
    student_weights: Callable[[bool], AbstractContextManager],
    averaged: bool,
) -> dict[str, Any]:
    """
    Scores all models on evaluation prompts, with the same noise.

    Where there are teachers, the merge adds up the updates of all their LoRAs on the base (weight 1 each), which costs
    no training: what a student must beat. There is none if a teacher is no LoRA on the student's base, or one with
    magnitudes (DoRA), whose update cannot be added to others.

    Args:
        evaluator ([`Evaluator`]):
            Scores them.
        tasks (`dict[str, Dataset | StreamedPrompts]`):
            Prompts of the tasks, from [`scored_tasks`].
        base ([`Policy`]), student ([`Policy`]), teachers (`Mapping[str, Policy]`):
            The models, teachers by task.
        student_weights (`Callable[[bool], ContextManager]`):
            Puts the student's averaged (`True`) or raw weights in its place.
        averaged (`bool`):
            Whether there is an average.

    Returns:
        `dict`: `{"base": {task: score}, "student": {task: score}}`; with teachers also `"teachers": {teacher: {task:
        score}}` and `"merge": {task: score}`; with a moving average the student is the averaged one, and
        `"student_raw"` is there too.
    """

    def score(policy: Policy) -> dict[str, float]:
        scores = evaluator.score(policy, tasks, description=f"Scoring {policy.name}")
        return {task: values["reward"] for task, values in scores.items()}

    with student_weights(True):
        results: dict[str, Any] = {"base": score(base)}
        if teachers:
            results["teachers"] = {task: score(policy) for task, policy in teachers.items()}
        if teachers and all(policy.model is None and policy.adapters for policy in teachers.values()):
            adapters = tuple(name for policy in teachers.values() for name in policy.adapters)
            if adds_up(evaluator.sampler.model.transformer, adapters):
                results["merge"] = score(Policy("merge", student.guidance_scale, adapters))
        results["student"] = score(student)
    if averaged:
        with student_weights(False):
            results["student_raw"] = score(student)
    return results


def format_table(results: dict[str, Any]) -> str:
    """The results as a Markdown table, a row per model and a column per task."""
    rows = {"base": results["base"]}
    rows |= {f"teacher {name}": scores for name, scores in results.get("teachers", {}).items()}
    names = {"merge": "merge of the teachers", "student": "**student**", "student_raw": "student, raw weights"}
    rows |= {title: results[key] for key, title in names.items() if key in results}
    tasks = list(results["base"])
    width = max(map(len, rows)) + 1
    lines = [f"| {'model':<{width}}| " + " | ".join(f"{task:>9}" for task in tasks) + " |"]
    lines.append(f"|{'-' * (width + 1)}|" + "|".join("-" * max(11, len(task) + 2) for task in tasks) + "|")
    for name, scores in rows.items():
        cells = (f"{scores[task]:>{max(9, len(task))}.3f}" for task in tasks)
        lines.append(f"| {name:<{width}}| " + " | ".join(cells) + " |")
    if shares := gains(results):
        cells = (f"{shares[task]:>{max(9, len(task))}.0%}" if task in shares else " " * 9 for task in tasks)
        lines.append(f"| {'share of the gain':<{width}}| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save_results(results: dict[str, Any], folder: str | Path) -> Path:
    return write_json(Path(folder) / "results.json", results, sort_keys=False)
