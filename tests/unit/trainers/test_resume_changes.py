# SPDX-License-Identifier: Apache-2.0
"""What may change when a run is resumed, and what may not unless it is asked for; what is checked before the base is loaded."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from tests.support import rl_runs
from tests.support.runs import PROMPTS, SAVING_RUN, make_config, make_trainer, small_lora, student_state
from tests.support.tiny import tiny_pipeline
from trl_diffusion_opd.trainers.trajectory import describe_trajectory


SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The folder of a run that was killed after two of six steps."""
    folder = tmp_path_factory.mktemp("saved")
    torch.set_num_threads(1)
    make_trainer(folder, **SAVED).train()
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


def resume(folder: Path, **settings):
    trainer = make_trainer(folder, **{**SAVED, "max_steps": 3, **settings})
    trainer.train(resume_from_checkpoint=True)
    return trainer


OTHER_PROMPTS = {**PROMPTS, "scene": ["a boat at night", "a house at noon", "a tree at dusk"]}


@pytest.mark.parametrize(
    ("change", "message", "name"),
    [
        ({"seed": 7}, r"seed 42 \(now 7\)", "seed"),
        ({"solver": "dance"}, r"solver 'flow' \(now 'dance'\)", "solver"),
        ({"noise_level": 0.5}, r"noise_level 0.0 \(now 0.5\)", "noise_level"),
        ({"num_inference_steps": 5}, r"num_inference_steps 4 \(now 5\)", "num_inference_steps"),
        ({"guidance_scale": 3.0}, r"guidance_scale 2.0 \(now 3.0\)", None),
        ({"skip_last_steps": 0}, r"skip_last_steps 1 \(now 0\)", "skip_last_steps"),
        ({"per_device_train_batch_size": 1}, r"images_per_round 2 \(now 1\)", "images_per_round"),
        ({"data": OTHER_PROMPTS}, "other prompts of scene", "prompts"),
        ({"optim": "sgd"}, r"optim 'adamw_torch_fused' \(now 'sgd'\)", None),
    ],
)
def test_what_defines_the_course_of_a_run_must_be_asked_for(folder, change, message, name):
    """Refused before the base, which is nowhere, is looked for."""
    with pytest.raises(
        ValueError, match=rf"checkpoint-2' was saved with {message}\. .*name in `allow_changes`"
    ) as error:
        make_trainer(folder, pipeline=tiny_pipeline(), resume_from_checkpoint="true", **{**SAVED, **change})
    assert "\n" not in str(error.value)
    if name is not None:
        trainer = resume(folder, allow_changes=[name], **change)
        assert trainer.state.global_step == 3


def test_a_finished_run_refuses_what_would_change_nothing(folder):
    with pytest.raises(ValueError, match=r"is at its end, .*: learning_rate 0\.01 -> 0\.5\. .*larger `max_steps`"):
        make_trainer(folder, **SAVED, learning_rate=0.5).train(resume_from_checkpoint=True)
    trainer = make_trainer(folder, **SAVED, reward_timeout=7.0, num_eval_images=3, eval_noise_level=0.7)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


def test_a_setting_that_stands_for_the_same_is_no_change(folder):
    assert resume(folder, skip_last_steps=1).state.global_step == 3


def test_it_is_refused_in_train_too(folder):
    with pytest.raises(ValueError, match=r"was saved with seed 42 \(now 7\), solver 'flow' \(now 'ddim'\)\."):
        resume(folder, seed=7, solver="ddim")
    with pytest.raises(ValueError, match=r"was saved with solver 'flow' \(now 'ddim'\)\."):
        resume(folder, seed=7, solver="ddim", allow_changes=["seed"])


