# SPDX-License-Identifier: Apache-2.0
"""An `output_dir` belongs to one run: older checkpoints are never resumed or removed, and a second process is refused."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.support.runs import make_trainer, student_state
from trl_diffusion_opd.trainers import base_trainer, run_lock
from trl_diffusion_opd.trainers.checkpoints import last_checkpoint, list_checkpoints, read_run_id
from trl_diffusion_opd.utils.files import recover_folders, replace_folder, written_whole


ROOT = Path(__file__).parents[3]
SHORT_RUN = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}


class KillAfter(TrainerCallback):
    """Ends a run after a step, as a signal does."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def test_a_new_run_never_resumes_the_checkpoints_of_an_older_one(tmp_path, caplog):
    out = tmp_path / "out"
    older = make_trainer(tmp_path, **SHORT_RUN)
    older.train()
    saved = load_file(out / "checkpoint-3" / "pytorch_lora_weights.safetensors")
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, seed=7, callbacks=[KillAfter(1)], **SHORT_RUN).train()
    assert names(out) == [] and names(out / "earlier_run_1") == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    kept = load_file(out / "earlier_run_1" / "checkpoint-3" / "pytorch_lora_weights.safetensors")
    assert all(tensor.equal(kept[name]) for name, tensor in saved.items())
    assert f"checkpoint-1, checkpoint-2, checkpoint-3 in {str(out)!r} are not of the run that begins" in caplog.text

    caplog.clear()
    resumed = make_trainer(tmp_path, seed=7, **SHORT_RUN)
    resumed.train(resume_from_checkpoint=True)
    assert f"There is no checkpoint of this run in {str(out)!r} to resume from: it starts anew." in caplog.text
    straight = make_trainer(tmp_path / "other", seed=7, **SHORT_RUN)
    straight.train()
    assert all(tensor.equal(student_state(straight)[name]) for name, tensor in student_state(resumed).items())
    assert names(out) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert {read_run_id(path) for path in list_checkpoints(out)} == {read_run_id(out)}


def test_a_run_that_goes_on_from_an_earlier_checkpoint_is_not_mixed_with_the_later_ones(tmp_path, caplog):
    out = tmp_path / "out"
    make_trainer(tmp_path, **SHORT_RUN).train()
    with pytest.raises(KeyboardInterrupt):
        changed = make_trainer(tmp_path, callbacks=[KillAfter(2)], **{**SHORT_RUN, "learning_rate": 0.001})
        changed.train(resume_from_checkpoint=str(out / "checkpoint-1"))
    assert names(out) == ["checkpoint-1"] and names(out / "earlier_run_1") == ["checkpoint-2", "checkpoint-3"]
    assert last_checkpoint(out) == out / "checkpoint-1"


def test_an_unknown_run_is_told_apart_by_its_id_alone(tmp_path):
    """A kill between the first and the last of the renames that set checkpoints aside."""
    for name, run in (("checkpoint-2", "new"), ("checkpoint-6", "old"), ("checkpoint-10", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run_id").write_text(f"{run}\n")
    (tmp_path / "run_id").write_text("new\n")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    (tmp_path / "run_id").write_text("old\n")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


class TestReplacing:
    def test_there_is_no_moment_without_the_old_or_the_new_folder(self, tmp_path, monkeypatch):
        import os
        import shutil

        folder = tmp_path / "checkpoint-2"
        seen = []
        for owner, name in ((os, "replace"), (shutil, "rmtree")):
            original = getattr(owner, name)

            def operation(*args, original=original, **kwargs):
                original(*args, **kwargs)
                seen.append(sorted(p.read_text() for p in tmp_path.glob("*checkpoint-2/file")))

            monkeypatch.setattr(owner, name, operation)
        for content in ("old", "new"):
            (tmp_path / "staged").mkdir()
            (tmp_path / "staged" / "file").write_text(content)
            replace_folder(tmp_path / "staged", folder)
        assert seen == [["old"], ["old"], ["old"], ["old"], ["new", "old"], ["new"]]

    @pytest.mark.parametrize("placed", [False, True])
    def test_what_was_set_aside_comes_back_if_nothing_is_in_its_place(self, tmp_path, placed):
        (tmp_path / "_replaced-checkpoint-2").mkdir()
        (tmp_path / "_replaced-checkpoint-2" / "file").write_text("old")
        if placed:
            (tmp_path / "checkpoint-2").mkdir()
            (tmp_path / "checkpoint-2" / "file").write_text("new")
        recover_folders(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
        assert (tmp_path / "checkpoint-2" / "file").read_text() == ("new" if placed else "old")

    def test_files_are_replaced_together_or_not_at_all(self, tmp_path):
        (tmp_path / "a").write_text("old")
        with pytest.raises(OSError, match="full"), written_whole(tmp_path) as folder:
            (folder / "a").write_text("new")
            raise OSError("full")
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}
        with written_whole(tmp_path) as folder:
            (folder / "a").write_text("new")
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new"}


HOLD = """
import sys
from trl_diffusion_opd.trainers.run_lock import holding
with holding(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


class TestLock:
    def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(self, tmp_path, monkeypatch):
        command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
        other = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert other.stdout.readline() == "held\n"
            trainer = make_trainer(tmp_path)
            message = rf"`output_dir` .*out' is in use by another run \(process {other.pid} on .*\)\. Wait for its end"
            with pytest.raises(BlockingIOError, match=message) as refused:
                trainer.train()
            assert "\n" not in str(refused.value)
            monkeypatch.setattr(base_trainer, "load_pipeline", lambda *args, **kwargs: pytest.fail("loaded"))
            with pytest.raises(BlockingIOError, match=message):
                make_trainer(tmp_path, resume_from_checkpoint="true")
        finally:
            other.kill()
            other.communicate()
        monkeypatch.undo()
        trainer = make_trainer(tmp_path)
        trainer.train()
        assert trainer.state.global_step == 3

    def test_the_process_that_holds_a_folder_may_enter_it_again(self, tmp_path):
        with run_lock.holding(tmp_path):
            with run_lock.holding(tmp_path):
                pass
            assert "process" in (tmp_path / ".lock").read_text()
        assert (tmp_path / ".lock").read_text() == "" and not run_lock._HELD

    def test_a_file_system_without_locks_is_a_warning(self, tmp_path, monkeypatch):
        def unsupported(*args):
            raise OSError(37, "No locks available")

        monkeypatch.setattr(run_lock.fcntl, "lockf", unsupported)
        with pytest.warns(UserWarning, match="cannot be locked .*No locks available.*See to it"):
            with run_lock.holding(tmp_path):
                pass
        monkeypatch.setattr(run_lock, "fcntl", None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with run_lock.holding(tmp_path), run_lock.holding(tmp_path):
                pass


@pytest.fixture(autouse=True)
def _tell_warnings(caplog):
    caplog.set_level(logging.WARNING)
