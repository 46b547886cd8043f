# SPDX-License-Identifier: Apache-2.0
"""Tables and sentences of the model card, as functions of the record."""

import math
import re
from typing import Any

from ..evaluation.gains import gains
from ..hub.locations import Origin
from ..sampling.solvers import SOLVERS
from ..utils.markdown import code, enumeration, escape, hyperlink, table
from .record import PromptSet, RunRecord, TeacherRecord


UNIFIED_REWARD = "unifiedreward"  # the reward, and how its scores are called


def student_scores(record: RunRecord) -> dict[str, float]:
    """Mean reward of this LoRA on each task: of the comparison, else of an evaluation after the last step."""
    if record.results:
        return record.results["student"]
    if record.evaluation.get("step") != record.rounds:
        return {}
    scores = {task: record.evaluation.get(f"eval_reward/{task}") for task in record.reward_names}
    return {task: value for task, value in scores.items() if value is not None}


def shares(record: RunRecord) -> dict[str, str]:
    """Share of the teachers' gains over the base that this LoRA has, where there is a gain."""
    if "base" not in record.results:
        return {}
    base, teachers = record.results["base"], record.results.get("teachers", {})
    return {
        task: f"{100 * share:.0f} %"
        for task, share in gains(record.results).items()
        if math.isfinite(share) and teachers[task][task] > base[task]
    }


def score_table(record: RunRecord) -> str:
    """The rewards of base, teachers, their merge and this LoRA, and what was scored; empty if nothing was."""
    scores, results = student_scores(record), record.results
    if not scores:
        return ""
    models = {"base": results["base"]} if "base" in results else {}
    models |= {f"teacher {escape(name)}": values for name, values in results.get("teachers", {}).items()}
    models |= {"plain sum of the teachers' LoRAs": results["merge"]} if "merge" in results else {}
    rows = [[name, *(_score(values[task]) for task in scores)] for name, values in models.items()]
    rows.append(["**this LoRA**", *(f"**{_score(value)}**" for value in scores.values())])
    if "student_raw" in results:
        rows.append(["its last weights, not averaged", *(_score(results["student_raw"][task]) for task in scores)])
    if share := shares(record):
        rows.append(["share of the teacher's gain", *(share.get(task, "–") for task in scores)])
    prompts = {prompts.task: prompts for prompts in record.eval_prompts}
    rows.append(["reward", *(" + ".join(map(code, record.reward_names[task])) for task in scores)])
    rows.append(["images (prompts)", *(_scored(prompts[task]) for task in scores)])
    return table(["", *map(escape, scores)], rows)


def reward_docs(record: RunRecord) -> dict[str, str]:
    """What the reward functions of the table say that they measure."""
    names = [name for task in student_scores(record) for name in record.reward_names[task]]
    return {name: record.reward_docs[name] for name in names if name in record.reward_docs}


def is_held_out(record: RunRecord) -> bool:
    """Whether it is known that no prompt of the evaluation was trained on."""
    return all(prompts.num_seen == 0 for prompts in record.eval_prompts)


def divergence_table(record: RunRecord) -> str:
    """Divergence at the last evaluation from the teachers of the tasks that no reward was measured on."""
    scores = student_scores(record)
    rows = [
        [escape(prompts.task), f"{record.evaluation[name]:.2e}", _scored(prompts)]
        for prompts in record.eval_prompts
        if (name := f"eval_kl/{prompts.task}") in record.evaluation and prompts.task not in scores
    ]
    return table(["task", "divergence", "images (prompts)"], rows) if rows else ""


def how_good(record: RunRecord) -> str:
    """The result in half a sentence."""
    if record.rounds == 0:
        return "nothing to measure yet"
    see = "see [how good it is](#how-good-it-is)"
    if share := shares(record):
        (first, most), *others = share.items()
        parts = [f"{most} of the teacher's gain over the base on {escape(first)}"]
        parts += [f"{share} on {escape(task)}" for task, share in others]
        return f"{enumeration(parts)}; {see}"
    base = record.results.get("base", {})
    scores = {task: value for task, value in student_scores(record).items() if task in _trained(record)}
    if scores:
        parts = [
            f"{_score(value)} on {escape(task)}" + (f" (base {_score(base[task])})" if task in base else "")
            for task, value in scores.items()
        ]
        return f"mean reward {enumeration(parts)}; {see}"
    if divergence_table(record):
        return f"no reward was measured, only how closely it follows its teachers; {see}"
    if record.benchmarks:
        return f"scores on benchmarks; {see}"
    return "not measured"


