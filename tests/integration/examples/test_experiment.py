# SPDX-License-Identifier: Apache-2.0
"""The script of the whole experiment in the Shapes world: its jobs, their order, going on, and its table."""

import json
import sys
from pathlib import Path

import pytest

from trl_diffusion_opd.cli.recipe import parse_recipe
from trl_diffusion_opd.cli.train import METHODS
from trl_diffusion_opd.evaluation.benchmark.arguments import EvaluationArguments
from trl_diffusion_opd.evaluation.benchmark.entries import choose_entries
from trl_diffusion_opd.evaluation.benchmark.suites import choose_benchmarks


sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))

from shapes.experiment import PARTS, ROWS, TASKS, Job, jobs_of, make_table, run_all  # noqa: E402
from shapes.train_teachers import CARD, WEIGHTS, ship  # noqa: E402


def words(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_every_job_is_a_command_that_its_parser_takes(tmp_path):
    jobs = jobs_of(tmp_path, seed=3, num_images=8)
    made = {}
    for name, job in jobs.items():
        assert job.command[1:3] == ["-m", "trl_diffusion_opd"]
        method, *rest = job.command[3:]
        if method == "eval":
            continue
        script, args, _ = parse_recipe(rest, (METHODS[method].arguments, METHODS[method].config))
        made[name] = (method, script, args)
        assert args.seed == 3 and args.output_dir == str(tmp_path / name)
    assert {name: method for name, (method, _, _) in made.items()} == {
        **{"shapes-teacher-geneval": "nft", "shapes-teacher-ocr": "grpo", "shapes-teacher-aesthetic": "grpo"},
        **{"opd": "opd", "joint-grpo-guard": "grpo", "joint-nft": "nft"},
        **{f"cascade-nft-{task}": "nft" for task in TASKS},
    }
    for task in TASKS:
        assert list(made[f"shapes-teacher-{task}"][1].datasets) == [task]
    assert made["opd"][1].teachers == {task: str(tmp_path / f"shapes-teacher-{task}") for task in TASKS}
    assert list(made["joint-nft"][1].datasets) == list(TASKS) == list(made["joint-grpo-guard"][1].datasets)
    chain = [(script.tasks, script.adapter) for name, (_, script, _) in made.items() if name.startswith("cascade")]
    assert chain == [
        (["aesthetic"], None),
        (["geneval"], str(tmp_path / "cascade-nft-aesthetic")),
        (["ocr"], str(tmp_path / "cascade-nft-geneval")),
    ]
    for name, job in jobs.items():
        used = [other for other in jobs if str(tmp_path / other) in " ".join(job.command)]
        assert set(used) - {name} <= set(job.needs), "it runs after all whose folders it reads"


def test_the_evaluation_has_every_row_of_the_table(tmp_path):
    command = jobs_of(tmp_path, seed=0, num_images=8)["evaluation"].command
    assert command[3] == "eval"
    options, _ = parse_recipe(command[4:], (EvaluationArguments,))
    assert options.num_inference_steps == 10
    suites = choose_benchmarks(options.benchmarks)
    assert [suite.name for suite in suites] == [f"shapes_{task}" for task in TASKS]
    rows = choose_entries(list(options.loras), options.guidance_scale, merge=options.merge)
    assert sorted(row.name for row in rows) == sorted(ROWS)
    teachers = tuple(f"teacher-{task}" for task in TASKS)
    assert [row.loras for row in rows if row.name.startswith("merge")] == [teachers, teachers]
    assert {row.guidance_scale for row in rows if row.name != "base, guidance 3"} == {1.0}
    assert PARTS.keys() == {row for row in ROWS if not row.startswith("base")}


def test_jobs_run_after_what_they_need_and_only_once(tmp_path):
    log = tmp_path / "log.txt"

    def job(name, *needs):
        return Job(
            words(f"import os; open({str(log)!r}, 'a').write('{name} ' + os.environ['OMP_NUM_THREADS'])"), needs
        )

    jobs = {(tmp_path, "last"): job("c", "first", "second"), (tmp_path, "second"): job("b", "first")}
    jobs[tmp_path, "first"] = job("a")
    run_all(jobs, 2)
    assert log.read_text() == "a 1b 1c 1"
    (tmp_path / "second" / "done.json").unlink()
    run_all(jobs, 2)
    assert log.read_text() == "a 1b 1c 1b 1"


def test_a_job_that_fails_ends_the_experiment(tmp_path):
    jobs = {
        (tmp_path / "seed-1", "bad"): Job(words("print('why'); raise SystemExit(3)")),
        (tmp_path / "seed-1", "after"): Job(words("print('never')"), ("bad",)),
    }
    with pytest.raises(SystemExit, match=r"seed-1: bad failed, see .*seed-1/bad.log"):
        run_all(jobs, 2)
    assert (tmp_path / "seed-1" / "bad.log").read_text() == "why\n"
    assert not (tmp_path / "seed-1" / "after.log").exists()


def test_the_table_has_means_spreads_and_the_time_of_all_that_a_row_took(tmp_path):
    for seed in (0, 1):
        for part in {part for parts in PARTS.values() for part in parts}:
            (tmp_path / f"{seed}" / part).mkdir(parents=True)
            seconds = {"opd": 120 + 60 * seed}.get(part, 60)
            (tmp_path / f"{seed}" / part / "run.json").write_text(json.dumps({"seconds": seconds}))
        results = [
            {"model": row, "benchmark": f"shapes_{task}", "value": 0.1 * column + 0.2 * seed}
            for row in ROWS
            for column, task in enumerate(TASKS)
        ]
        (tmp_path / f"{seed}" / "evaluation").mkdir()
        (tmp_path / f"{seed}" / "evaluation" / "summary.json").write_text(json.dumps({"results": results}))
    lines = make_table([tmp_path / "0", tmp_path / "1"]).splitlines()
    assert lines[0] == "| model | geneval | ocr | aesthetic | mean | minutes of training |"
    scores = "0.100 ± 0.141 | 0.200 ± 0.141 | 0.300 ± 0.141 | 0.200 ± 0.141"
    assert lines[2] == f"| base | {scores} |  |"
    assert (
        f"| cascade NFT | {scores} | 3.0 ± 0.0 |" in lines
        and lines[-1] == f"| **DiffusionOPD** | {scores} | 5.5 ± 0.7 |"
    )
    assert "±" not in make_table([tmp_path / "0"])


def test_what_is_shipped_of_a_teacher(tmp_path):
    run, weights, card = tmp_path / "run", tmp_path / "teachers" / "ocr", tmp_path / "cards" / "ocr"
    for name in (WEIGHTS, "pytorch_lora_weights_raw.safetensors", "run.json", "README.md", "images/a.png"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    (card / "images").mkdir(parents=True)
    (card / "images" / "old.png").write_text("old")
    ship(run, weights, card)
    assert [path.name for path in weights.iterdir()] == [WEIGHTS]
    shipped = {path.relative_to(card).as_posix() for path in card.rglob("*") if path.is_file()}
    assert shipped == {"run.json", "README.md", "images/a.png"} and "curves.png" in CARD
