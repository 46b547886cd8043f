# SPDX-License-Identifier: Apache-2.0
"""Saving and resuming: bit-identical continuation, atomic checkpoints, refusals, and nothing in the files that must not be."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.runs import (
    PROMPTS,
    SAVING_RUN,
    make_teachers,
    make_trainer,
    small_lora,
    stock_images,
    student_state,
)
from tests.support.tiny import random_lora, save_diffusers_lora
from trl_diffusion_opd.evaluation.score import evaluation_batch


ROOT = Path(__file__).parents[3]


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(tensor.equal(second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2},
        {"ema_decay": 0.9, "ema_update_every": 2, "prompt_cache_size": 5, "noise_level": 0.5},
    ],
)
def test_resuming_continues_bit_identically(tmp_path, settings):
    (tmp_path / "a").mkdir()
    straight = make_trainer(tmp_path / "a", **SAVING_RUN, **settings)
    straight.train()
    resumed = make_trainer(tmp_path / "a", **SAVING_RUN, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "out" / "checkpoint-2"))
    assert resumed.state.global_step == 6
    assert_same(student_state(straight), student_state(resumed))
    if straight.ema is not None:
        assert_same(straight.ema.state_dict(), resumed.ema.state_dict())


SCRIPT = """
import sys
from pathlib import Path
from transformers import TrainerCallback
from tests.support.runs import make_trainer, SAVING_RUN
folder, resume = Path(sys.argv[1]), sys.argv[2] == "resume"

class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("step", state.global_step, flush=True)

trainer = make_trainer(folder, callbacks=[Slow()], **SAVING_RUN)
trainer.train(resume_from_checkpoint=True if resume else None)
trainer.save_model()
"""


@pytest.mark.slow
def test_resuming_after_sigkill_is_bit_identical(tmp_path):
    def start(folder: Path, mode: str) -> subprocess.Popen:
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", SCRIPT, str(folder), mode]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    straight, killed = start(tmp_path / "straight", "new"), start(tmp_path / "killed", "new")
    for line in killed.stdout:
        if line.strip() == "step 3":  # a checkpoint of step 2 is there, step 3 is not saved
            os.kill(killed.pid, signal.SIGKILL)
            break
    assert killed.wait() == -signal.SIGKILL
    resumed = start(tmp_path / "killed", "resume")
    for process in (straight, resumed):
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    assert "step 3" in output and "step 1\n" not in output
    weights = [
        load_file(tmp_path / run / "out" / "pytorch_lora_weights.safetensors") for run in ("straight", "killed")
    ]
    assert_same(*weights)


def test_checkpoints_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **SAVING_RUN)
    seen = []
    save_rng_state = trainer._save_rng_state

    def watch(output_dir):  # in the middle of writing a checkpoint
        seen.append(sorted(path.name for path in (tmp_path / "out").iterdir() if path.name.startswith("checkpoint")))
        save_rng_state(output_dir)

    monkeypatch.setattr(trainer, "_save_rng_state", watch)
    trainer.train()
    assert seen == [[], ["checkpoint-2"], ["checkpoint-2", "checkpoint-4"]]
    assert not (tmp_path / "out" / "_staging").exists()


def test_a_failure_while_saving_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **SAVING_RUN)
    save_rng_state = trainer._save_rng_state

    def fail(output_dir):
        if trainer.state.global_step == 4:
            raise OSError("No space left on device")
        save_rng_state(output_dir)

    monkeypatch.setattr(trainer, "_save_rng_state", fail)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    resumed = make_trainer(tmp_path, **SAVING_RUN)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


def test_save_total_limit_and_best_model(tmp_path):
    trainer = make_trainer(
        tmp_path,
        max_steps=6,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="kl/count",
        greater_is_better=True,  # so that the first is the best, not the last
        eval_dataset=PROMPTS,
    )
    trainer.train()
    history = {h["step"]: h["eval_kl/count"] for h in trainer.state.log_history if "eval_kl/count" in h}
    best = max(history, key=history.get)
    assert best < 6
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / f"checkpoint-{best}")
    left = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert left == {f"checkpoint-{best}", "checkpoint-6"}
    saved = load_file(tmp_path / "out" / f"checkpoint-{best}" / "pytorch_lora_weights.safetensors")
    for name, tensor in student_state(trainer).items():
        assert tensor.equal(saved[f"transformer.{name.replace('.default', '')}"])


def test_resuming_with_other_teachers_is_refused(tmp_path):
    make_trainer(tmp_path, **SAVING_RUN).train()
    save_diffusers_lora(tmp_path / "other", *random_lora(seed=9))
    other = make_trainer(tmp_path, teachers=make_teachers(tmp_path, count=str(tmp_path / "other")), **SAVING_RUN)
    with pytest.raises(ValueError, match="belongs to a run with other teachers"):
        other.train(resume_from_checkpoint=True)


def test_resuming_with_other_tasks_is_refused(tmp_path):
    make_trainer(tmp_path, **SAVING_RUN).train()
    teachers = make_teachers(tmp_path)
    teachers["text"] = teachers.pop("count")
    other = make_trainer(tmp_path, teachers=teachers, data={"text": ["a"], "scene": PROMPTS["scene"]}, **SAVING_RUN)
    with pytest.raises(ValueError, match="belongs to a run with other tasks"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"peft_config": small_lora(r=2, target_modules=["attn.to_q", "attn.to_v"])},
            "wrong shapes|another LoRA config",
        ),
        ({"ema_decay": 0.9}, "saved without a moving average, but `ema_decay` is 0.9"),
    ],
)
def test_resuming_with_another_student_is_refused(tmp_path, change, message):
    make_trainer(tmp_path, **SAVING_RUN).train()
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **SAVING_RUN, **change).train(resume_from_checkpoint=True)


def test_a_checkpoint_without_its_optimizer_is_refused(tmp_path):
    make_trainer(tmp_path, save_only_model=True, **SAVING_RUN).train()
    with pytest.raises(ValueError, match="it has no 'optimizer.pt'.* saved without `save_only_model`"):
        make_trainer(tmp_path, **SAVING_RUN).train(resume_from_checkpoint=True)


def test_rotation_keeps_the_new_checkpoint_beside_one_of_an_older_run(tmp_path):
    old = tmp_path / "out" / "checkpoint-300"
    old.mkdir(parents=True)
    os.utime(old, (1_000_000, 1_000_000))
    make_trainer(tmp_path, save_total_limit=1, **SAVING_RUN).train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_new_run_leaves_nothing_of_an_older_one_that_would_be_pushed_with_it(tmp_path):
    older = make_trainer(tmp_path, ema_decay=0.5)
    older.train()
    older.save_model()
    out = tmp_path / "out"
    (out / "results.json").write_text("{}")
    assert (out / "pytorch_lora_weights_raw.safetensors").is_file()
    newer = make_trainer(tmp_path)
    newer.train()
    newer.save_model()
    names = {path.name for path in out.iterdir()}
    assert not names & {"pytorch_lora_weights_raw.safetensors", "results.json"}
    assert names >= {"pytorch_lora_weights.safetensors", "run.json", "README.md"}


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="There is no checkpoint in .*it has no 'pytorch_lora_weights.safetensors'"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "empty"))


def test_saved_files_hold_the_student_alone_and_no_token(tmp_path):
    token = "hf_" + "s3cret" * 5
    trainer = make_trainer(
        tmp_path,
        hub_token=token,
        model_init_kwargs={"token": token},
        report_to=["tensorboard"],  # whose files hold the settings, and are pushed
        ema_decay=0.5,
        ema_update_every=1,
        **SAVING_RUN,
    )
    trainer.train()
    trainer.save_model()
    out = tmp_path / "out"
    for path in out.rglob("*"):
        if path.is_file():
            assert token.encode() not in path.read_bytes(), path
    assert not list(out.rglob("training_args.bin")) and not list(out.rglob("model.safetensors"))
    for folder in (out, out / "checkpoint-6"):
        tensors = load_file(folder / "pytorch_lora_weights.safetensors")
        assert len(tensors) == len(student_state(trainer))
        assert {"pytorch_lora_weights.safetensors", "pytorch_lora_weights_raw.safetensors", "training_args.json"} <= {
            path.name for path in folder.iterdir()
        }
    provenance = json.loads((out / "provenance.json").read_text())
    for task, teacher in trainer.loaded_teachers.items():
        assert provenance["teachers"][task]["sha256"] == teacher.fingerprint


@pytest.mark.parametrize("averaged", [False, True])
def test_stock_pipeline_gives_the_images_of_training(tmp_path, averaged):
    """`load_lora_weights` on a fresh base, in stock diffusers, with the LoRA's alpha."""
    settings = {"ema_decay": 0.5, "ema_update_every": 1} if averaged else {}
    trainer = make_trainer(tmp_path, max_steps=4, learning_rate=0.05, eval_num_inference_steps=6, **settings)
    trainer.train()
    trainer.save_model()
    batch = evaluation_batch(trainer.datasets["count"], "count", [0, 1], seed=0, column="prompt")
    trainer.grid.prompts.prepare("test", lambda: batch.prompts)
    with trainer.student_weights(average=True):
        expected = trainer.grid.sample_batch(trainer.student_policy, batch)
    base = trainer.grid.sample_batch(trainer.policies()[0], batch)
    assert (expected - base).abs().max() > 1e-3

    images = stock_images(tmp_path / "out", batch, trainer.sampler.noise(batch.seeds)[0], num_inference_steps=6)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    name = "pytorch_lora_weights_raw.safetensors"
    assert (tmp_path / "out" / name).is_file() == averaged