def _kind(teacher: TeacherRecord) -> str:
    """What a teacher is, if it is no LoRA on the student's base."""
    if not teacher.is_lora:
        return ", a full model"
    return "" if teacher.base is None else f" on {link(teacher.base)}"


def teacher_table(record: RunRecord) -> str:
    """Teachers and prompts of each task."""

    def prompts_of(sets: list[PromptSet], task: str) -> str:
        found = [prompts for prompts in sets if prompts.task == task]
        return "; ".join(prompt_set(prompts) for prompts in found) or "none"

    return table(
        ["task", "teacher", "its guidance", "prompts", "evaluation prompts"],
        [
            [
                escape(teacher.task),
                link(teacher.origin) + _kind(teacher),
                f"{teacher.guidance_scale:g}",
                prompts_of(record.prompts, teacher.task),
                prompts_of(record.eval_prompts, teacher.task),
            ]
            for teacher in record.teachers
        ],
    )


def prompt_set(prompts: PromptSet) -> str:
    return f"{prompts.num_prompts:,}, {link(prompts.origin)}" if prompts.num_prompts else link(prompts.origin)


def license(record: RunRecord) -> str:
    """Name of the base's license, as a link where there is one; empty if it is not known."""
    stated = record.base_license
    if stated.id != "other":
        return escape(stated.id or "")
    return hyperlink(stated.name, stated.link or "")


def made_on(record: RunRecord) -> str:
    """Time and hardware of the run."""
    number, memory = record.hardware["num_processes"], record.hardware.get("peak_memory_gb")
    devices = f"{number} x {record.hardware['device']}" if number > 1 else record.hardware["device"]
    peak = ""
    if memory:
        each = " in a process" if number > 1 else ""
        peak = f", with at most {memory:.{0 if memory >= 10 else 2}f} GB of memory{each}"
    evaluations = ", evaluations included" if record.evaluation else ""
    return f"This took {duration(record.seconds)} on {devices}{evaluations}{peak}."


def example(record: RunRecord) -> dict[str, Any]:
    """Prompt, as Python code, and seed of the loading snippet."""
    if record.gallery:
        return {"prompt": repr(record.gallery[0].prompt), "seed": record.gallery[0].seed or 0}
    prompts = [prompt for prompts in record.prompts for prompt in prompts.examples]
    return {"prompt": repr(prompts[0] if prompts else "a red apple on a wooden table"), "seed": 0}


def example_prompts(record: RunRecord) -> str:
    """A prompt of each task; empty if none is known."""
    found = {prompts.task: prompts.examples[0] for prompts in record.prompts if prompts.examples}
    found |= {image.task: image.prompt for image in reversed(record.gallery) if image.task}
    return "; ".join(f"{code(_shortened(prompt))} ({escape(task)})" for task, prompt in found.items())


def about_gallery(record: RunRecord) -> str:
    """How the images of the gallery came about."""
    settled = "Nobody picked the images: their prompts and seeds were settled before the training."
    drawn_at = record.gallery[0].round
    if drawn_at is not None and drawn_at != record.rounds:
        return f"The images show the weights after {drawn_at} optimizer steps. {settled}"
    if _other_sampler(record):
        return settled
    return f"This draws the first image of the gallery, but for differences in precision. {settled}"


