# SPDX-License-Identifier: Apache-2.0
"""Fingerprints, which stand in checkpoints and results: those that were written once stay right."""

import pytest
import torch
from peft import LoraConfig

from tests.support.tiny import save_diffusers_lora, save_peft_lora, tiny_transformer
from trl_diffusion_opd.evaluation.benchmark.entries import load_loras
from trl_diffusion_opd.hub.locations import Origin
from trl_diffusion_opd.lora.adapters import add_lora
from trl_diffusion_opd.lora.files import load_lora
from trl_diffusion_opd.lora.fingerprints import adapter_sha256, lora_sha256
from trl_diffusion_opd.models.sd3 import StableDiffusion3
from trl_diffusion_opd.teachers.loading import Teacher, load_teachers, teacher_fingerprint


# As the first version of this package wrote them.
FILE, HALF_FILE = (
    "aa8daa221c31698cf48a4d57ccc207a588c557cd35cd9c7ce0e277b13706136b",
    "475880fba63e754493ad8656882fa6cbcf82c44013e68e73d73c02c0a58499a9",
)
ADAPTER, HALF_ADAPTER = (
    "9dbc128f26e6ebce97578dae62b7e46ac85d74dcf3276d2f7e32fba2c0969c24",
    "c3ec633946f6087206511d7e93d233e6eed0b58619574d59463ee20d47ed055f",
)
FULL_MODEL = "7d779ee7ab63f946e28cd8b730c0e0c305c927876ca451548de208cad2f28f32"


def lora():
    """A LoRA whose values depend on no random numbers."""
    modules = [f"transformer_blocks.{block}.attn.{name}" for block in range(2) for name in ("to_q", "to_k")]
    names = [
        (f"{module}.lora_{half}.weight", (2, 16) if half == "A" else (16, 2)) for module in modules for half in "AB"
    ]
    state_dict = {
        name: torch.arange(32, dtype=torch.float32).reshape(shape) / (32 + i) for i, (name, shape) in enumerate(names)
    }
    return LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_k"], alpha_pattern={"to_k": 5}), state_dict


@pytest.fixture
def folders(tmp_path):
    config, state_dict = lora()
    save_diffusers_lora(tmp_path / "diffusers", config, state_dict)
    save_peft_lora(tmp_path / "peft", *lora())
    halved = {name: tensor.bfloat16() for name, tensor in state_dict.items()}
    save_diffusers_lora(tmp_path / "half", config, halved, metadata=False)
    return {name: str(tmp_path / name) for name in ("diffusers", "peft", "half")}


def test_of_files(folders):
    expected = {"diffusers": FILE, "peft": FILE, "half": HALF_FILE}
    assert {name: lora_sha256(load_lora(folder)[0]) for name, folder in folders.items()} == expected
    assert {name: entry.sha256 for name, entry in load_loras(folders, StableDiffusion3()).items()} == expected


def test_of_adapters(folders):
    expected = {"diffusers": ADAPTER, "peft": ADAPTER, "half": HALF_ADAPTER}
    transformer = tiny_transformer()
    teachers = load_teachers(folders, transformer, guidance_scale=1.0, family=StableDiffusion3(), show_progress=False)
    assert {name: teacher.fingerprint for name, teacher in teachers.items()} == expected
    other = tiny_transformer()
    add_lora(other, load_lora(folders["peft"])[0], "another")
    assert adapter_sha256(other, "another") == ADAPTER


def test_of_a_full_model():
    model = torch.nn.Linear(2, 1)
    model.load_state_dict({"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])})
    assert teacher_fingerprint(Teacher("a", 1.0, None, model, "", "", Origin("")), model) == FULL_MODEL


def test_load_lora_tells_where_it_came_from(folders, tmp_path):
    weights, origin = load_lora(folders["half"], owner="mine")
    assert (weights.owner, origin) == ("mine", Origin(f"{tmp_path.name}/half"))
    weights, _ = load_lora(tmp_path / "diffusers", weight_name="pytorch_lora_weights.safetensors")
    assert weights.config.lora_alpha == 3
    with pytest.raises(OSError, match="mine: the local path '.*nowhere' does not exist. Check the spelling"):
        load_lora(tmp_path / "nowhere", owner="mine")