def test_the_split_of_a_round_may_change(folder, saved, caplog):
    """The samples of a round are the same, so two processes resume what one saved."""
    with caplog.at_level(logging.WARNING):
        trainer = resume(folder, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    assert "gradient_accumulation_steps 1 -> 2" in caplog.text
    assert trainer.state.global_step == 3

    class TwoProcesses(type(trainer.args)):
        world_size = 2

    def images(config) -> int:
        return describe_trajectory(trainer.datasets, config)["images_per_round"]

    trainer.args.__class__ = TwoProcesses
    assert images(trainer.args) == 2 * images(
        make_config(folder, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    )


def test_what_may_change_is_told_in_one_line_and_has_an_effect(folder, caplog):
    same = student_state(resume(shutil.copytree(folder, folder.with_name("same"))))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer = resume(folder, learning_rate=0.001, logging_steps=2, weight_decay=0.5)
    [line] = [record.getMessage() for record in caplog.records if "with other settings" in record.getMessage()]
    for change in (
        "learning_rate 0.01 -> 0.001",
        "logging_steps 1 -> 2",
        "max_steps 2 -> 3",
        "weight_decay 0.0001 -> 0.5",
    ):
        assert change in line
    assert line.count("->") == 4 and "\n" not in line
    for group in trainer.optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.001) and group["initial_lr"] == 0.001
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} >= {0.5}
    before = make_trainer(folder, **SAVED)
    before._load_student(folder / "out" / "checkpoint-2")
    start, moved = student_state(before), student_state(trainer)
    steps = [max((state[name] - start[name]).abs().max() for name in start) for state in (same, moved)]
    assert steps[1] < 0.2 * steps[0], "a tenth of the learning rate"


def test_the_settings_of_a_method_are_among_them(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    rl_runs.make_trainer("nft", tmp_path, **settings).train()
    with pytest.raises(ValueError, match=r"was saved with nft_beta 1.0 \(now 0.5\)\."):
        rl_runs.make_trainer("nft", tmp_path, nft_beta=0.5, resume_from_checkpoint="true", **settings)


@pytest.mark.parametrize("value", [["sede"], "seed", ["max_steps"]])
def test_allow_changes_must_name_what_is_checked(tmp_path, value):
    with pytest.raises(
        ValueError, match=r"`allow_changes` must be a list of names out of seed, .*prompts, but holds .*"
    ):
        make_config(tmp_path, allow_changes=value)


def damage(folder: Path, file: str, content: bytes | None) -> None:
    path = folder / "out" / "checkpoint-2" / file
    path.unlink() if content is None else path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("optimizer.pt", None, "There is no checkpoint in .*: it has no 'optimizer.pt'"),
        ("trainer_state.json", None, "it has no 'trainer_state.json'"),
        (
            "optimizer.pt",
            b"PK\x03\x04 cut",
            "is damaged: its 'optimizer.pt' cannot be read. Resume from an earlier one",
        ),
        ("trainer_state.json", b"{", "is damaged: its 'trainer_state.json' cannot be read"),
        ("trainer_state.json", b"{}", "is damaged: its 'trainer_state.json' cannot be read"),
        ("provenance.json", b"[]", "is damaged: its 'provenance.json' cannot be read"),
        ("pytorch_lora_weights.safetensors", b"\0" * 100, "checkpoint .*checkpoint-2'"),
    ],
)
def test_a_damaged_checkpoint_is_refused_before_the_base_is_loaded(folder, monkeypatch, file, content, message):
    damage(folder, file, content)
    monkeypatch.setattr("trl_diffusion_opd.trainers.base_trainer.load_pipeline", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        make_trainer(folder, resume_from_checkpoint="true", **SAVED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_config": small_lora(r=2)}, "saved with another LoRA config: r 4 instead of 2"),
        ({"ema_decay": 0.9}, "saved without a moving average, but `ema_decay` is 0.9"),
        ({"resume_from_checkpoint": "nowhere/checkpoint-1"}, "There is no checkpoint in 'nowhere/checkpoint-1'"),
    ],
)
def test_another_student_is_refused_before_the_base_is_loaded(folder, monkeypatch, change, message):
    monkeypatch.setattr("trl_diffusion_opd.trainers.base_trainer.load_pipeline", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        make_trainer(folder, **{"resume_from_checkpoint": "true", **SAVED, **change})


def test_resuming_where_nothing_was_saved_yet_starts_anew(tmp_path, caplog):
    trainer = make_trainer(tmp_path, resume_from_checkpoint="true", **SAVING_RUN)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint="true")
    assert trainer.state.global_step == 6
    assert "There is no checkpoint of this run in" in caplog.text and "it starts anew" in caplog.text


def test_a_checkpoint_tells_what_defines_the_run(folder):
    provenance = json.loads((folder / "out" / "checkpoint-2" / "provenance.json").read_text())
    trajectory = provenance["trajectory"]
    assert trajectory["seed"] == 42 and trajectory["solver"] == "flow" and trajectory["images_per_round"] == 2
    assert {len(digest) for digest in trajectory["prompts"].values()} == {64}
    assert "learning_rate" not in trajectory and "max_steps" not in trajectory
