# SPDX-License-Identifier: Apache-2.0
"""Trainings from the command line: progress bars, refusals while training, bugs of others."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.recipes import write_recipe
from trl_diffusion_opd import cli


ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """What a command sets for its process is taken back."""
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        monkeypatch.setenv(name, "error")


@pytest.mark.slow
def test_bars_are_shown_and_can_be_turned_off(tmp_path):
    prompts = {"count": [f"a circle {n}" for n in range(20)], "scene": ["a boat"]}
    (tmp_path / "rewards.py").write_text("def dark(images, prompts, **columns):\n    return [0.0 for i in images]\n")
    settings = {"datasets": prompts, "eval_datasets": prompts, "reward_funcs": {"count": "../rewards.py:dark"}}
    recipe = write_recipe(tmp_path / "recipe", compare=True, num_eval_images=2, **settings)
    command = [sys.executable, "-m", "trl_diffusion_opd", "opd", "--config", str(recipe)]
    shown, silent = (
        subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=300)
        for options in ([], ["--disable_tqdm"])
    )
    assert shown.returncode == silent.returncode == 0, shown.stderr + silent.stderr
    assert "2/2 [" in shown.stderr and "Encoding prompts: " in shown.stderr, shown.stderr
    assert "Scoring" in shown.stderr, shown.stderr
    assert "it/s" not in silent.stderr and "s/it" not in silent.stderr, silent.stderr
    assert "'loss'" in shown.stdout and "'loss'" in silent.stdout


def test_what_is_refused_while_training_is_one_line(tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe", disable_tqdm=True)
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(SystemExit) as info:
        cli.main(["opd", "--config", str(recipe), "--resume_from_checkpoint", nowhere])
    error = capsys.readouterr().err.splitlines()[-1]
    assert info.value.code == 2 and error.startswith("error: ") and nowhere in error, error


def test_a_bug_of_a_reward_function_keeps_its_traceback(tmp_path):
    (tmp_path / "rewards.py").write_text("def bad(images, prompts, **columns):\n    return [float('x')]\n")
    prompts = {"count": ["a circle", "a square"]}
    settings = {"teachers": None, "datasets": prompts, "reward_funcs": {"count": "../rewards.py:bad"}}
    recipe = write_recipe(tmp_path / "recipe", disable_tqdm=True, num_generations=2, **settings)
    with pytest.raises(ValueError, match="could not convert string to float: 'x'"):
        cli.main(["nft", "--config", str(recipe)])


def test_the_first_command_is_opd_and_train_is_another_name_of_it(tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe", disable_tqdm=True)
    out = []
    for name in ("opd", "train"):
        cli.main([name, "--config", str(recipe), "--dry_run"])
        out.append(capsys.readouterr().out)
    assert out[0] == out[1] != ""
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert out.index("\n    opd (train)") < out.index("\n    grpo") < out.index("\n    nft") < out.index("\n    push")
    for name in ("opd", "train"):
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: trl-diffusion-opd {name} --config RECIPE")


@pytest.mark.slow
def test_accelerates_refusals_are_one_line(tmp_path):
    (tmp_path / "two.yaml").write_text(
        "distributed_type: MULTI_GPU\nnum_processes: 2\ngpu_ids: '0'\nnum_machines: 1\n"
    )
    command = [sys.executable, "-m", "trl_diffusion_opd", "opd", "--config_file", str(tmp_path / "two.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: Less than two GPU ids were configured"), done.stderr
    assert done.stderr.count("\n") == 1
