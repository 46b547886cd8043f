# SPDX-License-Identifier: Apache-2.0
"""Teachers, and LoRAs to start from or to score, may be files of kohya's scripts."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.runs import PROMPTS, make_config, small_lora
from tests.support.tiny import random_lora, save_diffusers_lora, tiny_inputs, tiny_pipeline, tiny_transformer, velocity
from trl_diffusion_opd import DiffusionOPDTrainer
from trl_diffusion_opd.evaluation.benchmark.entries import load_loras
from trl_diffusion_opd.lora.adapters import add_lora, use_adapter
from trl_diffusion_opd.lora.convert import convert_lora
from trl_diffusion_opd.lora.files import load_lora
from trl_diffusion_opd.models.sd3 import StableDiffusion3
from trl_diffusion_opd.teachers.config import normalize_teachers
from trl_diffusion_opd.teachers.loading import fetch_teachers, read_fingerprints


@pytest.fixture
def files(tmp_path):
    """The same LoRA as diffusers and as kohya write it."""
    source = save_diffusers_lora(tmp_path / "diffusers", *random_lora(seed=1))
    file = convert_lora(source, tmp_path / "kohya", "comfyui", base="StableDiffusion3Pipeline")
    return {"diffusers": str(source), "kohya": str(file)}


def velocity_with(weights):
    transformer = tiny_transformer()
    add_lora(transformer, weights, "teacher")
    with torch.no_grad(), use_adapter(transformer, "teacher"):
        return velocity(transformer, tiny_inputs())


def test_as_teachers_and_as_a_start(tmp_path, files):
    teachers = {"count": files["kohya"], "scene": files["diffusers"]}
    trainer = DiffusionOPDTrainer(
        model=tiny_pipeline(),
        teachers=teachers,
        args=make_config(tmp_path),
        train_dataset=PROMPTS,
        adapter=files["kohya"],
    )
    outputs = []
    with torch.no_grad():
        for adapter in ("teacher_0", "teacher_1", "default"):
            with use_adapter(trainer.transformer, adapter):
                outputs.append(velocity(trainer.transformer, tiny_inputs()))
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[2], outputs[0], atol=1e-6, rtol=0)
    assert (outputs[0] - velocity(tiny_transformer(), tiny_inputs())).abs().mean() > 1e-3
    # The tensors are the same, whatever file they came from.
    known = trainer.sources["teachers"]
    assert known["count"]["tensors"] == known["scene"]["tensors"]


def test_before_anything_is_loaded(tmp_path, files):
    configs, family = normalize_teachers({"count": files["kohya"]}), StableDiffusion3()
    found = fetch_teachers(configs, family)
    assert read_fingerprints(configs, found, 2.0, family)["count"]["tensors"]
    tensors = load_file(files["kohya"])
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    save_file(tensors | {name.replace("lora_up.weight", "diff"): torch.ones(4)}, tmp_path / "diff.safetensors")
    with pytest.raises(
        ValueError, match="teacher 'count' .*'diff.safetensors' holds '.*.diff', which changes weights"
    ):
        DiffusionOPDTrainer(
            model=tiny_pipeline(),
            teachers={"count": str(tmp_path / "diff.safetensors")},
            args=make_config(tmp_path),
            train_dataset={"count": PROMPTS["count"]},
            peft_config=small_lora(),
        )


def test_of_an_evaluation(files):
    loras = load_loras({"a": files["kohya"]}, StableDiffusion3())
    expected = velocity_with(load_lora(files["diffusers"])[0])
    assert torch.equal(velocity_with(loras["a"].weights), expected)
