# SPDX-License-Identifier: Apache-2.0
"""Recipes of strangers: tags, aliases without end, variables of the process."""

import os

import pytest
import yaml

from tests.support.recipes import write_recipe
from trl_diffusion_opd import DiffusionOPDConfig
from trl_diffusion_opd.cli.recipe import OPDScriptArguments, parse_recipe
from trl_diffusion_opd.cli.recipe_file import check_recipe
from trl_diffusion_opd.cli.train import main


LAUGHS = "l0: &l0 [ha]\n" + "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 12))


def refused(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as info:
        parse_recipe(["--config", str(path)], (OPDScriptArguments, DiffusionOPDConfig))
    return " ".join(str(info.value).replace(str(path), "recipe.yaml").split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: 1\nb: !!python/object/apply:os.system ['touch ran']\n",
            "recipe.yaml, line 2: the tag 'tag:yaml.org,2002:py",
        ),
        ("a: !mine 3\n", "recipe.yaml, line 1: the tag '!mine' is not allowed in a recipe. Write plain values."),
        (LAUGHS, "there are more than 100000 values, as aliases repeat them. Write them out."),
        ("a: &a\n  b: *a\n", "there are more than 100000 values, as aliases repeat them"),
        ("a: " + "[" * 2000 + "]" * 2000, "recipe.yaml: values are nested too deeply. Write them flat."),
        ("{a: 1}: 2\n", "line 1: a key must be a word, not a list or a mapping. Write `name: value`."),
        ("- a\n", "recipe.yaml must have settings, as in `max_steps: 100`, but has none."),
        ("", "recipe.yaml must have settings"),
        ("a: 2020-13-45\n", "month must be in 1..12"),
        ("env: {LD_PRELOAD: evil.so}\n", "recipe.yaml: a recipe may not set `env`, the variables of the process. Set"),
        ("<<: {env: {LD_PRELOAD: evil.so}}\n", "a recipe may not set `env`"),
        ("datasets: 5\n", "`model_name_or_path` is not set"),
    ],
    ids=lambda text: text[:20],
)
def test_files_that_are_no_recipe_are_refused_at_once(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(tmp_path, text)
    assert "LD_PRELOAD" not in os.environ and not (tmp_path / "ran").exists()


def test_aliases_and_merges_are_kept(tmp_path):
    (tmp_path / "a.yaml").write_text("base: &base {path: x}\nother: {<<: *base, split: test}\n")
    check_recipe(tmp_path / "a.yaml")


NEEDED = {"model_name_or_path": "x", "teachers": {"ocr": "x"}, "datasets": {"ocr": "x"}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"datasets": 5}, "`datasets` must be a mapping, with a name for each task, but is 5."),
        ({"datasets": ["x"]}, "`datasets` must be a mapping, with a name for each task, but is ['x']."),
        ({"reward_funcs": 5}, "`reward_funcs` must be a mapping, with a name for each task, but is 5."),
        ({"teachers": 5}, "`teachers` must be a mapping, with a name for each task, but is 5."),
        ({"eval_datasets": 0}, "`eval_datasets` must be a mapping, with a name for each task, but is 0."),
        (
            {"datasets": {"ocr": None}},
            "`datasets` has nothing for task 'ocr'. Give it a value, or leave the task out.",
        ),
        ({"reward_funcs": {"ocr": None}}, "`reward_funcs` has nothing for task 'ocr'."),
        ({"teachers": {"ocr": None}}, "`teachers` has nothing for task 'ocr'."),
        ({"tasks": "geneval"}, "`tasks` names ['geneval'], but `datasets` has prompts for ['ocr']."),
        ({"lora_r": 2.5}, "`lora_r` must be a whole number, but is 2.5."),
        ({"lora_r": 0}, "`lora_r` must be at least 1, but is 0."),
        ({"dry_run": 5}, "`dry_run` must be true or false, but is 5."),
        ({"max_steps": 2.5}, "`max_steps` must be a whole number, but is 2.5."),
        ({"learning_rate": [1]}, "`learning_rate` must be a finite number, but is [1]."),
    ],
    ids=str,
)
def test_settings_of_the_wrong_kind_are_refused(tmp_path, settings, message):
    assert message in refused(tmp_path, yaml.safe_dump({**NEEDED, "output_dir": str(tmp_path / "out"), **settings}))


def parsed(tmp_path, **settings):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**NEEDED, "output_dir": str(tmp_path / "out"), **settings}))
    return parse_recipe(["--config", str(tmp_path / "recipe.yaml")], (OPDScriptArguments, DiffusionOPDConfig))


def test_one_word_is_a_list_of_one(tmp_path):
    script_args, args, _ = parsed(tmp_path, tasks="ocr", lora_target_modules="attn.to_q", use_cpu=True)
    assert (script_args.tasks, script_args.lora_target_modules) == (["ocr"], ["attn.to_q"])
    assert args.disable_tqdm is False, "the command line shows bars"


def test_a_reward_that_is_no_name_is_refused(tmp_path):
    script_args, _, recipe = parsed(tmp_path, reward_funcs={"ocr": 5}, use_cpu=True)
    with pytest.raises(ValueError, match="A reward is the name of a built-in one or of a function, .* but is 5."):
        script_args.trainer_arguments(recipe)


def test_prompts_may_stand_in_the_recipe(tmp_path, capsys):
    prompts = {"count": ["a red circle", "two squares"], "scene": [{"prompt": "a boat", "tag": 1}]}
    main(["--config", str(write_recipe(tmp_path / "a", datasets=prompts)), "--dry_run", "--disable_tqdm"])
    out = capsys.readouterr().out
    assert "count        2 prompts" in out and "scene        1 prompts" in out
