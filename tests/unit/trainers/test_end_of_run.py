# SPDX-License-Identifier: Apache-2.0
"""The end of a run is a state: a checkpoint of the last step is finished, never trained further, whatever killed the run."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.support import rl_runs
from tests.support.runs import PROMPTS, SAVING_RUN, make_trainer, student_state
from trl_diffusion_opd.cli.recipe import OPDScriptArguments, RLScriptArguments
from trl_diffusion_opd.cli.train import train as finish_run
from trl_diffusion_opd.trainers.rl_trainer import RLTrainer, UnscoredError


LORA = "pytorch_lora_weights.safetensors"


class CountSteps(TrainerCallback):
    """How many steps were trained."""

    def __init__(self):
        self.steps = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps += 1


def checkpoint_names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "out").glob("checkpoint-*")}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(tensor.equal(second[name]) for name, tensor in first.items())


def make_rl_trainer(method: str, folder: Path, **settings) -> RLTrainer:
    return rl_runs.make_trainer(
        method, folder, **{"save_strategy": "steps", "save_steps": 2, "max_steps": 3, **settings}
    )


def make(method: str, folder: Path, **settings):
    if method == "opd":
        return make_trainer(folder, **{**SAVING_RUN, "max_steps": 3, **settings})
    return make_rl_trainer(method, folder, **settings)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("opd", {"gradient_accumulation_steps": 2, "ema_decay": 0.9, "ema_update_every": 1}),
        ("opd", {"max_steps": -1, "num_train_epochs": 1.5}),
        ("grpo", {}),
        ("nft", {"old_policy_schedule": 1}),
        ("grpo", {"steps_per_rollout": 2, "num_generations": 8}),  # whose last checkpoint lies within a rollout
    ],
)
def test_a_finished_run_is_not_trained_further(tmp_path, method, settings):
    first = make(method, tmp_path, **settings)
    first.train()
    first.save_model()
    lora, names = load_file(tmp_path / "out" / LORA), checkpoint_names(tmp_path)
    (tmp_path / "out" / LORA).unlink()
    counter = CountSteps()
    again = make(method, tmp_path, callbacks=[counter], resume_from_checkpoint="true", **settings)
    output = again.train(resume_from_checkpoint=True)
    again.save_model()
    assert counter.steps == 0 and again.resumed_at_end
    assert again.state.global_step == output.global_step == first.state.global_step
    assert same(student_state(again), student_state(first))
    assert same(load_file(tmp_path / "out" / LORA), lora)
    assert checkpoint_names(tmp_path) == names


def test_more_steps_on_purpose_are_trained(tmp_path):
    straight = make_trainer(tmp_path / "a", **{**SAVING_RUN, "max_steps": 5})
    straight.train()
    make_trainer(tmp_path / "b", **{**SAVING_RUN, "max_steps": 3}).train()
    counter = CountSteps()
    more = make_trainer(tmp_path / "b", callbacks=[counter], **{**SAVING_RUN, "max_steps": 5})
    more.train(resume_from_checkpoint=True)
    assert counter.steps == 2 and not more.resumed_at_end
    assert same(student_state(more), student_state(straight))


def test_fewer_steps_than_the_checkpoint_has_train_nothing(tmp_path):
    first = make_trainer(tmp_path, **{**SAVING_RUN, "max_steps": 5})
    first.train()
    counter = CountSteps()
    again = make_trainer(tmp_path, callbacks=[counter], **{**SAVING_RUN, "max_steps": 4})
    again.train(resume_from_checkpoint=True)
    assert counter.steps == 0 and same(student_state(again), student_state(first))


class Killed(BaseException):
    """Stands for a signal: nothing catches it, and nothing is cleaned up but what `finally` holds."""


def kill_at(monkeypatch, count: int) -> list[str]:
    """Ends the run before the `count`-th operation that renames or removes something. Returns the operations' names."""
    done: list[str] = []

    def watched(owner, name):
        original = getattr(owner, name)

        def operation(*args, **kwargs):
            if len(done) == count:
                raise Killed
            done.append(f"{name} {Path(args[0]).name}")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, operation)

    watched(os, "replace")
    watched(shutil, "rmtree")
    return done


