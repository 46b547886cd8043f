# SPDX-License-Identifier: Apache-2.0
"""What a run is going to write is checked before it trains, and a LoRA that cannot be saved is saved elsewhere."""

import shutil
import tempfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.runs import SAVING_RUN, make_trainer, student_state
from trl_diffusion_opd.trainers.disk import SaveError, checkpoint_bytes, lora_bytes, num_checkpoints
from trl_diffusion_opd.trainers.output_dir import check_output_dir


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("disk"), ema_decay=0.9, **SAVING_RUN)


def test_sizes(trainer):
    student = sum(4 * tensor.numel() for tensor in student_state(trainer).values())
    assert lora_bytes(trainer) == 2 * student, "the LoRA and its average"
    assert checkpoint_bytes(trainer) == 4 * student, "and two moments"


@pytest.mark.parametrize(
    ("change", "number"),
    [
        ({}, 3),
        ({"save_steps": 4}, 2),
        ({"save_steps": 0.5}, 2),
        ({"save_strategy": "no"}, 0),
        ({"save_total_limit": 1}, 2),
        ({"save_total_limit": 5}, 3),
        ({"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 4}, 4),
    ],
)
def test_all_checkpoints_that_a_run_writes_are_counted(trainer, monkeypatch, change, number):
    for name, value in change.items():
        monkeypatch.setattr(trainer.args, name, value)
    assert num_checkpoints(trainer) == number


def with_free(monkeypatch, free: int) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SAVING_RUN, r"checkpoints need .* \(3 of them and the LoRA\)\. .*, or set or lower `save_total_limit`\."),
        ({"save_strategy": "no"}, r"but the LoRA needs .* choose another `output_dir`\.$"),
    ],
)
def test_a_disk_that_is_too_small_is_refused_before_training(tmp_path, monkeypatch, trainer, settings, message):
    checkpoint, lora = checkpoint_bytes(trainer) * 3 // 4, lora_bytes(trainer) // 2  # without the average
    needed = lora + (3 * checkpoint if "save_steps" in settings else 0)
    with_free(monkeypatch, needed - 1)
    with pytest.raises(OSError, match=message):
        make_trainer(tmp_path, **settings)
    with_free(monkeypatch, needed)
    make_trainer(tmp_path, **settings)


def test_a_folder_that_cannot_be_written_to_is_refused_at_start_up(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match="`output_dir` '.*file' cannot be written to: it is a file. Choose another folder"
    ):
        check_output_dir(tmp_path / "file")
    with pytest.raises(OSError, match="cannot be written to: Not a directory"):
        check_output_dir(tmp_path / "file" / "out")
    check_output_dir(tmp_path / "new" / "out")
    assert list((tmp_path / "new" / "out").iterdir()) == []

    def full(**kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    monkeypatch.setattr("trl_diffusion_opd.trainers.base_trainer.load_pipeline", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(OSError, match="out' cannot be written to: No space left on device"):
        make_trainer(tmp_path)


class TestRescue:
    @pytest.fixture
    def trained(self, tmp_path):
        (tmp_path / "home").mkdir()
        trainer = make_trainer(tmp_path / "home", ema_decay=0.5, ema_update_every=1, max_steps=2)
        trainer.train()
        return trainer

    def block(self, folder: Path) -> None:
        """Puts a file where the folder was: nothing can be written into it."""
        shutil.rmtree(folder)
        folder.write_text("in the way")

    def check(self, trainer, folder: Path) -> None:
        saved = load_file(folder / "pytorch_lora_weights_raw.safetensors")
        for name, tensor in student_state(trainer).items():
            assert tensor.equal(saved[f"transformer.{name.replace('.default', '')}"])
        assert (folder / "pytorch_lora_weights.safetensors").is_file()

    def test_beside_the_folder(self, trained, tmp_path):
        self.block(tmp_path / "home" / "out")
        with pytest.raises(
            SaveError, match="The LoRA of '.*out' could not be saved: .*File exists.* was saved to "
        ) as error:
            trained.save_model()
        [folder] = (tmp_path / "home").glob("out-rescued-*")
        assert repr(str(folder)) in str(error.value) and "\n" not in str(error.value)
        self.check(trained, folder)

    def test_among_the_temporary_files(self, trained, tmp_path, monkeypatch):
        self.block(tmp_path / "home")
        (tmp_path / "temporary").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
        with pytest.raises(SaveError, match="The LoRA as it is now was saved to '.*temporary/out-rescued-"):
            trained.save_model()
        [folder] = (tmp_path / "temporary").iterdir()
        self.check(trained, folder)

    def test_nowhere(self, trained, tmp_path, monkeypatch):
        self.block(tmp_path / "home")
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
        with pytest.raises(SaveError, match="The LoRA could not be saved elsewhere either"):
            trained.save_model()

    def test_a_checkpoint_that_cannot_be_saved(self, tmp_path, monkeypatch):
        trainer = make_trainer(tmp_path, **{**SAVING_RUN, "max_steps": 2})

        def fail(output_dir):
            raise RuntimeError("PytorchStreamWriter failed writing file")  # torch's word for a full disk

        monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", fail)
        message = (
            "The checkpoint '.*checkpoint-2' could not be saved: PytorchStreamWriter .*was saved to '.*out-rescued-"
        )
        with pytest.raises(SaveError, match=message):
            trainer.train()
        [folder] = tmp_path.glob("out-rescued-*")
        saved = load_file(folder / "pytorch_lora_weights.safetensors")
        for name, tensor in student_state(trainer).items():
            assert tensor.equal(saved[f"transformer.{name.replace('.default', '')}"])
