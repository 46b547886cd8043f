# SPDX-License-Identifier: Apache-2.0
"""
The paper's whole experiment in the Shapes world: teachers by reinforcement learning, their distillation into one
student, and what this is compared with, for several seeds. Ends with a table of means and spreads, `table.md`.

    python examples/shapes/experiment.py

The same command goes on where it stopped. All runs have one thread.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes.train_teachers import SHAPES, TEACHERS, command, teacher_command  # noqa: E402


TASKS = tuple(TEACHERS)
CASCADE = ("aesthetic", "geneval", "ocr")
TEACHER_RUNS = tuple(f"shapes-teacher-{task}" for task in TASKS)
GUIDANCE = 3
ROWS = {
    "base, guidance 1": "base",
    f"base, guidance {GUIDANCE}": f"base, guidance {GUIDANCE}",
    **{f"teacher-{task}": f"teacher {task}" for task in TASKS},
    "merge_sum": "sum of the teachers",
    "merge_mean": "mean of the teachers",
    "joint-grpo-guard": "joint GRPO-Guard",
    "joint-nft": "joint NFT",
    "cascade-nft": "cascade NFT",
    "opd": "**DiffusionOPD**",
}
# The runs whose training each of them took.
PARTS = {
    **{f"teacher-{task}": (f"shapes-teacher-{task}",) for task in TASKS},
    "merge_sum": TEACHER_RUNS,
    "merge_mean": TEACHER_RUNS,
    "joint-grpo-guard": ("joint-grpo-guard",),
    "joint-nft": ("joint-nft",),
    "cascade-nft": tuple(f"cascade-nft-{task}" for task in CASCADE),
    "opd": (*TEACHER_RUNS, "opd"),
}


@dataclass(frozen=True)
class Job:
    """A command to be run once the jobs that it needs are done."""

    command: list[str]
    needs: tuple[str, ...] = ()


def jobs_of(folder: Path, seed: int, num_images: int) -> dict[str, Job]:
    """All that is done for a seed, by name, which is also the folder of what comes of it."""
    jobs = {f"shapes-teacher-{t}": Job(teacher_command(t, folder / f"shapes-teacher-{t}", seed)) for t in TASKS}
    teachers = json.dumps({task: str(folder / f"shapes-teacher-{task}") for task in TASKS})
    jobs["opd"] = Job(command("opd", folder / "opd", seed, "--teachers", teachers), TEACHER_RUNS)
    jobs["joint-grpo-guard"] = Job(command("grpo", folder / "joint-grpo-guard", seed))
    jobs["joint-nft"] = Job(command("nft", folder / "joint-nft", seed))
    last = None
    for task in CASCADE:
        name, options = f"cascade-nft-{task}", ["--tasks", task]
        options += ["--adapter", str(folder / last)] if last else []
        jobs[name] = Job(command("nft", folder / name, seed, *options), (last,) if last else ())
        last = name
    loras = [f"teacher-{task}={folder / f'shapes-teacher-{task}'}" for task in TASKS]
    loras += [f"{name}={folder / PARTS[name][-1]}" for name in ("joint-grpo-guard", "joint-nft", "cascade-nft", "opd")]
    teachers = ",".join(f"teacher-{task}" for task in TASKS)
    evaluation = [sys.executable, "-m", "trl_diffusion_opd", "eval", "--model", str(SHAPES / "base")]
    evaluation += ["--benchmarks", str(SHAPES / "benchmarks.yaml"), "--num_images", str(num_images)]
    evaluation += ["--num_inference_steps", "10"]
    evaluation += ["--max_sequence_length", "10", "--seed", str(42 + seed), "--batch_size", "64", "--use_cpu"]
    evaluation += ["--output_dir", str(folder / "evaluation"), "--guidance_scale", "1", "base=1", f"base={GUIDANCE}"]
    evaluation += ["--lora", *loras, "--merge", f"sum={teachers}", f"mean={teachers}"]
    jobs["evaluation"] = Job(evaluation, tuple(jobs))
    return jobs


def run(folder: Path, name: str, job: Job) -> None:
    """Do a job, unless it was done."""
    done = folder / name / "done.json"
    if done.is_file():
        return
    start = time.time()
    done.parent.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.log", "w", encoding="utf-8") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if subprocess.run(job.command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode:
            raise SystemExit(f"{folder.name}: {name} failed, see {log.name}.")
    done.write_text(json.dumps({"seconds": round(time.time() - start, 1)}), encoding="utf-8")
    print(f"{time.strftime('%H:%M:%S')} {folder.name}: {name}, {time.time() - start:.0f} s", flush=True)


def run_all(jobs: dict[tuple[Path, str], Job], num_jobs: int) -> None:
    """Do all jobs, so many at a time, each after what it needs, else in their order."""
    order = {key: index for index, key in enumerate(jobs)}
    sorter = TopologicalSorter(
        {(folder, name): [(folder, n) for n in job.needs] for (folder, name), job in jobs.items()}
    )
    sorter.prepare()
    ready, pending = [], {}
    with ThreadPoolExecutor(num_jobs) as executor:
        while sorter.is_active():
            ready = sorted([*ready, *sorter.get_ready()], key=order.get)
            while ready and len(pending) < num_jobs:
                key = ready.pop(0)
                pending[executor.submit(run, *key, jobs[key])] = key
            finished, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
                sorter.done(pending.pop(future))


def scores_of(folder: Path, evaluation: str = "evaluation") -> dict[str, dict[str, float]]:
    """Scores by row and task of one seed."""
    results = json.loads((folder / evaluation / "summary.json").read_text(encoding="utf-8"))["results"]
    scores: dict[str, dict[str, float]] = {}
    for result in results:
        scores.setdefault(result["model"], {})[result["benchmark"].removeprefix("shapes_")] = result["value"]
    return scores


def cell(values: list[float], digits: int = 3) -> str:
    """A mean and, of several values, their standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def minutes_of(folder: Path, row: str) -> float:
    """Minutes of training."""
    records = [json.loads((folder / part / "run.json").read_text(encoding="utf-8")) for part in PARTS.get(row, ())]
    return sum(record["seconds"] for record in records) / 60


