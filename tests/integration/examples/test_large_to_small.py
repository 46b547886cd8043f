# SPDX-License-Identifier: Apache-2.0
"""The script of a large base that teaches a small one: its jobs and its table."""

import json
import sys
from pathlib import Path

import pytest

from trl_diffusion_opd.cli.recipe import parse_recipe
from trl_diffusion_opd.cli.train import METHODS
from trl_diffusion_opd.evaluation.benchmark.arguments import EvaluationArguments
from trl_diffusion_opd.evaluation.benchmark.entries import choose_entries


sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))

from shapes.large_to_small import LARGE, SCALES, SMALL, STUDENTS, TASKS, jobs_of, make_table  # noqa: E402


def test_every_job_is_a_command_that_its_parser_takes(tmp_path):
    jobs, rows = jobs_of(tmp_path, seed=3, num_images=8), {}
    for name, job in jobs.items():
        assert job.command[1:3] == ["-m", "trl_diffusion_opd"]
        method, *rest = job.command[3:]
        if method == "eval":
            options, _ = parse_recipe(rest, (EvaluationArguments,))
            rows[options.model] = choose_entries(list(options.loras), options.guidance_scale)
            assert set(job.needs) == {Path(path).name for path in options.loras.values()}
            continue
        script, args, _ = parse_recipe(rest, (METHODS[method].arguments, METHODS[method].config))
        assert args.seed == 3 and args.output_dir == str(tmp_path / name)
        if method != "opd":
            assert script.model_name_or_path == str(LARGE) and not job.needs
            continue
        own, theirs, _ = STUDENTS[name]
        assert script.model_name_or_path == "../shapes/base" and args.guidance_scale == own
        assert args.eval_fixed_kl and args.eval_steps == args.max_steps and not script.compare
        for task, teacher in script.teachers.items():
            lora = str(tmp_path / f"shapes-teacher-{task}")
            assert teacher == {"name_or_path": lora, "base": str(LARGE), "guidance_scale": theirs}
    assert len(rows[str(LARGE)]) == len(rows[str(SMALL)]) == 4 * len(SCALES)


def test_the_table(tmp_path):
    for seed in (0, 1):
        for size, loras in (("large", [f"teacher-{task}" for task in TASKS]), ("small", STUDENTS)):
            results = [
                {"model": f"{name}, guidance {scale:g}", "benchmark": f"shapes_{task}", "value": 0.2 * seed + scale}
                for name in ("base", *loras)
                for scale in SCALES
                for task in TASKS
            ]
            (tmp_path / str(seed) / f"evaluation-{size}").mkdir(parents=True)
            (tmp_path / str(seed) / f"evaluation-{size}" / "summary.json").write_text(json.dumps({"results": results}))
        for name in STUDENTS:
            (tmp_path / str(seed) / name).mkdir()
            kl = {f"eval_fixed_kl/{task}": 0.01 * (seed + index) for index, task in enumerate(TASKS)}
            (tmp_path / str(seed) / name / "run.json").write_text(json.dumps({"evaluation": {"step": 100, **kl}}))
    lines = make_table([tmp_path / "0", tmp_path / "1"]).splitlines()
    assert len(lines) == 2 + 2 * 4 * len(SCALES) and len({line.count("|") for line in lines}) == 1
    own = "1.100 ± 0.141"
    assert f"| small base | 1 | {own} | {own} | {own} | {own} |  |" in lines
    [folded] = [line for line in lines if "folded" in line and "| 1 |" in line]
    assert folded.endswith(f"| {own} | 0.01500 ± 0.00707 |")
    assert sum("0.01500" in line for line in lines) == len(STUDENTS), "where it is drawn as it was trained"


@pytest.mark.skipif(not LARGE.is_dir(), reason="the large base is not built")
def test_the_large_base_has_the_latents_and_the_texts_of_the_small_one():
    for part in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        files = [next((base / part).glob("*.safetensors")).read_bytes() for base in (SMALL, LARGE)]
        assert files[0] == files[1], part
    assert sum(file.stat().st_size for file in LARGE.rglob("*")) < 15 * 2**20
