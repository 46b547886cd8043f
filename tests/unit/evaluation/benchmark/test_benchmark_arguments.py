# SPDX-License-Identifier: Apache-2.0
"""The arguments of an evaluation: options, recipes and Python say the same, and bad values are told."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from tests.support.benchmark_world import GUIDANCE, LENGTH, STEPS, World
from tests.support.hub_server import ROOT
from trl_diffusion_opd import cli
from trl_diffusion_opd.cli.recipe import parse_recipe
from trl_diffusion_opd.evaluation.benchmark.arguments import EvaluationArguments


RECIPE = """
model: base
loras: {student: loras/student, other: loras/other}
merge: sum
benchmarks: [mine.yaml, ocr]
prompts: {ocr: words.txt}
rewards: {ocr: rewards.py:brightness}
guidance_scale: {null: 2, base: [1, 3]}
reward_options: {ocr: {batch_size: 3}}
num_images: 2
base: false
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "loras" / "student").mkdir(parents=True)
    for name in ("base", "ocr"):
        (tmp_path / name).mkdir()
    for name in ("words.txt", "rewards.py", "mine.yaml"):
        (tmp_path / name).touch()
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return file


def parsed(*words):
    arguments, file = parse_recipe([str(word) for word in words], (EvaluationArguments,))
    return arguments.located(file)


def test_words_mappings_and_recipes_are_the_same(recipe):
    here = recipe.parent
    words = ["--model", here / "base", "--lora", f"student={here}/loras/student", "other=loras/other", "--no-base"]
    words += ["--merge", "sum", "--benchmarks", here / "mine.yaml", "ocr", "--prompts", f"ocr={here}/words.txt"]
    words += ["--rewards", f"ocr={here}/rewards.py:brightness", "--guidance-scale", 2, "base=1", "base=3"]
    words += ["--reward_options", "ocr.batch_size=3", "--num_images", 2]
    from_python = EvaluationArguments(
        model=here / "base",
        loras={"student": here / "loras" / "student", "other": "loras/other"},
        base=False,
        merge=["sum"],
        benchmarks=[f"{here}/mine.yaml", "ocr"],
        prompts={"ocr": f"{here}/words.txt"},
        rewards={"ocr": [f"{here}/rewards.py:brightness"]},
        reward_options={"ocr": {"batch_size": 3}},
        num_images=2,
        guidance_scale={None: [2.0], "base": [1.0, 3.0]},
    )
    # Of the recipe, what is there is located beside it; `ocr` is a name, although a folder there is called so.
    assert asdict(parsed(*words)) == asdict(from_python) == asdict(parsed("--config", recipe))
    assert asdict(from_python.located(None)) == asdict(from_python)
    default = parsed("--model", "x")
    assert default.benchmarks == ["geneval", "ocr", "drawbench"] and default.guidance_scale == {}
    assert asdict(default) == asdict(EvaluationArguments("x")) and default.base and default.loras == {}


def test_options_win_over_the_recipe(recipe):
    changed = parsed("--config", recipe, "--benchmarks", "a", "--benchmarks", "b", "--lora", "x=y", "--num_images", 3)
    assert changed.benchmarks == ["a", "b"] and changed.loras == {"x": "y"} and changed.num_images == 3
    assert changed.guidance_scale == {None: [2.0], "base": [1.0, 3.0]} and changed.merge == ["sum"]
    assert parsed("--config", recipe, "--guidance_scale", 1, "--base").guidance_scale == {None: [1.0]}
    assert parsed("--config", recipe, "--base").base is True


def test_a_recipe_from_start_to_end(tmp_path):
    world = World(tmp_path)
    settings = {
        "model": "base",
        "loras": {"student": "student"},
        "benchmarks": "words",
        "prompts": {"words": "prompts.txt"},
        "rewards": "rewards.py:brightness",
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "max_sequence_length": LENGTH,
        "use_cpu": True,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    cli.main(["eval", "--config", str(tmp_path / "recipe.yaml"), "--output-dir", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["results"]
    assert [(row["model"], row["num_scored"]) for row in rows] == [("base", 5), ("student", 5)]
    assert world.calls == [5, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 2.5}, "`num_images` must be a whole number, but is 2.5"),
        ({"batch_size": True}, "`batch_size` must be a whole number, but is True"),
        ({"seed": None}, "`seed` must be a whole number, but is None"),
        ({"resolution": -8}, "`resolution` must be at least 1, but is -8"),
        ({"max_sequence_length": 0}, "`max_sequence_length` must be at least 1, but is 0"),
        ({"dtype": "float8"}, "`dtype` must be float32, bfloat16 or float16, but is 'float8'"),
        ({"use_cpu": "yes"}, "`use_cpu` must be true or false, but is 'yes'"),
        ({"model": 3}, "`model` must be text, but is 3"),
        ({"output_dir": ""}, "`output_dir` must be text, but is ''"),
        ({"loras": 3}, "`--lora` takes text, but got 3"),
        ({"loras": {"a": None}}, "`--lora` must map names to text, but has None under 'a'"),
        ({"prompts": {3: "a"}}, "`--prompts` must map names to text, but has 'a' under 3"),
        ({"benchmarks": ["ocr", 5]}, "`--benchmarks` takes text, but got 5"),
        ({"rewards": {"ocr": [None]}}, "`--rewards` takes text, but got None"),
        ({"reward_options": {"ocr": 3}}, "`reward_options` of 'ocr' must be a mapping"),
        ({"guidance_scale": {"base": [None]}}, "`--guidance_scale {'base': [None]}` must be finite numbers"),
        ({"guidance_scale": ["base=inf", "2"]}, "`--guidance_scale base=inf 2` must be finite numbers"),
        ({"guidance_scale": float("nan")}, "`--guidance_scale nan` must be finite numbers"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(ValueError) as error:
        EvaluationArguments(**{"model": "x", **changes})
    assert message in str(error.value)


def test_a_word_is_not_a_list_of_letters():
    arguments = EvaluationArguments("x", benchmarks="ocr", merge="sum", rewards="ocr", loras="folder/a")
    assert (arguments.benchmarks, arguments.merge, arguments.rewards) == (["ocr"], ["sum"], {None: ["ocr"]})
    assert arguments.loras == {"a": "folder/a"}
    for scale in (2.5, "2.5", [2.5], {None: "2.5"}, {None: (2.5,)}):
        assert EvaluationArguments("x", guidance_scale=scale).guidance_scale == {None: [2.5]}


def test_unknown_settings(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("model: x\nlearning_rate: 3\n")
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["eval", "--config", str(tmp_path / "recipe.yaml")])
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and "unknown settings --learning_rate. `trl-diffusion-opd eval --help`" in error


HELP = """
import sys
from trl_diffusion_opd.cli.main import main
try:
    main(["eval", "--help"])
except SystemExit as error:
    assert not error.code
heavy = {"torch", "diffusers", "peft", "datasets", "accelerate", "numpy"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_help_loads_no_model_code():
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: trl-diffusion-opd eval --model BASE [--config RECIPE]")
