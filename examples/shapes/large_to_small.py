# SPDX-License-Identifier: Apache-2.0
"""
A large base teaches a small one in the Shapes world: teachers by reinforcement learning on the wider base, distilled
into a student on the base of the default, plainly and with their guidance folded in, for several seeds.

    python examples/shapes/large_to_small.py

The same command goes on where it stopped. All runs have one thread. Ends with a table, `table.md`.
"""

import json
import statistics
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes.experiment import TASKS, TEACHER_RUNS, Job, cell, run_experiment, scores_of  # noqa: E402
from shapes.train_teachers import SHAPES, command, teacher_command  # noqa: E402


SMALL, LARGE = SHAPES / "base", SHAPES / "base_large"
GUIDANCE = 2.0  # of the teachers, where they are guided
SCALES = (1.0, 1.5, 2.0, 3.0)  # at which students are drawn
# Guidance of the student and of its teachers while it is trained.
STUDENTS = {
    "opd-unguided": (1.0, 1.0, "OPD, none guided"),
    "opd": (GUIDANCE, GUIDANCE, f"OPD, both at guidance {GUIDANCE:g}"),
    "folded": (1.0, GUIDANCE, f"OPD, guidance {GUIDANCE:g} folded into the student"),
}


def jobs_of(folder: Path, seed: int, num_images: int) -> dict[str, Job]:
    """All that is done for a seed, by name, which is also the folder of what comes of it."""
    jobs = {
        run: Job([*teacher_command(task, folder / run, seed), "--model_name_or_path", str(LARGE)])
        for task, run in zip(TASKS, TEACHER_RUNS, strict=True)
    }
    for name, (own, theirs, _) in STUDENTS.items():
        teachers = {
            task: {"name_or_path": str(folder / run), "base": str(LARGE), "guidance_scale": theirs}
            for task, run in zip(TASKS, TEACHER_RUNS, strict=True)
        }
        options = ["--teachers", json.dumps(teachers), "--guidance_scale", f"{own:g}", "--compare", "False"]
        options += ["--eval_strategy", "steps", "--eval_steps", "100", "--eval_fixed_kl", "True"]
        jobs[name] = Job(command("opd", folder / name, seed, *options), TEACHER_RUNS)
    loras = {f"teacher-{task}": folder / run for task, run in zip(TASKS, TEACHER_RUNS, strict=True)}
    jobs["evaluation-large"] = evaluation(folder, "large", LARGE, loras, seed, num_images)
    students = {name: folder / name for name in STUDENTS}
    jobs["evaluation-small"] = evaluation(folder, "small", SMALL, students, seed, num_images)
    return jobs


def evaluation(folder: Path, size: str, base: Path, loras: dict[str, Path], seed: int, num_images: int) -> Job:
    """Base and LoRAs at all scales, with the prompts and the noise of the seed."""
    name = f"evaluation-{size}"
    words = [sys.executable, "-m", "trl_diffusion_opd", "eval", "--model", str(base), "--output_dir"]
    words += [str(folder / name), "--benchmarks", str(SHAPES / "benchmarks.yaml"), "--num_images", str(num_images)]
    words += ["--num_inference_steps", "10", "--max_sequence_length", "10", "--seed", str(42 + seed)]
    words += ["--batch_size", "64", "--use_cpu", "--guidance_scale", *(f"{scale:g}" for scale in SCALES)]
    words += ["--lora", *(f"{lora}={path}" for lora, path in loras.items())]
    return Job(words, tuple(path.name for path in loras.values()))


def fixed_kl(folder: Path) -> float:
    """The mean over the tasks of the divergence at the teachers' states, at the end of the training."""
    history = json.loads((folder / "run.json").read_text(encoding="utf-8"))["evaluation"]
    return statistics.mean(history[f"eval_fixed_kl/{task}"] for task in TASKS)


def make_table(folders: list[Path]) -> str:
    """Means over the seeds and standard deviations between them."""
    lines = [f"| model | guidance | {' | '.join(TASKS)} | mean | Fixed-State divergence |", "|---" * 7 + "|"]
    titles = {"base": "{} base", **{f"teacher-{task}": f"large teacher {task}" for task in TASKS}}
    titles |= {name: title for name, (_, _, title) in STUDENTS.items()}
    for size in ("large", "small"):
        scores = [scores_of(folder, f"evaluation-{size}") for folder in folders]
        for row in scores[0]:
            name, _, scale = row.partition(", guidance ")
            own = [[score[row][task] for task in TASKS] for score in scores]
            cells = [cell(list(values)) for values in zip(*own, strict=True)]
            cells.append(cell([statistics.mean(values) for values in own]))
            trained_at = name in STUDENTS and float(scale) == STUDENTS[name][0]
            cells.append(cell([fixed_kl(folder / name) for folder in folders], 5) if trained_at else "")
            lines.append(f"| {titles[name].format(size)} | {scale} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_experiment(__doc__, "shapes-large-to-small", jobs_of, make_table)
