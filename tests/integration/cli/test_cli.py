# SPDX-License-Identifier: Apache-2.0
"""The command line: complete help, one line and exit code 2 for bad input, and each command on real files."""

import dataclasses
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file

from tests.support.cards import example_record
from tests.support.hub_server import run
from tests.support.tiny import random_lora, save_diffusers_lora, tiny_transformer
from trl_diffusion_opd import DiffusionOPDConfig, cli
from trl_diffusion_opd.cli.commands import COMMANDS, TRAININGS
from trl_diffusion_opd.cli.train import METHODS
from trl_diffusion_opd.hub.locations import Origin
from trl_diffusion_opd.lora.convert import convert_lora
from trl_diffusion_opd.publishing.push import push_folder
from trl_diffusion_opd.publishing.record import RunRecord
from trl_diffusion_opd.publishing.space import deploy_space, run_space
from trl_diffusion_opd.rewards.lookup import load_function


ROOT = Path(__file__).parents[3]
SHAPES = str(ROOT / "examples" / "configs" / "shapes.yaml")
LORA = "pytorch_lora_weights.safetensors"
RESULTS = example_record().results


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """What a command sets for its process is taken back."""
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        monkeypatch.setenv(name, "error")


@pytest.fixture
def finished(tmp_path):
    """The folder of a finished run, which was going to push to `me/student`."""
    folder = save_diffusers_lora(tmp_path / "student", *random_lora())
    example_record(results={}).save(folder)
    return folder


def ended(capsys, *argv):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([str(part) for part in argv])
    return exit_info.value.code, *capsys.readouterr()


