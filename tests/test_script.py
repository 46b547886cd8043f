# SPDX-License-Identifier: Apache-2.0
"""`examples/train_opd.py`: recipes, the dry run, and errors of one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from trl_diffusion_opd.script import check_unique_keys, load_function, main

from .runs import PROMPTS, make_teachers
from .tiny import random_lora, save_peft_lora, tiny_pipeline


ROOT = Path(__file__).parents[1]
SD35 = ROOT / "examples" / "configs" / "sd35_medium.yaml"


@pytest.fixture
def recipe(tmp_path):
    """A recipe in a folder of its own, whose paths are relative to it."""
    folder = tmp_path / "recipe"
    folder.mkdir()
    tiny_pipeline().save_pretrained(folder / "base")
    make_teachers(folder)
    for task, prompts in PROMPTS.items():
        (folder / f"{task}.txt").write_text("\n".join(prompts))
    (folder / "scene.jsonl").write_text("\n".join(json.dumps({"caption": prompt}) for prompt in PROMPTS["scene"]))
    (folder / "rewards.py").write_text(
        "def dark(images, prompts, **columns):\n    return [-float(i.mean()) for i in images]\n"
    )
    content = {
        "model_name_or_path": "base",
        "teachers": {"count": "count", "scene": {"name_or_path": "scene", "guidance_scale": 1.0}},
        "datasets": {"count": "count.txt", "scene": {"path": "scene.jsonl", "column": "caption"}},
        "eval_datasets": {task: f"{task}.txt" for task in PROMPTS},
        "reward_funcs": {"count": "rewards.py:dark", "scene": ["rewards.py:dark"]},
        "lora_r": 4,
        "lora_target_modules": ["attn.to_q"],
        "max_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "num_inference_steps": 3,
        "max_sequence_length": 16,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "output_dir": str(tmp_path / "out"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_recipe_trains_compares_and_tells_where_everything_is(recipe, tmp_path, capsys):
    main(argv=["--config", str(recipe), "--compare", "--learning_rate", "0.05"])
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results) == {"base", "teachers", "merge", "student"}
    assert results["student"] != results["base"]
    assert "| base" in out and "share of the gain" in out
    assert f'pipe.load_lora_weights("{tmp_path / "out"}", weight_name="pytorch_lora_weights.safetensors")' in out
    for name in ("curves.png", "README.md", "images/step_000002.png", "pytorch_lora_weights.safetensors"):
        assert (tmp_path / "out" / name).is_file(), name
    tensors = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert all("attn.to_q" in name for name in tensors)
    assert next(t for n, t in tensors.items() if "lora_A" in n).shape[0] == 4


def test_a_dry_run_prints_the_plan_and_trains_nothing(recipe, tmp_path, capsys):
    main(argv=["--config", str(recipe), "--dry_run"])
    out = capsys.readouterr().out
    for part in (
        "base ",
        "count ",
        "5 prompts (5 held out)",
        "guidance 1",
        "2 of them trained",
        "rounds     2 of 4 images",
    ):
        assert part in out, out
    assert not (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()


def test_the_published_recipe_passes_on_a_local_model_with_peft_teachers(tmp_path, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "sd3")
    teachers, datasets = [], {}
    for seed, task in enumerate(("aesthetic", "ocr", "geneval")):
        save_peft_lora(tmp_path / task / "lora", *random_lora(rank=8, alpha=16, seed=seed))
        scale = 1.0 if task == "geneval" else 4.5
        teachers.append(
            {"task": task, "name_or_path": str(tmp_path / task), "subfolder": "lora", "guidance_scale": scale}
        )
        (tmp_path / f"{task}.jsonl").write_text('{"prompt": "a red circle"}\n{"prompt": "a boat"}\n')
        datasets[task] = str(tmp_path / f"{task}.jsonl")
    arguments = {
        "model_name_or_path": tmp_path / "sd3",
        "teachers": json.dumps({t.pop("task"): t for t in teachers}),
        "datasets": json.dumps(datasets),
        "eval_datasets": json.dumps(datasets),
        "height": 16,
        "width": 16,
        "output_dir": tmp_path / "out",
    }
    argv = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    main(argv=["--config", str(SD35), "--dry_run", *argv])
    out = capsys.readouterr().out
    assert "LoRA of rank 32" in out and "10 steps of flow at noise level 0, 9 of them trained" in out
    assert out.count("guidance 4.5") == 3 and "guidance 1\n" in out


def test_the_published_recipe_without_the_hub_fails_with_one_line(tmp_path):
    prompts = {task: tmp_path / f"{task}.txt" for task in ("aesthetic", "ocr", "geneval")}
    for path in prompts.values():
        path.write_text("a red circle\n")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, str(ROOT / "examples" / "train_opd.py"), "--config", str(SD35), "--dry_run"]
    command += ["--datasets", json.dumps({task: str(path) for task, path in prompts.items()})]
    command += ["--output_dir", str(tmp_path / "out")]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    lines = [line for line in run.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, run.stderr
    assert lines[0].startswith("error: model: ") and "stabilityai/stable-diffusion-3.5-medium" in lines[0]
    assert "HF_HUB_OFFLINE" in lines[0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_name_or_path": None}, "`model_name_or_path` is not set"),
        ({"teachers": {"count": "count"}}, "names unknown tasks \\['scene'\\]"),
        ({"teachers": {"count": "count", "scene": "nowhere/at all"}}, "nowhere|must be an existing local path"),
        ({"datasets": {"count": "count.txt", "scene": "missing.txt"}}, "'missing.txt' does not exist"),
        ({"reward_funcs": {"count": "rewards"}}, "named as `module:function`"),
        ({"reward_funcs": {"count": "no_such_module:f"}}, "No module named 'no_such_module'"),
        ({"skip_last_steps": 3}, "`skip_last_steps` must be"),
    ],
)
def test_mistakes_end_with_one_line_and_exit_code_2(recipe, capsys, change, message):
    import re

    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), **change}))
    with pytest.raises(SystemExit) as exit_info:
        main(argv=["--config", str(recipe)])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and re.search(message, error), error


def test_a_teacher_bound_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("teachers:\n  ocr: a/b\n  ocr: c/d\n")
    with pytest.raises(ValueError, match="the key 'ocr' is there twice"):
        check_unique_keys(path)


def test_functions_are_found_by_module_and_by_file(tmp_path):
    (tmp_path / "mine.py").write_text("def score():\n    return 7\n")
    assert load_function(f"{tmp_path}/mine.py:score")() == 7
    assert load_function("math:sqrt")(4) == 2
    with pytest.raises(ValueError, match="the module has no 'root'"):
        load_function("math:root")


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(argv=["--help"])
    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    for name in ("--teachers", "--dry_run", "--noise_level", "--ema_decay", "--task_weights", "--lora_r"):
        assert name in out


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path, capsys):
    from trl import TrlParser

    from trl_diffusion_opd import DiffusionOPDConfig
    from trl_diffusion_opd.script import ScriptArguments

    check_unique_keys(path)
    parser = TrlParser((ScriptArguments, DiffusionOPDConfig))
    script_args, config = parser.parse_args_and_config(["--config", str(path)])
    assert set(script_args.teachers) == set(script_args.datasets)
    assert config.num_inference_steps == 10