@pytest.mark.slow
def test_every_kill_point_of_the_last_save_resumes_to_the_same_end(tmp_path, monkeypatch):
    """Within saving, renaming and rotating the last checkpoint, and within saving the LoRA."""
    settings = {**SAVING_RUN, "max_steps": 2, "save_steps": 1, "save_total_limit": 1}
    out, before = tmp_path / "out", tmp_path / "before"
    trainer, resuming = make_trainer(tmp_path, **settings), make_trainer(tmp_path, **settings)
    save_checkpoint = trainer._save_checkpoint

    def stop_before_the_last(model, trial):
        if trainer.state.global_step == 2:
            raise Killed
        save_checkpoint(model, trial)

    trainer._save_checkpoint = stop_before_the_last
    with pytest.raises(Killed):
        trainer.train()
    shutil.copytree(out, before)

    def save(count: int) -> list[str]:
        shutil.rmtree(out)
        shutil.copytree(before, out)
        with monkeypatch.context() as patch:
            operations = kill_at(patch, count)
            save_checkpoint(trainer.model, None)
            trainer.save_model()
        return operations

    operations = save(-1)
    expected = load_file(out / LORA)
    assert "rmtree checkpoint-1" in operations and "replace checkpoint-2" in operations
    # Of the files that are moved one after another, the LoRA alone: a kill at the others finds the same state
    points = [(count, op) for count, op in enumerate(operations) if not op.endswith((".json", ".md", "run_id"))]
    for count, operation in points:
        with pytest.raises(Killed):
            save(count)
        resuming.train(resume_from_checkpoint=True)
        resuming.save_model()
        assert resuming.resumed_at_end == ("replace checkpoint-2" in operations[:count]), operation
        assert same(load_file(out / LORA), expected), operation
        assert checkpoint_names(tmp_path) == {"checkpoint-2"}, operation
        assert not [path.name for path in out.iterdir() if path.name.startswith("_")], operation


def test_a_comparison_that_is_there_is_not_made_again(tmp_path, capsys):
    calls = []

    def brightness(images, prompts, **columns):
        calls.append(len(prompts))
        return [float(image.mean()) for image in images]

    def finish(resume):
        trainer = make_trainer(
            tmp_path,
            eval_dataset=PROMPTS,
            reward_funcs={"count": brightness},
            resume_from_checkpoint=resume,
            **{**SAVING_RUN, "max_steps": 2},
        )
        script_args = OPDScriptArguments(
            model_name_or_path="tiny", teachers={"count": "x"}, datasets={"count": "x"}, compare=True
        )
        finish_run(trainer, script_args)
        return capsys.readouterr().out

    results, out = tmp_path / "out" / "results.json", finish(None)
    scores, number = results.read_text(), len(calls)
    assert number > 0 and "| base " in out
    assert out[out.index("| base ") :] in finish("true"), "the same table"
    assert len(calls) == number and results.read_text() == scores
    assert json.loads((tmp_path / "out" / "run.json").read_text())["results"] == json.loads(scores)
    results.unlink()
    finish("true")
    assert len(calls) == 2 * number and results.read_text() == scores


def failing(images, prompts, **columns):
    return [None] * len(images)


@pytest.mark.parametrize("method", ["grpo", "nft"])
def test_a_run_whose_rewards_all_fail_stops(tmp_path, method):
    trainer = rl_runs.make_trainer(method, tmp_path, rewards=failing, max_steps=5)
    with pytest.raises(
        UnscoredError, match="No image of the last 3 rollouts up to round 2 has a score: every reward"
    ) as e:
        trainer.train()
    assert trainer.state.global_step == 2 and "\n" not in str(e.value)


def test_rewards_that_come_back_let_the_run_go_on(tmp_path):
    calls = []

    def sometimes(images, prompts, **columns):
        calls.append(len(images))
        return rl_runs.brightness(images, prompts) if len(calls) in (1, 4) else [None] * len(images)

    trainer = rl_runs.make_trainer("grpo", tmp_path, rewards=sometimes, max_steps=6)
    trainer.train()
    assert trainer.state.global_step == 6 and len(calls) == 6
    trainer.check_end()


def test_a_short_run_without_a_score_ends_with_an_error(tmp_path, caplog):
    """After its LoRA, which has no effect, was saved with a warning."""
    trainer = rl_runs.make_trainer("grpo", tmp_path, rewards={"count": failing}, data={"count": ["a"]}, max_steps=1)
    script_args = RLScriptArguments(
        model_name_or_path="tiny", datasets={"count": "x"}, reward_funcs={"count": "brightness"}
    )
    with caplog.at_level(logging.WARNING), pytest.raises(UnscoredError, match="last 1 rollouts up to round 1"):
        finish_run(trainer, script_args)
    assert f"The LoRA in {str(tmp_path / 'out')!r} has no effect: its updates are all zero." in caplog.text
    assert (tmp_path / "out" / LORA).is_file()


def test_a_lora_with_an_effect_is_saved_without_a_word(tmp_path, caplog):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    with caplog.at_level(logging.WARNING):
        trainer.save_model()
    assert "has no effect" not in caplog.text
