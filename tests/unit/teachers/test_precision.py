# SPDX-License-Identifier: Apache-2.0
"""LoRA teachers are kept and computed in float32, also beside a base in half precision."""

import pytest
import torch
from torch.nn import functional as F

from tests.support.tiny import (
    random_lora,
    save_diffusers_lora,
    save_peft_lora,
    tiny_inputs,
    tiny_transformer,
    velocity,
)
from trl_diffusion_opd.lora.adapters import lora_state_dict, use_adapter
from trl_diffusion_opd.teachers.loading import load_teachers


MODULE = "transformer_blocks.1.attn.to_q"


@pytest.mark.parametrize("save", [save_diffusers_lora, save_peft_lora])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_teacher_beside_a_half_precision_base(tmp_path, save, half):
    config, lora = random_lora(seed=1)
    save(tmp_path, config, {name: tensor.clone() for name, tensor in lora.items()})
    transformer = tiny_transformer().to(half)
    load_teachers({"ocr": str(tmp_path)}, transformer, guidance_scale=1.0, show_progress=False)

    # The values of the file, of which half precision would keep three digits.
    loaded = lora_state_dict(transformer, "teacher_0")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in lora.items())
    assert not any(torch.equal(tensor.to(half).float(), tensor) for tensor in lora.values())

    # The update is computed from them in float32, and only what a layer gives on is rounded.
    seen = {}
    layer = transformer.get_submodule(MODULE)
    layer.register_forward_hook(lambda _, given, result: seen.update(given=given[0], result=result))
    layer.lora_B["teacher_0"].register_forward_hook(lambda _, given, result: seen.update(update=result))
    with torch.no_grad(), use_adapter(transformer, "teacher_0"):
        velocity(transformer, tiny_inputs(dtype=half))
    lora_a, lora_b = lora[f"{MODULE}.lora_A.weight"], lora[f"{MODULE}.lora_B.weight"]
    update = F.linear(F.linear(seen["given"].float(), lora_a), lora_b)
    assert seen["update"].dtype == torch.float32
    assert torch.equal(seen["update"], update)
    base = F.linear(seen["given"], layer.base_layer.weight, layer.base_layer.bias)
    assert seen["result"].dtype == half
    assert torch.equal(seen["result"], (base + update * 2.0).to(half))