HELP = """
import sys
from trl_diffusion_opd.cli.commands import COMMANDS
from trl_diffusion_opd.cli.main import main
for argv in (["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)):
    try:
        main(argv)
    except SystemExit as error:
        assert not error.code, argv
heavy = {"torch", "transformers", "diffusers", "peft", "trl", "huggingface_hub", "numpy", "gradio"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""


def test_help_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: trl-diffusion-opd") == 1 + len(COMMANDS) and "trl-diffusion-opd 0." in done.stdout


@pytest.mark.parametrize("name", METHODS)
def test_help_of_a_training_lists_every_setting(capsys, name):
    code, out, _ = ended(capsys, name, "--help")
    assert code == 0 and out.startswith(f"usage: trl-diffusion-opd {name} --config RECIPE")
    kinds = (METHODS[name].arguments, METHODS[name].config)
    fields = [field.name for kind in kinds for field in dataclasses.fields(kind)]
    described = {line.split()[0].rstrip(",") for line in out.splitlines() if line.startswith("  --")}
    assert described == {f"--{name}" for name in (*fields, "config")} | {name for name in described if "--no_" in name}
    text = " ".join(out.split())
    assert all(f"--{name}" in text for name in ("accelerate_config", *cli.launch.LAUNCH_OPTIONS))
    assert not set(cli.launch.LAUNCH_OPTIONS) & set(fields)


@pytest.mark.parametrize(
    ("command", "functions", "left_out"),
    [
        ("push", [push_folder], {"token", "evaluation"}),  # which is --eval
        ("convert", [convert_lora], set()),
        ("space", [deploy_space, run_space], {"token", "prompts", "kwargs"}),
    ],
)
def test_help_lists_every_argument_of_the_functions(capsys, command, functions, left_out):
    code, out, _ = ended(capsys, command, "--help")
    names = {name for function in functions for name in inspect.signature(function).parameters} - left_out
    missing = [name for name in names if f"--{name} " not in out and f"\n  {name.upper()} " not in out]
    assert code == 0 and not missing
    assert command == "convert" or "HF_TOKEN" in out and "--token" not in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "the following arguments are required: COMMAND. See `trl-diffusion-opd --help`"),
        ("pull", "invalid choice: 'pull' (choose from 'opd', 'train', 'grpo', 'nft', 'push', 'card',"),
        ("push", "the following arguments are required: FOLDER. See `trl-diffusion-opd push --help`"),
        ("push nowhere", "There is no folder 'nowhere'. Pass the `output_dir` of a run"),
        ("push . --branch x", "unrecognized arguments: --branch x"),
        ("push .", "there is no 'pytorch_lora_weights.safetensors' in '.'"),
        ("push lora --repo_id me/x", "There is no 'run.json' in 'lora'. Pass the `output_dir` of a run"),
        ("push homeless", "Nothing in 'homeless' says where to push. Pass `--repo_id owner/name`"),
        ("push lora --token hf_secret", "`--token` is no option. The token is the one of `hf auth login`"),
        ("push lora --token=hf_secret", "`--token` is no option. The token is the one of `hf auth login`"),
        ("card lora", "There is no 'run.json' in 'lora'"),
        ("card homeless", "'homeless/results.json' holds no results: Expecting value"),
        ("card listed", "'listed/results.json' holds no results: list indices must be integers"),
        ("card mixed", "'mixed/results.json' is not of this run, whose rewards are not of ['ocr']. Remove it"),
        ("convert lora", "the following arguments are required: DESTINATION"),
        (
            "convert lora out --to onnx",
            "argument --to: invalid choice: 'onnx' (choose from 'diffusers', 'peft', 'comfyui')",
        ),
        ("convert nowhere out", "'nowhere', which is neither (there is no such path on disk)"),
        ("convert lora homeless", "'homeless' is not empty. Choose another folder, or overwrite (`--overwrite`)"),
        ("space lora", "'lora' says what it is a LoRA for. Pass it as `base`"),
        ("space lora --private", "`--private` is for a Space on the Hub. Name it with `--repo_id owner/demo`"),
        ("space lora --include-weights", "`--include_weights` is for a Space on the Hub"),
        ("space lora --port 80 --repo_id me/x", "`--port` is for the app on this machine"),
        ("space lora --teachers ocr", "`--teachers` takes TASK=SOURCE, but got 'ocr'"),
        ("space lora --port http", "argument --port: invalid int value: 'http'"),
        ("train", "`model_name_or_path` is not set. Name it in a recipe (`--config recipe.yaml`)"),
        ("train --config", "`--config` takes one recipe. Give it once, with its path"),
        ("train --config a --config=b", "`--config` takes one recipe"),
        ("train --config=nowhere.yaml", "There is no recipe 'nowhere.yaml'. Check the path after `--config`"),
        ("train --config broken.yaml", 'broken.yaml is no YAML: while parsing a flow sequence in "broken.yaml"'),
        ("train --config RECIPE --lr 3", "Unknown options --lr. `trl-diffusion-opd train --help` lists all"),
        ("train --config unknown.yaml", "unknown.yaml: unknown settings --num_processes. `trl-diffusion-opd train"),
        ("train --config RECIPE --max_steps many", "--max_steps/--max-steps: invalid int value: 'many'"),
        ("grpo", "`model_name_or_path` is not set. Name it in a recipe"),
        ("nft --num_generations 2 --config RECIPE", "shapes.yaml: unknown settings --teachers."),
        ("grpo --config=nowhere.yaml", "There is no recipe 'nowhere.yaml'"),
        ("rewards orc", "There is no reward 'orc'. Did you mean 'ocr'?"),
        ("rewards --device", "argument --device: expected one argument. See `trl-diffusion-opd rewards --help`"),
        ("train --num_processes two", "--num_processes/--num-processes: invalid int value: 'two'"),
        ("train --accelerate_config two.yaml", "There is no file 'two.yaml'. Check the path of accelerate's"),
    ],
)
def test_bad_input_ends_with_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    save_diffusers_lora("lora", *random_lora())
    save_diffusers_lora("homeless", *random_lora())
    RunRecord("student", "A student.", Origin("base")).save("homeless")
    Path("homeless/results.json").write_text("nothing")
    for name, results in (("listed", [1]), ("mixed", {"student": {"ocr": 0.5}})):
        Path(name).mkdir()
        RunRecord("student", "A student.", Origin("base")).save(name)
        Path(name, "results.json").write_text(json.dumps(results))
    Path("broken.yaml").write_text("a: [b\n")
    Path("unknown.yaml").write_text("model_name_or_path: x\nteachers: {a: x}\ndatasets: {a: x}\nnum_processes: 2\n")
    code, out, error = ended(capsys, *argv.replace("RECIPE", SHAPES).split())
    lines = [line for line in error.splitlines() if "Loading" not in line]
    assert (code, out, len(lines)) == (2, "", 1), error
    assert lines[0].startswith("error: ") and message in lines[0], lines[0]
    assert "hf_secret" not in error


def test_bugs_keep_their_traceback(monkeypatch):
    monkeypatch.setitem(
        cli.commands.COMMANDS,
        "card",
        dataclasses.replace(cli.commands.COMMANDS["card"], run=lambda folder: folder + 1),
    )
    with pytest.raises(TypeError):
        cli.main(["card", "x"])


def test_train_is_the_code_of_the_example(capsys, tmp_path, monkeypatch):
    argv = ["--dry_run", "--output_dir", str(tmp_path / "out"), "--max-steps", "7"]
    monkeypatch.setattr(sys, "argv", ["train_opd.py", *argv])
    runpy.run_path(str(ROOT / "examples" / "train_opd.py"), run_name="__main__")
    expected = capsys.readouterr().out
    cli.main(["train", "--config", SHAPES, *argv])
    assert capsys.readouterr().out == expected
    assert "rounds     7 of 24 images on 1 process(es)" in expected


def test_every_method_has_its_command_and_its_example(capsys, monkeypatch):
    assert list(TRAININGS) == list(METHODS) and not TRAININGS.keys() & COMMANDS.keys()
    for name, script in (("grpo", "train_grpo.py"), ("nft", "train_nft.py")):
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
        of_example = capsys.readouterr().out
        _, of_command, _ = ended(capsys, name, "--help")
        assert of_example == of_command.replace(f"trl-diffusion-opd {name}", script)
        assert METHODS[name].description in of_example


def test_rewards_are_listed(capsys):
    cli.main(["rewards", "ocr", "pickscore"])
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["ocr", "pickscore"]


@pytest.mark.slow
def test_train_starts_processes_with_accelerate(tmp_path):
    accelerate_config = ROOT / "examples" / "accelerate_configs" / "cpu_2.yaml"
    command = [sys.executable, "-m", "trl_diffusion_opd", "train", "--config", SHAPES, "--dry_run"]
    command += ["--accelerate-config", str(accelerate_config), "--main_process_port", "0", "--use_cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rounds     100 of 48 images on 2 process(es)") == 1, done.stdout


def test_processes_that_would_not_find_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but on a CPU .* only with `use_cpu`"):
        DiffusionOPDConfig(output_dir=str(tmp_path))


def test_launching_inside_a_launch_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")
    code, _, error = ended(capsys, "train", "--num_processes", "2")
    assert code == 2 and "num_processes belong to `accelerate launch` itself" in error


def test_what_is_wrong_in_another_process_only_is_said_once_the_first_would_have(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli.parser, "SECONDS_TO_END_ALL", 0.2)
    start = time.monotonic()
    code, _, error = ended(capsys, "train")
    assert code == 2 and error.startswith("error (process 1): ") and time.monotonic() - start > 0.2


def test_several_processes_say_what_is_wrong_once(tmp_path):
    (tmp_path / "bad.yaml").write_text("output_dir: out\nlearning_rates: 1\n")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--main_process_port", "0"]
    command += ["--config_file", ROOT / "examples" / "accelerate_configs" / "cpu_2.yaml", "-m", "trl_diffusion_opd"]
    command += ["train", "--config", tmp_path / "bad.yaml"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and len(re.findall("^error", done.stderr, re.M)) == 1, done.stderr


def test_a_reward_in_a_file_of_a_package_may_import_its_neighbors(tmp_path):
    package = tmp_path / "outer" / "inner"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "seven.py").write_text("SEVEN = 7\n")
    (package / "scores.py").write_text("from .seven import SEVEN\ndef score():\n    return SEVEN\n")
    assert load_function(f"{package}/scores.py:score")() == 7


def test_convert(capsys, tmp_path):
    config, state_dict = random_lora()
    save_diffusers_lora(tmp_path / "source", config, state_dict)
    (tmp_path / "source" / LORA).rename(tmp_path / "source" / "other.safetensors")
    cli.main(["convert", str(tmp_path / "source"), str(tmp_path / "to"), "--weight-name", "other.safetensors"])
    assert capsys.readouterr().out == f"{tmp_path / 'to' / 'adapter_model.safetensors'}\n"
    assert PeftModel.from_pretrained(tiny_transformer(), tmp_path / "to").peft_config["default"].lora_alpha == 8
    cli.main(["convert", str(tmp_path / "to"), str(tmp_path / "source"), "--to=diffusers", "--overwrite"])
    assert load_file(tmp_path / "source" / LORA).keys() == {f"transformer.{name}" for name in state_dict}


def test_card(capsys, finished):
    cli.main(["card", str(finished)])
    card = finished / "README.md"
    assert capsys.readouterr().out == f"{card}\n"
    before = card.read_text()
    assert "base_model: them/base" in before and "me/student" in before and "0.700" not in before

    (finished / "results.json").write_text(json.dumps(RESULTS))
    record = (finished / "run.json").read_bytes()
    cli.main(["card", str(finished), "--print", "--repo_id", "you/better"])
    printed = capsys.readouterr().out
    assert "you/better" in printed and "0.700" in printed and "me/student" not in printed
    assert (card.read_text(), (finished / "run.json").read_bytes()) == (before, record)

    cli.main(["card", str(finished), "--repo_id", "you/better"])
    assert card.read_text() + "\n" == printed
    loaded = RunRecord.load(finished)
    assert (loaded.repo_id, loaded.name, loaded.results) == ("you/better", "better", RESULTS)


HUB = """
import json, sys
from trl_diffusion_opd.cli.main import main

