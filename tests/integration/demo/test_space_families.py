# SPDX-License-Identifier: Apache-2.0
"""The demo of a student of each model family: its images are those of plain diffusers."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from tests.support.family_runs import LENGTH, make_family_trainer
from tests.support.space_app import load_app
from tests.support.tiny_families import FAMILY_PIPELINES, family_pipeline
from trl_diffusion_opd.models.registry import family_of
from trl_diffusion_opd.publishing.space import write_space


NEW = [name for name in FAMILY_PIPELINES if name != "sd3"]


def test_images_are_those_of_plain_diffusers(tmp_path):
    for name in NEW:
        folder = tmp_path / name
        family_pipeline(name).save_pretrained(folder / "base")
        trainer = make_family_trainer(name, folder, model=str(folder / "base"), max_steps=1)
        trainer.train()
        trainer.save_model()
        app = load_app(write_space(folder / "demo", folder / "out", base=folder / "base"))
        pipe = DiffusionPipeline.from_pretrained(folder / "base", dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_lora_weights(folder / "out", weight_name="pytorch_lora_weights.safetensors")
        for guidance in (1.0, 2.5):
            drawn = app.draw([("student", 1.0), (None, 0.0)], "a red circle", 3, 2, guidance, lambda *a, **k: None)
            expected = pipe(
                prompt="a red circle",
                height=16,
                width=16,
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(3),
                **family_of(pipe).call_arguments(guidance, LENGTH),
            ).images[0]
            assert np.array_equal(np.asarray(drawn[0]), np.asarray(expected)), (name, guidance)
            assert not np.array_equal(np.asarray(drawn[1]), np.asarray(expected)), (name, guidance)
        assert app.check_inputs("a red circle", 3, False, 2, 1.0, 1.0, [])[0] == "a red circle"


@pytest.mark.parametrize("is_distilled", [False, True])
def test_a_model_that_takes_no_guidance_has_no_slider_for_it(tmp_path, is_distilled):
    family_pipeline("flux2_klein", is_distilled=is_distilled).save_pretrained(tmp_path / "base")
    settings = {"guidance_scale": None, "num_inference_steps": None, "max_steps": 1}
    trainer = make_family_trainer("flux2_klein", tmp_path, model=str(tmp_path / "base"), **settings)
    trainer.train()
    trainer.save_model()
    app = load_app(write_space(tmp_path / f"demo_{is_distilled}", tmp_path / "out", base=tmp_path / "base"))
    shown = [part["props"] for part in app.page.config["components"] if part["props"].get("label") == "Guidance"]
    assert [props["visible"] for props in shown] == [not is_distilled]
    assert app.DEFAULTS["num_inference_steps"] == (4 if is_distilled else 10)
    assert app.DEFAULTS["guidance_scale"] == (1.0 if is_distilled else 4.0)
