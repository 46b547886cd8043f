# SPDX-License-Identifier: Apache-2.0
"""Converted LoRA files: the same tensors and options, and the same velocity to the bit in PEFT and in diffusers."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.tiny import (
    SD3_TARGETS,
    random_lora,
    save_diffusers_lora,
    save_peft_lora,
    tiny_inputs,
    tiny_pipeline,
    tiny_transformer,
    velocity,
)
from trl_diffusion_opd.lora.convert import convert_lora


PEFT_FILE, DIFFUSERS_FILE = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"

VARIANTS = {
    "plain": {"init_lora_weights": "gaussian", "revision": "main"},
    "patterns": {"rank_pattern": {"attn.to_k": 2, "attn.to_q": 6}, "alpha_pattern": {"attn.to_q": 3, "to_out.0": 1}},
    "rslora": {"use_rslora": True},
    "regex": {
        "targets": r"transformer_blocks\.\d\.attn\.to_[qk]",
        "exclude_modules": ["1.attn.to_k"],
    },
    "layers": {
        "targets": ["attn.to_q", "ff.net.2"],
        "layers_to_transform": [1],
        "layers_pattern": "transformer_blocks",
    },
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
}
pytestmark = [
    # PEFT takes the biases, which have one dimension, for shards of matrices.
    pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor.s. have invalid shape"),
    # diffusers injects by the names of the tensors, in which the exclusion is done already.
    pytest.mark.filterwarnings("ignore:You have passed exclude_modules"),
]


def by_peft(folder):
    return _velocity(PeftModel.from_pretrained(tiny_transformer(), folder))


def by_diffusers(folder):
    pipe = tiny_pipeline()
    pipe.load_lora_weights(folder, weight_name=DIFFUSERS_FILE)
    return _velocity(pipe.transformer)


def _velocity(transformer):
    transformer.requires_grad_(False)  # what requires a gradient decides which kernel multiplies the matrices
    with torch.no_grad():
        return velocity(transformer, tiny_inputs())


def assert_same(found, expected):
    base = _velocity(tiny_transformer())
    assert (expected - base).abs().mean() > 1e-3
    assert torch.equal(found, expected)


def assert_same_tensors(found, expected):
    found, expected = load_file(found), load_file(expected)
    assert found.keys() == expected.keys()
    assert all(tensor.dtype == expected[name].dtype for name, tensor in found.items())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def metadata(folder):
    with safe_open(folder / DIFFUSERS_FILE, framework="pt") as file:
        options = json.loads(file.metadata()["lora_adapter_metadata"])
    return {name: sorted(value) if isinstance(value, list) else value for name, value in options.items()}


def in_bfloat16(file):
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, metadata=header)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_from_peft_and_back(tmp_path, variant, half):
    source = save_peft_lora(tmp_path / "source", *random_lora(seed=1, **VARIANTS[variant]))
    if half:
        in_bfloat16(source / PEFT_FILE)
    assert convert_lora(source, tmp_path / "there") == tmp_path / "there" / DIFFUSERS_FILE
    assert convert_lora(tmp_path / "there", tmp_path / "back") == tmp_path / "back" / PEFT_FILE
    expected = by_peft(source)
    assert_same(by_diffusers(tmp_path / "there"), expected)
    assert_same(by_peft(tmp_path / "back"), expected)
    assert_same_tensors(tmp_path / "back" / PEFT_FILE, source / PEFT_FILE)
    assert LoraConfig.from_pretrained(tmp_path / "back") == LoraConfig.from_pretrained(source)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_from_diffusers_and_back(tmp_path, variant, half):
    source = save_diffusers_lora(tmp_path / "source", *random_lora(seed=1, **VARIANTS[variant]))
    if half:
        in_bfloat16(source / DIFFUSERS_FILE)
    convert_lora(str(source / DIFFUSERS_FILE), tmp_path / "there", "peft")
    convert_lora(tmp_path / "there" / PEFT_FILE, tmp_path / "back", "diffusers")
    expected = by_diffusers(source)
    assert_same(by_peft(tmp_path / "there"), expected)
    assert_same(by_diffusers(tmp_path / "back"), expected)
    assert_same_tensors(tmp_path / "back" / DIFFUSERS_FILE, source / DIFFUSERS_FILE)
    assert metadata(tmp_path / "back") == metadata(source)


@pytest.mark.parametrize("variant", ["plain", "patterns", "regex", "dora", "bias"])
def test_a_scaling_that_no_config_tells_becomes_explicit(tmp_path, variant):
    source = save_diffusers_lora(tmp_path / "source", *random_lora(seed=1, **VARIANTS[variant]), metadata=False)
    convert_lora(source, tmp_path / "peft")
    convert_lora(source, tmp_path / "diffusers", "diffusers")
    expected = by_diffusers(source)
    assert_same(by_peft(tmp_path / "peft"), expected)
    assert_same(by_diffusers(tmp_path / "diffusers"), expected)
    assert_same_tensors(tmp_path / "diffusers" / DIFFUSERS_FILE, source / DIFFUSERS_FILE)
    assert metadata(tmp_path / "diffusers")["transformer.r"] == 4


def test_alpha_tensors_become_options(tmp_path):
    config, state_dict = random_lora(seed=1, alpha=12, alpha_pattern={"attn.to_q": 3})
    tensors = {f"transformer.{name}": tensor for name, tensor in state_dict.items()}
    for module in {name.split(".lora_")[0] for name in tensors}:
        tensors[f"{module}.alpha"] = torch.tensor(3.0 if module.endswith("attn.to_q") else 12.0)
    save_file(tensors, tmp_path / "alphas.safetensors")
    expected = by_peft(save_peft_lora(tmp_path / "reference", config, state_dict))
    convert_lora(tmp_path / "alphas.safetensors", tmp_path / "peft")
    convert_lora(tmp_path / "alphas.safetensors", tmp_path / "diffusers", "diffusers")
    assert_same(by_peft(tmp_path / "peft"), expected)
    assert_same(by_diffusers(tmp_path / "diffusers"), expected)
    assert not any(name.endswith(".alpha") for name in load_file(tmp_path / "peft" / PEFT_FILE))


@pytest.mark.parametrize(
    ("base", "kept"), [("me/base", "me/base"), ("/home/someone/base", None), ("./base/model", None), (None, None)]
)
def test_the_base_model_is_kept_if_it_is_a_hub_id(tmp_path, base, kept):
    config, state_dict = random_lora()
    config.base_model_name_or_path = base
    source = save_diffusers_lora(tmp_path / "source", config, state_dict)
    convert_lora(source, tmp_path / "peft")
    assert LoraConfig.from_pretrained(tmp_path / "peft").base_model_name_or_path == kept
    convert_lora(tmp_path / "peft", tmp_path / "back")
    assert metadata(tmp_path / "back")["transformer.base_model_name_or_path"] == kept


def test_a_dropout_of_the_training_is_no_noise_in_diffusers(tmp_path):
    source = save_peft_lora(tmp_path / "source", *random_lora(seed=1, lora_dropout=0.25))
    convert_lora(source, tmp_path / "diffusers")
    assert_same(by_diffusers(tmp_path / "diffusers"), by_peft(source))
    convert_lora(source, tmp_path / "peft", "peft")
    assert LoraConfig.from_pretrained(tmp_path / "peft") == LoraConfig.from_pretrained(source)


def test_options_are_written_without_a_random_order(tmp_path):
    source = save_peft_lora(tmp_path / "source", *random_lora())
    convert_lora(source, tmp_path / "peft", "peft")
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert written["target_modules"] == sorted(SD3_TARGETS) and list(written) == sorted(written)
    with safe_open(convert_lora(source, tmp_path / "diffusers"), framework="pt") as file:
        written = json.loads(file.metadata()["lora_adapter_metadata"])
    assert written["transformer.target_modules"] == sorted(SD3_TARGETS) and list(written) == sorted(written)


def test_refusals(tmp_path):
    source = save_diffusers_lora(tmp_path / "source", *random_lora())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for destination, to, message in (
        ("full", None, "full' is not empty. Choose another folder, or overwrite"),
        ("full/notes.txt", None, "must be a folder, not a file"),
        ("out.safetensors", None, "must be a folder, not a file"),
        ("out", "onnx", "must be one of 'diffusers', 'peft', 'comfyui', but is 'onnx'"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_lora(source, tmp_path / destination, to)
    with pytest.raises(OSError, match="nowhere' does not exist. Check the spelling"):
        convert_lora(tmp_path / "nowhere", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "source"]
    assert convert_lora(source, tmp_path / "empty").is_file()
    assert convert_lora(source, tmp_path / "full", overwrite=True).is_file()
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
