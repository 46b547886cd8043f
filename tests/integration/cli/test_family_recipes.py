# SPDX-License-Identifier: Apache-2.0
"""The recipes of the model families: a dry run on stand-ins, and one line where the base cannot be reached."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.family_runs import make_family_teacher
from tests.support.tiny_families import family_pipeline
from trl_diffusion_opd import cli
from trl_diffusion_opd.models.registry import family_of


ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "examples" / "configs"
# Recipe, what the stand-in is made with, and what the plan says of the rollout.
RUNS = {
    "zimage": ("zimage", {}, "10 steps of flow at noise level 0, 10 of them trained", "guidance 5"),
    "zimage-turbo": ("zimage", {"shift": 3.0}, "8 steps of flow at noise level 0, 8 of them trained", "guidance 1"),
    "flux2_klein": ("flux2_klein", {}, "10 steps of flow at noise level 0, 10 of them trained", "guidance 4"),
    "flux2_klein-distilled": (
        "flux2_klein",
        {"is_distilled": True},
        "4 steps of flow at noise level 0, 4 of them trained",
        "guidance 1",
    ),
    "flux": ("flux", {}, "10 steps of flow at noise level 0, 10 of them trained", "guidance 3.5"),
    "qwen_image": ("qwen_image", {}, "10 steps of flow at noise level 0, 9 of them trained", "guidance 4"),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_recipe_passes_on_a_local_stand_in(run, tmp_path, capsys):
    name, options, rollout, guidance = RUNS[run]
    recipe = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    pipe = family_pipeline(name, **options)
    pipe.save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("a red circle\na boat\n")
    teachers = {task: make_family_teacher(name, tmp_path / task, i) for i, task in enumerate(recipe["teachers"])}
    prompts = json.dumps(dict.fromkeys(recipe["datasets"], str(tmp_path / "prompts.txt")))
    arguments = {
        "model_name_or_path": tmp_path / "base",
        "teachers": json.dumps(teachers),
        "datasets": prompts,
        "eval_datasets": prompts,
        "height": 16,
        "width": 16,
        "output_dir": tmp_path / "out",
    }
    argv = [part for option, value in arguments.items() for part in (f"--{option}", str(value))]
    cli.main(["opd", "--config", str(CONFIGS / f"{name}.yaml"), "--dry_run", "--use_cpu", *argv])
    out = capsys.readouterr().out
    assert rollout in out and f"parameters, {guidance}\n" in out and "LoRA of rank 32" in out and "16x16 px" in out
    assert out.count(f"teacher: LoRA {tmp_path.name}/") == 2
    text = str(recipe)
    assert not {"num_inference_steps", "guidance_scale", "skip_last_steps", "lora_target_modules"} & set(recipe), text
    assert family_of(pipe).defaults(lambda part: getattr(pipe, part).config if part else pipe.config)


OFFLINE = """
import sys
from trl_diffusion_opd import cli
for words in " ".join(sys.argv[1:]).split(" END "):
    try:
        cli.main(words.split())
    except SystemExit as end:
        print("exit", end.code, file=sys.stderr)
"""


def test_a_base_that_cannot_be_reached_is_told_in_one_line(tmp_path):
    names, commands = ["zimage", "flux2_klein", "flux", "qwen_image", "sd35_large_to_medium"], []
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    for name in names:
        recipe = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        text = (CONFIGS / f"{name}.yaml").read_text().replace("teachers/", "me/teachers/")
        for address in {*recipe["datasets"].values(), *recipe["eval_datasets"].values()}:
            text = text.replace(address, str(tmp_path / "prompts.txt"))
        (tmp_path / f"{name}.yaml").write_text(text)
        commands.append(f"opd --config {tmp_path / name}.yaml --dry_run --use_cpu --output_dir {tmp_path / name}")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", OFFLINE, *" END ".join(commands).split()]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, cwd=ROOT)
    lines = [line for line in run.stderr.splitlines() if line.strip()]
    assert len(lines) == 2 * len(names), run.stderr
    for name, error, end in zip(names, lines[::2], lines[1::2], strict=True):
        base = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model_name_or_path"]
        assert error.startswith("error: model: ") and base in error and "HF_HUB_OFFLINE" in error and end == "exit 2"
