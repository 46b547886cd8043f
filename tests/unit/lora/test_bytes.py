# SPDX-License-Identifier: Apache-2.0
"""The same LoRA is written with the same bytes, in every process."""

import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

from tests.support.lora_files import write_all
from tests.support.tiny import SD3_TARGETS, random_lora, save_peft_lora, tiny_transformer
from trl_diffusion_opd.lora.adapters import add_lora, save_lora
from trl_diffusion_opd.lora.convert import convert_lora
from trl_diffusion_opd.lora.files import LoraWeights


def test_again_and_again(tmp_path):
    """The order of the metadata is drawn anew for each file: eight in one order are chance once in 128 times."""
    written = [write_all(tmp_path / str(i)) for i in range(8)]
    assert all(files == written[0] for files in written)
    assert list(written[0]) == [
        "comfyui/comfyui_lora.safetensors",
        "diffusers/pytorch_lora_weights.safetensors",
        "peft/adapter_config.json",
        "peft/adapter_model.safetensors",
        "saved/pytorch_lora_weights.safetensors",
    ]


@pytest.mark.slow
def test_in_other_processes(tmp_path):
    program = "import sys; from pathlib import Path; from tests.support.lora_files import write_all; "
    program += "print(write_all(Path(sys.argv[1])))"
    expected = str(write_all(tmp_path / "here"))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / seed)],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("0", "1")
    ]
    for process in processes:
        written, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        assert written.strip().splitlines()[-1] == expected


def test_what_is_written_is_what_diffusers_and_peft_write(tmp_path):
    from diffusers import StableDiffusion3Pipeline

    config, state_dict = random_lora(seed=1)
    transformer = tiny_transformer()
    add_lora(transformer, LoraWeights(config, state_dict), "default")
    ours = save_lora(tmp_path / "ours", transformer)
    options = transformer.peft_config["default"].to_dict() | {"target_modules": sorted(SD3_TARGETS)}
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path / "theirs", transformer_lora_layers=state_dict, transformer_lora_adapter_metadata=options
    )
    theirs = tmp_path / "theirs" / "pytorch_lora_weights.safetensors"
    assert_same_content(ours, theirs)

    source = save_peft_lora(tmp_path / "peft", config, state_dict)
    convert_lora(source, tmp_path / "converted", "peft")
    assert_same_content(tmp_path / "converted" / "adapter_model.safetensors", source / "adapter_model.safetensors")
    assert LoraConfig.from_pretrained(tmp_path / "converted") == LoraConfig.from_pretrained(source)


def assert_same_content(found, expected):
    assert found.stat().st_size == expected.stat().st_size
    with safe_open(found, framework="pt") as ours, safe_open(expected, framework="pt") as theirs:
        assert ours.metadata() == theirs.metadata()
    found, expected = load_file(found), load_file(expected)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
