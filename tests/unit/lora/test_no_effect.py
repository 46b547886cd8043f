# SPDX-License-Identifier: Apache-2.0
"""A LoRA that changes nothing is told: when it is a teacher, and when it is saved."""

import logging

import pytest
import torch
from peft import LoraConfig

from tests.support.tiny import SD3_TARGETS, random_lora, save_diffusers_lora, tiny_inputs, tiny_transformer, velocity
from trl_diffusion_opd.lora.adapters import has_no_effect, lora_state_dict, save_lora
from trl_diffusion_opd.teachers.loading import load_teachers


A, B = "lora_A.weight", "lora_B.weight"


def zeroed(state_dict, *ends):
    """A copy in which the tensors whose names end so are zero."""
    return {name: tensor * (not name.endswith(ends)) for name, tensor in state_dict.items()}


def test_has_no_effect():
    _, lora = random_lora()
    assert not has_no_effect(lora)
    assert has_no_effect(zeroed(lora, B))
    assert has_no_effect(zeroed(lora, A))
    assert has_no_effect({f"transformer.{name}": tensor for name, tensor in zeroed(lora, B).items()})
    # In each module one of them.
    names = ("to_q.lora_A.weight", "to_k.lora_B.weight", "to_v.lora_A.weight")
    assert not has_no_effect(zeroed(lora, *names))
    few = {name: tensor for name, tensor in lora.items() if ".to_q." in name or ".to_k." in name or ".to_v." in name}
    assert has_no_effect(zeroed(few, *names))
    assert not has_no_effect(zeroed(few, *names[:2]))
    # One value is enough.
    almost = zeroed(lora, B)
    almost["transformer_blocks.1.attn.to_k.lora_B.weight"][3, 2] = 1e-30
    assert not has_no_effect(almost)
    assert not has_no_effect({})


@pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor.s. have invalid shape")
def test_has_no_effect_with_more_than_matrices():
    _, lora = random_lora(lora_bias=True)
    assert not has_no_effect(zeroed(lora, B))
    assert has_no_effect(zeroed(lora, B, "lora_B.bias"))
    _, lora = random_lora(use_dora=True)
    assert not has_no_effect(zeroed(lora, B))
    alpha = {"transformer_blocks.0.attn.to_k.alpha": torch.tensor(8.0)}
    assert has_no_effect(zeroed(random_lora()[1], B) | alpha)


def test_has_no_effect_without_a_factor():
    _, lora = random_lora()
    modules = {name.rpartition(".lora_")[0] for name in lora}
    assert has_no_effect(lora, dict.fromkeys(modules, 0.0))
    assert not has_no_effect(lora, dict.fromkeys(modules, 2.0))
    assert not has_no_effect(lora, dict.fromkeys(modules, 0.0) | {"transformer_blocks.0.attn.to_k": 2.0})


@pytest.mark.parametrize("kind", ["zero B", "zero A", "zero alpha", "trained"])
def test_a_teacher(tmp_path, caplog, kind):
    config, lora = random_lora(alpha=0 if kind == "zero alpha" else 8)
    lora = {"zero B": zeroed(lora, B), "zero A": zeroed(lora, A)}.get(kind, lora)
    save_diffusers_lora(tmp_path, config, lora)
    transformer = tiny_transformer()
    expected = velocity(transformer, tiny_inputs())
    with caplog.at_level(logging.WARNING, "trl_diffusion_opd"):
        load_teachers({"ocr": str(tmp_path)}, transformer, guidance_scale=1.0, show_progress=False)
    transformer.set_adapter("teacher_0")
    changes = not torch.equal(velocity(transformer, tiny_inputs()), expected)
    warned = [record.getMessage() for record in caplog.records if record.name.startswith("trl_diffusion_opd")]
    assert changes == (kind == "trained")
    assert (
        warned == []
        if changes
        else warned
        == [
            f"teacher 'ocr' ({tmp_path}): the LoRA changes nothing, all its updates `B @ A` are zero: the student would only "
            "learn to be the base. Pass one that was trained."
        ]
    )


def test_saving(tmp_path, caplog):
    transformer = tiny_transformer()
    transformer.add_adapter(LoraConfig(r=4, target_modules=SD3_TARGETS))
    message = (
        f"The LoRA written to {str(tmp_path / 'x.safetensors')!r} changes nothing: all its updates `B @ A` are zero."
    )
    with caplog.at_level(logging.WARNING, "trl_diffusion_opd"):
        save_lora(tmp_path, transformer, weight_name="x.safetensors")
        assert [record.getMessage() for record in caplog.records] == [f"{message} Train it longer."]
        caplog.clear()
        # What counts is what is written, here an average, and not the live weights.
        average = {name: torch.ones_like(tensor) for name, tensor in lora_state_dict(transformer).items()}
        save_lora(tmp_path, transformer, state_dict=average)
        assert caplog.records == []
        for tensor in lora_state_dict(transformer).values():
            tensor.data.fill_(0.5)
        save_lora(tmp_path, transformer)
        assert caplog.records == []
        save_lora(tmp_path, transformer, state_dict=zeroed(average, B), weight_name="x.safetensors")
        assert [record.getMessage() for record in caplog.records] == [f"{message} Train it longer."]