for argv in json.loads(sys.argv[1]):
    try:
        main(argv)
    except SystemExit as error:
        print("exit", error.code, flush=True)
"""


def test_commands_on_the_hub(hub, finished, tmp_path):
    hub.add_user("me", token="hf_write")
    hub.put("me/teacher", {"v1/" + LORA: finished / LORA})
    hub.repo("me/theirs").refs["pr/1"] = hub.put("me/theirs", {"README.md": b"# theirs"})
    hub.put("them/base", {"model_index.json": b'{"_class_name": "StableDiffusion3Pipeline"}'})
    elsewhere = ["--repo_id", "me/other", "--private", "--revision", "try", "--commit_message", "Second try"]
    argvs = [
        ["push", str(finished)],
        ["push", str(finished), *elsewhere],
        ["push", str(finished), "--repo_id", "you/other"],
        ["convert", "me/teacher/v1@main", str(tmp_path / "peft")],
        ["convert", "me/teacher", str(tmp_path / "nothing")],
        ["space", "me/student", "--repo_id", "me/demo", "--private", "--title", "Draw!", "--teachers"],
        ["push", str(finished), "--repo_id", "me/theirs", "--revision", "refs/pr/1"],
    ]
    done = run(HUB, hub.environment(tmp_path / "home", token="hf_write"), json.dumps(argvs), patient=False)
    lines = done.stdout.splitlines()
    assert lines == [
        f"{hub.endpoint}/me/student/commit/{hub.commits('me/student')[0][0]}",
        f"{hub.endpoint}/me/other/commit/{hub.commits('me/other', revision='try')[0][0]}",
        "exit 2",
        str(tmp_path / "peft" / "adapter_model.safetensors"),
        "exit 2",
        f"{hub.endpoint}/spaces/me/demo",
        f"{hub.endpoint}/me/theirs/commit/{hub.commits('me/theirs', revision='refs/pr/1')[0][0]}",
    ], done.stderr
    assert LORA in hub.files("me/theirs", revision="refs/pr/1") and LORA not in hub.files("me/theirs")
    assert not any(ref.startswith("heads/refs") for ref in hub.repo("me/theirs").refs)
    assert hub.files("me/student")[LORA] == (finished / LORA).read_bytes()
    assert hub.repo("me/other").private and not hub.repo("me/student").private
    assert hub.commits("me/other", revision="try")[0][1] == "Second try"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and "'you/other'" in errors[0] and "'v1'" in errors[1], done.stderr
    assert load_file(tmp_path / "peft" / "adapter_model.safetensors").keys() == {
        name.replace("transformer.", "base_model.model.", 1) for name in load_file(finished / LORA)
    }
    assert not (tmp_path / "nothing").exists()
    assert hub.repo("me/demo", "space").private
    assert json.loads(hub.files("me/demo", "space")["demo.json"])["title"] == "Draw!"
