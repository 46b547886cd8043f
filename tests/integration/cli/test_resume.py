# SPDX-License-Identifier: Apache-2.0
"""Resuming on the command line: refusals are one line with exit code 2, and a restart with the same flags does what is left."""

import json
from pathlib import Path

import pytest

from tests.support.runs import PROMPTS, make_teachers
from tests.support.tiny import random_lora, save_diffusers_lora, tiny_pipeline
from trl_diffusion_opd.cli.train import main
from trl_diffusion_opd.trainers import opd_trainer


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("resume")
    tiny_pipeline().save_pretrained(folder / "base")
    make_teachers(folder)
    save_diffusers_lora(folder / "other", *random_lora(seed=9))
    for task, prompts in PROMPTS.items():
        (folder / f"{task}.txt").write_text("\n".join(prompts))
    settings = {
        "model_name_or_path": str(folder / "base"),
        "teachers": json.dumps({"count": str(folder / "count"), "scene": str(folder / "scene")}),
        "datasets": json.dumps({task: str(folder / f"{task}.txt") for task in PROMPTS}),
        "lora_r": 4,
        "lora_target_modules": "attn.to_q",
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "per_device_train_batch_size": 1,
        "num_inference_steps": 3,
        "num_grid_prompts": 0,
        "max_sequence_length": 16,
        "report_to": "none",
        "disable_tqdm": "true",
        "use_cpu": "true",
        "resume_from_checkpoint": "true",
        "output_dir": str(folder / "out"),
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def changed(arguments: list[str], name: str, value: str) -> list[str]:
    if name not in arguments:
        return [*arguments, name, value]
    at = arguments.index(name) + 1
    return [*arguments[:at], value, *arguments[at + 1 :]]


def test_a_restart_with_the_same_flags_starts_then_finishes_then_refuses(arguments, capsys, caplog, monkeypatch):
    out = Path(arguments[-1])
    main(arguments)
    assert "it starts anew" in caplog.text and (out / "checkpoint-2").is_dir()
    lora = (out / "pytorch_lora_weights.safetensors").read_bytes()
    (out / "pytorch_lora_weights.safetensors").unlink()
    (out / "README.md").unlink()
    monkeypatch.setattr(opd_trainer.DiffusionOPDTrainer, "training_step", lambda *a: pytest.fail("trained"))
    main(arguments)
    assert (out / "README.md").is_file() and not (out / "checkpoint-3").exists()
    assert len((out / "pytorch_lora_weights.safetensors").read_bytes()) == len(lora)

    other = str(out.parent / "other")
    refusals = {
        "--seed": ("7", r"was saved with seed 42 (now 7)"),
        "--lora_r": ("2", "saved with another LoRA config: r 4 instead of 2"),
        "--resume_from_checkpoint": ("nowhere/checkpoint-1", "There is no checkpoint in 'nowhere/checkpoint-1'"),
        "--teachers": (json.dumps({"count": other, "scene": other}), "belongs to a run with other teachers"),
    }
    for name, (value, message) in refusals.items():
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main(changed(arguments, name, value))
        errors = capsys.readouterr().err
        assert exit.value.code == 2, errors
        assert message in errors and "Traceback" not in errors
