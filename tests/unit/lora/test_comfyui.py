# SPDX-License-Identifier: Apache-2.0
"""LoRAs for ComfyUI: its rule of scaling gives what diffusers gives, and nothing is lost on the way back."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from tests.support.lora_files import DIFFUSERS_FILE
from tests.support.tiny import (
    random_lora,
    save_diffusers_lora,
    save_peft_lora,
    tiny_inputs,
    tiny_pipeline,
    tiny_transformer,
    velocity,
)
from trl_diffusion_opd.cli.main import main
from trl_diffusion_opd.lora.convert import convert_lora
from trl_diffusion_opd.lora.files import read_lora
from trl_diffusion_opd.lora.fingerprints import lora_sha256


COMFYUI_FILE = "comfyui_lora.safetensors"
VARIANTS = {
    "plain": {"rank": 4, "alpha": 8},
    "patterns": {"rank_pattern": {"attn.to_k": 2, "attn.to_q": 6}, "alpha_pattern": {"attn.to_q": 3, "to_out.0": 1}},
    "rslora": {"use_rslora": True, "rank_pattern": {"attn.to_k": 3}},
    "negative": {"alpha": -3},
}


def velocity_of(transformer):
    transformer.requires_grad_(False)
    with torch.no_grad():
        return velocity(transformer, tiny_inputs())


def by_diffusers(folder):
    pipe = tiny_pipeline()
    pipe.load_lora_weights(folder, weight_name=DIFFUSERS_FILE)
    return velocity_of(pipe.transformer)


def by_comfyui(file):
    """ComfyUI's rule: `alpha / rank`, and 1 where there is no alpha, into the weights; every tensor must be used."""
    lora, used = load_file(file), set()
    transformer = tiny_transformer()
    for name, module in transformer.named_modules():
        key = f"transformer.{name}"
        alpha = lora[f"{key}.alpha"].item() if f"{key}.alpha" in lora else None
        if f"{key}.lora_B.weight" in lora:
            up, down = lora[f"{key}.lora_B.weight"], lora[f"{key}.lora_A.weight"]
            scale = 1.0 if alpha is None else alpha / down.shape[0]
            module.weight.data += scale * torch.mm(up.flatten(start_dim=1), down.flatten(start_dim=1))
            used |= {f"{key}.lora_B.weight", f"{key}.lora_A.weight"} | ({f"{key}.alpha"} & lora.keys())
    assert used == lora.keys()
    return velocity_of(transformer)


@pytest.mark.parametrize("variant", VARIANTS)
def test_comfyui_applies_what_diffusers_applies(tmp_path, variant):
    source = save_diffusers_lora(tmp_path / "source", *random_lora(seed=1, **VARIANTS[variant]))
    expected = by_diffusers(source)
    file = convert_lora(source, tmp_path / "comfyui", "comfyui")
    assert file == tmp_path / "comfyui" / COMFYUI_FILE
    torch.testing.assert_close(by_comfyui(file), expected, atol=3e-6, rtol=0)
    # What this is good for: without alpha tensors the strength would be another.
    assert (by_comfyui(source / DIFFUSERS_FILE) - expected).abs().mean() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("save", [save_diffusers_lora, save_peft_lora])
def test_there_and_back(tmp_path, save, variant):
    original = save(tmp_path / "original", *random_lora(seed=1, **VARIANTS[variant]))
    convert_lora(original, tmp_path / "source", "diffusers")
    convert_lora(tmp_path / "source", tmp_path / "comfyui", "comfyui")
    convert_lora(tmp_path / "comfyui" / COMFYUI_FILE, tmp_path / "back", "diffusers")
    # The bytes: tensors, options, order and all.
    assert (tmp_path / "back" / DIFFUSERS_FILE).read_bytes() == (tmp_path / "source" / DIFFUSERS_FILE).read_bytes()
    assert lora_sha256(read_lora(tmp_path / "comfyui" / COMFYUI_FILE)) == lora_sha256(read_lora(original))


def test_without_the_metadata_the_alphas_are_enough(tmp_path):
    """A program that rewrites the file drops the metadata."""
    source = save_diffusers_lora(tmp_path / "source", *random_lora(seed=1, **VARIANTS["patterns"]))
    tensors = load_file(convert_lora(source, tmp_path / "comfyui", "comfyui"))
    save_file(tensors, tmp_path / "bare.safetensors")
    convert_lora(tmp_path / "bare.safetensors", tmp_path / "back", "diffusers")
    assert torch.equal(by_diffusers(tmp_path / "back"), by_diffusers(source))


def test_tensors_stay_as_they_are(tmp_path):
    config, state_dict = random_lora(seed=1)
    halved = {name: tensor.bfloat16() for name, tensor in state_dict.items()}
    source = save_diffusers_lora(tmp_path / "source", config, halved)
    tensors = load_file(convert_lora(source, tmp_path / "comfyui", "comfyui"))
    alphas = {name: tensors.pop(name) for name in list(tensors) if name.endswith(".alpha")}
    assert {(float(alpha), alpha.dtype, alpha.ndim) for alpha in alphas.values()} == {(8.0, torch.float32, 0)}
    assert len(alphas) == len(tensors) / 2
    assert all(torch.equal(tensors[f"transformer.{name}"], tensor) for name, tensor in halved.items())


@pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor.s. have invalid shape")
@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_refuses_what_comfyui_would_apply_otherwise(tmp_path, option):
    source = save_diffusers_lora(tmp_path / "source", *random_lora(**{option: True}))
    with pytest.raises(ValueError, match=rf"`{option}=True` cannot be written for ComfyUI.*Convert it to 'diffusers'"):
        convert_lora(source, tmp_path / "comfyui", "comfyui")
    assert not (tmp_path / "comfyui").exists()


def test_the_folder_names_the_file(tmp_path):
    source = save_diffusers_lora(tmp_path / "source", *random_lora())
    convert_lora(source, tmp_path / "comfyui", "comfyui")
    with pytest.raises(FileNotFoundError, match=rf"Pass one of \['{COMFYUI_FILE}'\] as `weight_name`"):
        convert_lora(tmp_path / "comfyui", tmp_path / "back")
    assert convert_lora(tmp_path / "comfyui", tmp_path / "back", "diffusers", weight_name=COMFYUI_FILE).is_file()


def test_the_command(tmp_path, capsys):
    source = save_diffusers_lora(tmp_path / "source", *random_lora())
    main(["convert", str(source), str(tmp_path / "comfyui"), "--to", "comfyui"])
    assert capsys.readouterr().out == f"{tmp_path / 'comfyui' / COMFYUI_FILE}\n"


def test_diffusers_takes_no_alpha_tensors(tmp_path):
    """Why they are not in the file that a run saves: the stock pipeline would refuse it."""
    source = save_diffusers_lora(tmp_path / "source", *random_lora())
    file = convert_lora(source, tmp_path / "comfyui", "comfyui")
    with pytest.raises(ValueError, match="Make sure all LoRA param names contain `'lora'` substring"):
        StableDiffusion3Pipeline.load_lora_weights(tiny_pipeline(), file.parent, weight_name=COMFYUI_FILE)