def limits(record: RunRecord) -> list[str]:
    """What a user should not take for granted, a sentence or two each."""
    scores, settings, inference = student_scores(record), record.settings, record.inference
    tasks = _trained(record)
    found = []
    if scores or record.benchmarks:
        found.append(
            "The scores are those of automatic reward functions, on one run with one seed. They see only what they "
            "were written to see, and small differences between rows are noise."
        )
        if scores and (unscored := [task for task in tasks if task not in scores]):
            found.append(f"No reward was measured on {enumeration(map(escape, unscored))}.")
    elif record.evaluation:
        found.append(
            "No reward was measured. The divergences tell how closely it follows its teachers, not how good the "
            "images are."
        )
    elif record.rounds:
        found.append("Nothing was evaluated: how good it is, is not known.")
    if record.has_no_effect:
        found.append(
            "**It has no effect: all its weights are zero**, so the images are those of the base. A run that was too "
            "short for its moving average, or learned from nothing, ends like that."
        )
    if any(score.metric_type.startswith(UNIFIED_REWARD) for score in record.benchmarks) or any(
        UNIFIED_REWARD in name.lower() for names in record.reward_names.values() for name in names
    ):
        found.append(
            "UnifiedReward was asked with an instruction of this package, not with that of its authors: its scores "
            "compare the rows here, and cannot be compared with published ones."
        )
    if few := [
        f"{_num_scored(p)} on {escape(p.task)}"
        for p in record.eval_prompts
        if p.task in scores and _num_scored(p) < 30
    ]:
        found.append(f"Few different prompts were scored: {enumeration(few)}.")
    found += [
        f"{prompts.num_seen} of the {prompts.num_prompts} evaluation prompts of {escape(prompts.task)} were trained on too."
        for prompts in record.eval_prompts
        if prompts.num_seen
    ]
    found.append(
        f"It is made for prompts like those of its training, at {inference['width']} x {inference['height']} px with "
        f"{inference['num_inference_steps']} steps and guidance {record.guidance_scale:g}. Other settings"
        f"{' and prompts that mix the tasks' if len(tasks) > 1 else ''} are untested."
    )
    if _other_sampler(record):
        found.append(
            f"Its images and scores were made with the solver `{settings.get('solver', 'flow')}` at noise level "
            f"{settings.get('eval_noise_level', 0):g}; the code above samples with the base model's own scheduler."
        )
    if record.teachers:
        found.append("It imitates its teachers: what they do badly, it does badly too.")
    found.append(
        "What the base model cannot or should not draw has stayed, with the biases of its training data. No safety "
        "filter was added and nothing about safety was tested."
    )
    return found


def link(origin: Origin) -> str:
    """A Hub source as a link to its commit, an address as a link, what is local by its name."""
    if origin.url is not None:
        return hyperlink(origin.name, origin.url) + (f" at `{origin.commit[:7]}`" if origin.commit else "")
    if re.match("https?://", origin.name):
        return hyperlink("/".join(origin.name.split("/")[-2:]), origin.name)
    return origin.name if origin.name == "in memory" else code(origin.name)


def duration(seconds: float) -> str:
    """`9 s`, `3 min 5 s` or `2 h 7 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def slug(name: str) -> str:
    """The last two parts of a name in the characters of a Hub id."""
    return re.sub(r"[^a-zA-Z0-9._-]+", "-", "-".join(name.split("/")[-2:])).strip("-")


def _trained(record: RunRecord) -> list[str]:
    return [prompts.task for prompts in record.prompts]


def _score(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "–"


def _scored(prompts: PromptSet) -> str:
    return f"{prompts.num_images} ({_num_scored(prompts)})"


def _num_scored(prompts: PromptSet) -> int:
    return prompts.num_images if prompts.num_prompts is None else min(prompts.num_images, prompts.num_prompts)


def _shortened(prompt: str) -> str:
    """Its start in one line, also of a language that puts no spaces between words."""
    line = " ".join(prompt.split())
    return line if len(line) <= 100 else f"{line[:99].rstrip()}…"


def _other_sampler(record: RunRecord) -> bool:
    """Whether images were drawn otherwise than a stock pipeline draws them."""
    solver = SOLVERS.get(record.settings.get("solver"))
    return bool(record.settings.get("eval_noise_level")) or (solver is not None and not solver.is_euler_without_noise)


def benchmark_table(record: RunRecord) -> str:
    """The scores on benchmarks beside those of the base; empty if there are none."""
    if not record.benchmarks:
        return ""
    bases = list(dict.fromkeys(name for score in record.benchmarks for name in score.base))
    rows = []
    for score in record.benchmarks:
        images = f"{score.num_images:,}" + (f", {score.num_failed:,} more without a score" if score.num_failed else "")
        others = (f"{score.base[name]:.3f}" if name in score.base else "–" for name in bases)
        cells = [escape(score.benchmark), escape(score.metric), *others, f"**{score.value:.3f}**"]
        rows.append([*cells, images, link(score.origin)])
    return table(["benchmark", "score", *map(escape, bases), "**this LoRA**", "images", "prompts"], rows)
