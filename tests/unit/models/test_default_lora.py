# SPDX-License-Identifier: Apache-2.0
"""The LoRA of the published runs, which a student gets by default."""

from pathlib import Path

import pytest
import yaml

from tests.support.runs import make_config, make_teachers
from tests.support.tiny import tiny_pipeline
from trl_diffusion_opd import DiffusionOPDTrainer


CONFIGS = Path(__file__).parents[3] / "examples" / "configs"


def test_a_student_gets_the_published_rank_alpha_and_init(tmp_path):
    trainer = DiffusionOPDTrainer(
        tiny_pipeline(), make_teachers(tmp_path), make_config(tmp_path), {"count": ["a"], "scene": ["a"]}
    )
    lora = trainer.transformer.peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.init_lora_weights) == (32, 64, "gaussian")
    layer = trainer.transformer.transformer_blocks[0].attn.to_q
    assert layer.scaling["default"] == 2.0 and layer.lora_A["default"].weight.shape[0] == 32


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("sd35_*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_say_so_too(recipe):
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert (settings["lora_r"], settings["lora_alpha"]) == (32, 64)
