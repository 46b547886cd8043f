# SPDX-License-Identifier: Apache-2.0
"""A run that is made from other models than a checkpoint's is refused before the base is loaded."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.runs import make_teachers, make_trainer
from tests.support.tiny import random_lora, save_diffusers_lora, save_peft_lora, tiny_pipeline, tiny_transformer
from trl_diffusion_opd.hub.locations import Origin
from trl_diffusion_opd.models.loading import read_configs
from trl_diffusion_opd.teachers.config import TeacherConfig
from trl_diffusion_opd.trainers import base_trainer
from trl_diffusion_opd.trainers.checkpoints import ResumeError


SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The folder of a run with a checkpoint, and its base."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline().save_pretrained(folder / "base")
    make_trainer(folder, pipeline=str(folder / "base"), **SAVED).train()
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


def resume(folder: Path, **changes):
    arguments = {"pipeline": str(folder / "base"), "resume_from_checkpoint": "true", **SAVED, "max_steps": 2}
    return make_trainer(folder, **{**arguments, **changes})


def other_teacher(folder: Path) -> dict:
    save_diffusers_lora(folder / "other", *random_lora(seed=9))
    return {"teachers": make_teachers(folder, count=str(folder / "other"))}


def other_guidance(folder: Path) -> dict:
    return {"teachers": make_teachers(folder, count=TeacherConfig(str(folder / "count"), guidance_scale=7.0))}


def other_weights(folder: Path) -> dict:
    return {"task_weights": {"count": 2}}


def other_base(folder: Path) -> dict:
    pipeline = tiny_pipeline()
    pipeline.register_modules(transformer=tiny_transformer(num_layers=3))
    pipeline.save_pretrained(folder / "deeper")
    return {"pipeline": str(folder / "deeper")}


def other_base_in_memory(folder: Path) -> dict:
    pipeline = tiny_pipeline()
    pipeline.register_modules(transformer=tiny_transformer(num_layers=3))
    return {"pipeline": pipeline}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_teacher, r"other teachers: count tensors '\w{64}' instead of '\w{64}'\. Resume with the same teachers"),
        (other_guidance, r"other teachers: count guidance_scale 7\.0 instead of 2\.0\. Resume"),
        (other_weights, r"other tasks: count 2 instead of 1\. Resume"),
        (other_base, r"other base: num_layers 3 instead of 2\. Resume"),
        (other_base_in_memory, r"other base: num_layers 3 instead of 2\. Resume"),
    ],
)
def test_other_sources_are_refused_before_anything_is_loaded(folder, monkeypatch, change, message):
    monkeypatch.setattr(base_trainer, "load_pipeline", lambda *args, **kwargs: pytest.fail("the base was loaded"))
    with pytest.raises(ResumeError, match=message) as error:
        resume(folder, **change(folder))
    assert "\n" not in str(error.value)


def test_the_same_teacher_in_another_format_and_folder_goes_on(folder):
    save_peft_lora(folder / "elsewhere", *random_lora(seed=1, scale=0.1))
    trainer = resume(folder, teachers=make_teachers(folder, count=str(folder / "elsewhere")))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


def test_another_scale_of_the_same_tensors_is_found_out_when_loaded(folder):
    config, state = random_lora(seed=1, scale=0.1)
    config.lora_alpha *= 2
    save_diffusers_lora(folder / "stronger", config, state)
    trainer = resume(folder, teachers=make_teachers(folder, count=str(folder / "stronger")))
    with pytest.raises(ResumeError, match="other teachers") as error:
        trainer.train(resume_from_checkpoint=True)
    assert "\n" not in str(error.value)


def test_a_checkpoint_tells_no_texts_of_the_base(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.transformer.register_to_config(note="hf_planted")
    make_trainer(tmp_path, pipeline=pipeline, **SAVED).train()
    text = (tmp_path / "out" / "checkpoint-1" / "provenance.json").read_text()
    assert "hf_planted" not in text and '"num_layers": 2' in text


def test_of_a_base_without_a_readable_config_nothing_is_told_early(tmp_path):
    (tmp_path / "transformer").mkdir()
    for content in ("{", "[]"):
        (tmp_path / "transformer" / "config.json").write_text(content)
        assert read_configs(str(tmp_path), Origin(""))("transformer") == {}
    given = {"transformer": tiny_transformer(num_layers=3)}
    assert read_configs(str(tmp_path), Origin(""), given)("transformer")["num_layers"] == 3


@pytest.mark.parametrize("key", ["sources", "trajectory"])
def test_damaged_notes_are_told(folder, key):
    file = folder / "out" / "checkpoint-1" / "provenance.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: 3}))
    with pytest.raises(ResumeError, match="is damaged: its 'provenance.json' cannot be read"):
        resume(folder)