def make_table(folders: list[Path]) -> str:
    """Means over the seeds and standard deviations between them."""
    scores = [scores_of(folder) for folder in folders]
    lines = [f"| model | {' | '.join(TASKS)} | mean | minutes of training |", "|---" * (len(TASKS) + 3) + "|"]
    for row, title in ROWS.items():
        own = [[score[row][task] for task in TASKS] for score in scores]
        cells = [cell(list(values)) for values in zip(*own, strict=True)]
        cells.append(cell([statistics.mean(values) for values in own]))
        minutes = [minutes_of(folder, row) for folder in folders]
        cells.append(cell(minutes, 1) if any(minutes) else "")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def run_experiment(
    description: str,
    output_dir: str,
    jobs_of: Callable[[Path, int, int], dict[str, Job]],
    make_table: Callable[[list[Path]], str],
) -> None:
    """The command line of an experiment: does its jobs for each seed and writes the table."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--num_images", type=int, default=192, help="images a task and model in the evaluation")
    args = parser.parse_args()
    folders = {seed: args.output_dir / f"seed-{seed}" for seed in args.seeds}
    jobs = {
        (folder, name): job
        for seed, folder in folders.items()
        for name, job in jobs_of(folder, seed, args.num_images).items()
    }
    run_all(jobs, args.num_jobs)
    table = make_table(list(folders.values()))
    (args.output_dir / "table.md").write_text(table, encoding="utf-8")
    print(f"\n{table}")


if __name__ == "__main__":
    run_experiment(__doc__, "shapes-experiment", jobs_of, make_table)
