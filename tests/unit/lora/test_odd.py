# SPDX-License-Identifier: Apache-2.0
"""Odd LoRA files that diffusers or PEFT load: they do the same here, to the bit."""

import pytest
import torch
from peft import PeftModel

from tests.support.lora_files import DIFFUSERS_FILE, all_as, diffusers_lora, peft_lora
from tests.support.tiny import tiny_inputs, tiny_pipeline, tiny_transformer, velocity
from trl_diffusion_opd.lora.adapters import add_lora
from trl_diffusion_opd.lora.convert import convert_lora
from trl_diffusion_opd.lora.files import read_lora


WRITERS = {"peft": peft_lora, "diffusers": diffusers_lora}
ODD = {
    "runtime_config": ({"runtime_config": {"ephemeral_gpu_offload": False}}, None, "peft"),
    "runtime_config null": ({"runtime_config": None}, None, "peft"),
    "negative alpha": ({"lora_alpha": -8}, None, "both"),
    "alpha with a fraction": ({"lora_alpha": 8.5}, None, "both"),
    "alpha of a module": ({"alpha_pattern": {"attn.to_k": 0.5}}, None, "both"),
    "init null": ({"init_lora_weights": None}, None, "both"),
    "eva": ({"eva_config": {"rho": 2.0}}, None, "both"),
    "loftq": ({"loftq_config": {"a": 1}}, None, "both"),
    "option of tomorrow": ({"an_option_of_tomorrow": 1}, None, "peft"),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, None, "both"),
    "float8_e4m3": ({}, all_as(torch.float8_e4m3fn), "both"),
    "float8_e5m2": ({}, all_as(torch.float8_e5m2), "both"),
    "float64": ({}, all_as(torch.float64), "both"),
    "float16": ({}, all_as(torch.float16), "both"),
    "bfloat16": ({}, all_as(torch.bfloat16), "both"),
}


def by_diffusers(folder):
    pipe = tiny_pipeline()
    pipe.load_lora_weights(folder, weight_name=DIFFUSERS_FILE)
    return without_gradient(pipe.transformer)


def by_peft(folder):
    return without_gradient(PeftModel.from_pretrained(tiny_transformer(), folder))


def by_us(folder):
    transformer = tiny_transformer()
    add_lora(transformer, read_lora(folder), "teacher_0")
    transformer.set_adapter("teacher_0")
    return without_gradient(transformer)


def without_gradient(transformer):
    transformer.requires_grad_(False)  # what requires a gradient decides which kernel multiplies the matrices
    with torch.no_grad():
        return velocity(transformer, tiny_inputs())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("case", "form"),
    [(case, form) for case, (_, _, forms) in ODD.items() for form in WRITERS if forms in (form, "both")],
)
def test_what_is_odd_but_right(tmp_path, case, form):
    options, change, _ = ODD[case]
    WRITERS[form](tmp_path, options, change=change)
    expected = {"peft": by_peft, "diffusers": by_diffusers}[form](tmp_path)
    assert (expected - without_gradient(tiny_transformer())).abs().mean() > 1e-3
    assert torch.equal(by_us(tmp_path), expected)


@pytest.mark.parametrize("raw", ["null", " null ", ""])
def test_metadata_that_says_nothing(tmp_path, raw):
    diffusers_lora(tmp_path, raw=raw)
    expected = by_diffusers(tmp_path)
    assert torch.equal(by_us(tmp_path), expected)
    assert torch.equal(by_diffusers(diffusers_lora(tmp_path / "none", metadata=False)), expected)


@pytest.mark.filterwarnings("ignore")
def test_a_runtime_config_is_no_part_of_what_is_converted(tmp_path):
    peft_lora(tmp_path / "source", {"runtime_config": {"ephemeral_gpu_offload": True}})
    convert_lora(tmp_path / "source", tmp_path / "there")
    assert torch.equal(by_diffusers(tmp_path / "there"), by_peft(tmp_path / "source"))
