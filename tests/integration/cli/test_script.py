# SPDX-License-Identifier: Apache-2.0
"""Recipes of all methods: from a file to a trained LoRA, the dry run, and errors of one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.support.runs import PROMPTS, make_teachers
from tests.support.tiny import random_lora, save_diffusers_lora, save_peft_lora, tiny_pipeline
from trl_diffusion_opd.cli.recipe import parse_recipe
from trl_diffusion_opd.cli.recipe_file import check_recipe
from trl_diffusion_opd.cli.train import METHODS, main
from trl_diffusion_opd.rewards.geneval_prompts import geneval_prompts
from trl_diffusion_opd.rewards.lookup import load_function


ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
SD35 = ROOT / "examples" / "configs" / "sd35_medium.yaml"


def method_of(path):
    return next((name for name in ("grpo", "nft") if f"_{name}" in path.stem), "opd")


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


def change(recipe, name="recipe.yaml", **settings):
    """The recipe with other settings, in a file beside it; `None` leaves one out."""
    content = {**yaml.safe_load(recipe.read_text()), **settings}
    path = recipe.with_name(name)
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


def results_of(recipe):
    return json.loads((Path(yaml.safe_load(recipe.read_text())["output_dir"]) / "results.json").read_text())


@pytest.fixture
def rewarded(recipe):
    """The recipe without teachers, for the methods that learn from rewards."""
    return change(recipe, teachers=None, num_generations=2, compare=True, learning_rate=0.05)


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


def test_prompt_sets_are_named_with_their_options(recipe, capsys):
    content = yaml.safe_load(recipe.read_text())
    content["datasets"]["scene"]["streaming"] = True
    content["eval_datasets"]["count"] = {"path": "count.txt", "split": "train[:2]"}
    recipe.write_text(yaml.safe_dump(content))
    main(argv=["--config", str(recipe), "--dry_run"])
    out = capsys.readouterr().out
    assert "5 prompts (2 held out)" in out and "streamed prompts (3 held out)" in out
    assert "rounds     2 of 4 images on 1 process(es)\n" in out
    with pytest.raises(SystemExit):
        main(argv=["--config", str(recipe), "--dry_run", "--max_steps", "-1"])
    assert "`train_dataset` has a stream, whose length is not known. Set `max_steps`." in capsys.readouterr().err


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
    "changes, message",
    [
        ({"model_name_or_path": None}, "`model_name_or_path` is not set"),
        ({"teachers": {"count": "count"}}, "names unknown tasks \\['scene'\\]"),
        ({"teachers": {"count": "count", "scene": "nowhere/at all"}}, "nowhere|must be an existing local path"),
        ({"datasets": {"count": "count.txt", "scene": "missing.txt"}}, "'missing.txt' does not exist"),
        ({"reward_funcs": {"count": "rewards"}}, "no reward 'rewards'. The built-in ones are geneval, .* named as"),
        ({"reward_funcs": {"count": "no_such_module:f"}}, "No module named 'no_such_module'"),
        ({"skip_last_steps": 3}, "`skip_last_steps` must be"),
        (
            {"tasks": ["count", "sound"]},
            "`tasks` names \\['sound'\\], but `datasets` has prompts for \\['count', 'scene'",
        ),
        ({"compare": True, "reward_funcs": None}, "A comparison needs a task with prompts and a reward"),
        ({"adapter": "nowhere"}, "must be an existing local path or `owner/repo`"),
        ({"adapter": "base"}, "adapter '.*base'"),
        ({"adapter": "scene", "lora_r": 4}, "saved with another LoRA config|have no place|wrong shapes|are missing"),
        (
            {"reward_funcs": {"count": "geneval"}},
            "`geneval` of task 'count' needs the column 'metadata', but `eval_data",
        ),
    ],
)
def test_mistakes_end_with_one_line_and_exit_code_2(recipe, capsys, changes, message):
    error = failed(change(recipe, **changes), "opd", capsys)
    assert re.search(message, error), error


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"reward_funcs": None}, "`reward_funcs` is not set. Name it in a recipe"),
        ({"reward_funcs": {"count": "orc", "scene": "ocr"}}, "There is no reward 'orc'"),
        (
            {"reward_funcs": {"count": "ocr", "scene": "geneval"}},
            "'scene' needs the column 'metadata', but `train_data",
        ),
        ({"reward_funcs": {"count": "ocr", "sound": "ocr"}}, "`train_dataset` names unknown tasks \\['scene'\\]"),
        ({"datasets": {"count": "count.txt"}}, "no prompts for tasks of `reward_funcs`: \\['scene'\\]"),
        ({"reward_weights": [1.0, 2.0]}, "`reward_weights` has 2 weights, but task 'count' has 1 reward"),
        ({"eval_datasets": None}, "A comparison needs a task with prompts and a reward"),
        ({"teachers": {"count": "count"}}, "unknown settings .*teachers"),
        ({"num_generations": 3}, "no multiple of `num_generations` = 3"),
    ],
)
def test_mistakes_with_rewards_end_with_one_line_and_exit_code_2(rewarded, capsys, changes, message):
    error = failed(change(rewarded, **changes), "nft", capsys)
    assert re.search(message, error), error


def failed(recipe, method, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(argv=["--config", str(recipe)], method=method)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_an_extra_that_is_not_installed_is_named_before_anything_is_loaded(rewarded, capsys, monkeypatch):
    monkeypatch.setattr("trl_diffusion_opd.rewards.ocr.OCRReward.requires", ("rapidocr", "no_such_engine"))
    path = change(rewarded, model_name_or_path="base", reward_funcs={"count": "ocr", "scene": "ocr"})
    assert 'pip install "trl-diffusion-opd[rewards]"' in failed(path, "grpo", capsys)


def test_a_teacher_bound_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("teachers:\n  ocr: a/b\n  ocr: c/d\n")
    with pytest.raises(ValueError, match="the key 'ocr' is there twice"):
        check_recipe(path)


def test_functions_are_found_by_module_and_by_file(tmp_path):
    (tmp_path / "mine.py").write_text("def score():\n    return 7\n")
    assert load_function(f"{tmp_path}/mine.py:score")() == 7
    assert load_function("math:sqrt")(4) == 2
    with pytest.raises(ValueError, match="the module has no 'root'"):
        load_function("math:root")


# Rewards


@pytest.mark.parametrize("method", ["grpo", "nft"])
def test_a_recipe_with_rewards_trains_compares_and_is_continued(rewarded, tmp_path, capsys, method):
    main(argv=["--config", str(rewarded), "--steps_per_rollout", "1"], method=method)
    out = capsys.readouterr().out
    results = results_of(rewarded)
    assert list(results) == ["base", "student", "student_raw"] and results["student_raw"] != results["base"]
    table = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")]
    assert table[0] == "model" and table[2:] == ["base", "**student**", "student, raw weights"]
    assert "2 of them trained" in out and "images     4 in a rollout, 2 of a prompt, shared by 1 round(s)" in out
    assert "count        5 prompts (5 held out), weight 1; reward: dark" in out

    # Another stage: its LoRA has the shape of the first one's and starts from its averaged weights.
    second = {"adapter": str(tmp_path / "out"), "output_dir": str(tmp_path / "second"), "learning_rate": 0.0}
    path = change(rewarded, "second.yaml", tasks=["scene"], lora_r=None, lora_target_modules=None, **second)
    main(argv=["--config", str(path), "--steps_per_rollout", "1"], method=method)
    out = capsys.readouterr().out
    assert "LoRA of rank 4" in out and f"starts from {tmp_path.name}/out" in out and "count" not in out
    assert results_of(path)["student"] == {"scene": pytest.approx(results["student"]["scene"], abs=1e-6)}
    tensors = [load_file(tmp_path / folder / "pytorch_lora_weights.safetensors") for folder in ("out", "second")]
    assert all((tensors[0][name] == tensors[1][name]).all() for name in tensors[0]) and len(tensors[1]) == len(
        tensors[0]
    )


def test_a_distillation_may_start_from_a_lora(recipe, tmp_path, capsys):
    path = change(recipe, lora_r=None, lora_target_modules=None, adapter="count", learning_rate=0.0, max_steps=1)
    main(argv=["--config", str(path), "--compare"])
    assert "starts from recipe/count" in capsys.readouterr().out
    results = results_of(path)
    assert results["student"] == results["teachers"]["count"] != results["base"]
    assert "It started from the LoRA `recipe/count`." in (tmp_path / "out" / "README.md").read_text()


def test_some_tasks_of_a_recipe(recipe, capsys):
    main(argv=["--config", str(recipe), "--tasks", "scene", "--dry_run"])
    out = capsys.readouterr().out
    assert "  scene        3 prompts" in out and "count" not in out


@pytest.mark.parametrize(
    "path",
    [path for path in CONFIGS if method_of(path) != "opd" and "sd35" in path.stem],
    ids=lambda path: path.stem,
)
def test_the_published_recipes_with_rewards_pass_on_a_local_model(tmp_path, capsys, path):
    recipe = yaml.safe_load(path.read_text())
    tiny_pipeline().save_pretrained(tmp_path / "sd3")
    (tmp_path / "prompts.txt").write_text('a sign that reads "open"\na boat\n')
    # The files of GenEval's own form are datasets as they are.
    (tmp_path / "geneval.jsonl").write_text("\n".join(map(json.dumps, geneval_prompts(2))))
    datasets = {
        task: str(tmp_path / ("geneval.jsonl" if task == "geneval" else "prompts.txt")) for task in recipe["datasets"]
    }
    save_diffusers_lora(tmp_path / "before", *random_lora(rank=32, alpha=64))
    arguments = {
        "model_name_or_path": tmp_path / "sd3",
        "datasets": json.dumps(datasets),
        "eval_datasets": json.dumps(datasets),
        "height": 16,
        "width": 16,
        "fp16": False,  # needs a GPU
        "adapter": tmp_path / "before",
        "output_dir": tmp_path / "out",
    }
    argv = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    main(argv=["--config", str(path), "--dry_run", *argv], method=method_of(path))
    out = capsys.readouterr().out
    tasks = recipe.get("tasks", list(datasets))
    rewards = {"aesthetic": "pickscore + clipscore + hpsv2", "ocr": "ocr", "geneval": "geneval"}
    for task in tasks:
        assert re.search(f"  {task} .*; reward: {re.escape(rewards[task])}\n", out), out
    assert out.count("reward: ") == len(tasks) and "without the models of the rewards" in out
    assert "LoRA of rank 32" in out and "starts from" in out and "10 steps of" in out and "9 of them trained" in out
    processes = int(re.search(r"here x (\d+) GPUs", path.read_text())[1])
    images = int(re.search(r"images     ([\d,]+) in a rollout, 24 of a prompt", out)[1].replace(",", ""))
    assert images * processes == 48 * 24


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(argv=["--help"])
    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    for name in ("--teachers", "--dry_run", "--noise_level", "--ema_decay", "--task_weights", "--lora_r"):
        assert name in out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path):
    method = METHODS[method_of(path)]
    script_args, config, recipe = parse_recipe(
        ["--config", str(path), "--fp16", "False"], (method.arguments, method.config)
    )
    sources = script_args.teachers if method is METHODS["opd"] else script_args.reward_funcs
    assert recipe == path and set(sources) == set(script_args.datasets) == set(script_args.eval_datasets)
    assert config.num_inference_steps in (10, None)