def test_average_follows_its_definition(tmp_path):
    """Decay min((1 + n) / (10 + n), decay) ** 2 every second step, after n steps; the student up to the first update."""
    from transformers import TrainerCallback

    expected = {}

    class Follow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            n = state.global_step
            if n == 1:
                expected.update(student_state(trainer))
            elif (n + 1) % 2 == 0:
                decay = min((1 + n) / (10 + n), 0.3) ** 2
                for name, raw in student_state(trainer).items():
                    expected[name] = decay * expected[name] + (1 - decay) * raw

    trainer = make_trainer(
        tmp_path, max_steps=8, ema_decay=0.3, ema_update_every=2, ema_update_repeats=2, callbacks=[Follow()]
    )
    trainer.train()
    raw = student_state(trainer)
    for name, average in trainer.ema.state_dict().items():
        torch.testing.assert_close(average, expected[name], rtol=1e-5, atol=1e-7)
    assert any(not raw[name].equal(average) for name, average in trainer.ema.state_dict().items())
    with pytest.raises(RuntimeError, match="in between"), trainer.ema.applied():
        raise RuntimeError("in between")
    assert_same(student_state(trainer), raw)


def test_too_little_disk_is_refused_at_start_up(tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        OSError, match="is on a disk with 0.0 MB free, but checkpoints need .* lower `save_total_limit`"
    ):
        make_trainer(tmp_path, **SAVING_RUN)


def test_a_checkpoint_has_the_size_of_student_and_optimizer(tmp_path):
    trainer = make_trainer(tmp_path, **SAVING_RUN)
    trainer.train()
    student = sum(tensor.numel() * 4 for tensor in student_state(trainer).values())
    size = sum(path.stat().st_size for path in (tmp_path / "out" / "checkpoint-6").iterdir())
    assert size < 3 * student + 80_000  # names, metadata and logs
