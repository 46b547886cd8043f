# SPDX-License-Identifier: Apache-2.0
"""LoHa, LoKr and DoRA of other programs: PEFT's own layers are the reference, and sums by hand."""

import json
import math
import shutil

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict

from tests.support.foreign_files import (
    draw,
    merged_velocity,
    modules_of,
    read,
    stock_velocity,
    updates_of,
    velocity_with,
)
from tests.support.tiny_transformers import BUILDERS, linear_layers, tiny_transformer_of, velocity_of
from trl_diffusion_opd.lora.adapters import add_lora
from trl_diffusion_opd.lora.files import read_lora
from trl_diffusion_opd.lora.products import loha, lokr


# Two square attention projections and one more layer of each family.
TARGETS = {
    "StableDiffusion3Pipeline": [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.attn.add_k_proj",
        "transformer_blocks.0.ff.net.2",
    ],
    "FluxPipeline": [
        "transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.1.attn.to_k",
        "single_transformer_blocks.0.proj_mlp",
    ],
    "Flux2KleinPipeline": [
        "transformer_blocks.0.attn.add_q_proj",
        "single_transformer_blocks.0.attn.to_out",
        "single_transformer_blocks.1.attn.to_qkv_mlp_proj",
    ],
    "ZImagePipeline": ["layers.0.attention.to_q", "noise_refiner.0.attention.to_out.0", "layers.1.adaLN_modulation.0"],
    "QwenImagePipeline": [
        "transformer_blocks.0.attn.to_v",
        "transformer_blocks.1.img_mlp.net.0.proj",
        "transformer_blocks.0.txt_mod.1",
    ],
}


def patterns(family):
    return {"rank_pattern": {TARGETS[family][1]: 2}, "alpha_pattern": {TARGETS[family][2]: 9}}


def peft_model(family, kind):
    """A model with random products of PEFT, of two ranks and alphas."""
    options = {"r": 3, "alpha": 6, "target_modules": TARGETS[family], "init_weights": False, **patterns(family)}
    if kind == "loha":
        config = LoHaConfig(**options)
    else:
        config = LoKrConfig(**options, decompose_both=kind == "lokr of four", decompose_factor=4)
    model = get_peft_model(tiny_transformer_of(family), config)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad and ("hada" in name or "lokr" in name):
            parameter.data = draw(*parameter.shape, seed=index, scale=0.5)
    return model.eval()


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, atol=3e-6 * float(expected.abs().max()), rtol=0)


def as_lycoris(model, prefix, flat):
    """The tensors as LyCORIS writes them, with PEFT's alphas."""
    tensors = {}
    for name, tensor in get_peft_model_state_dict(model).items():
        module, _, kind = name.removeprefix("base_model.model.").rpartition(".")
        form = f"{prefix}{module.replace('.', '_') if flat else module}"
        tensors[f"{form}.{kind}"] = tensor
        layer = model.base_model.model.get_submodule(module)
        tensors[f"{form}.alpha"] = torch.tensor(float(layer.alpha["default"]))
    return tensors


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr of four"])
@pytest.mark.parametrize("family", TARGETS)
def test_velocity_is_that_of_peft(tmp_path, family, kind):
    model = peft_model(family, kind)
    expected = velocity_of(family, model)
    assert (expected - velocity_of(family, tiny_transformer_of(family))).abs().mean() > 0.005
    model.save_pretrained(tmp_path / "peft")
    saved = read_lora(tmp_path / "peft")
    assert saved.saved_format == "peft" and modules_of(saved) == set(TARGETS[family])
    assert_close(velocity_with(family, saved), expected)
    for prefix, flat in {"lycoris_": True, "lora_unet_": True, "diffusion_model.": False}.items():
        weights = read(family, as_lycoris(model, prefix, flat), tmp_path)
        assert_close(velocity_with(family, weights), expected)


@pytest.mark.parametrize("family", ["Flux2KleinPipeline", "ZImagePipeline"])
def test_velocity_is_that_of_diffusers(tmp_path, family):
    """The two families whose loader takes LoKr."""
    tensors = as_lycoris(
        peft_model(family, "lokr"), "lycoris_" if "Flux" in family else "diffusion_model.", "Flux" in family
    )
    assert_close(velocity_with(family, read(family, tensors, tmp_path)), stock_velocity(family, tensors))


def test_products_in_double():
    """The factors' product is PEFT's `get_delta_weight`, as exactly as float64 has it."""
    for kind in ("loha", "lokr", "lokr of four"):
        model = peft_model("ZImagePipeline", kind).double()
        for module in TARGETS["ZImagePipeline"]:
            layer = model.base_model.model.get_submodule(module)
            own = {n.rpartition(".")[2]: getattr(layer, n.rpartition(".")[2]) for n in layer.adapter_layer_names}
            factors = {name: entry["default"].data for name, entry in own.items() if "default" in entry}
            if kind == "loha":
                pairs = [(factors[f"hada_w{n}_a"], factors[f"hada_w{n}_b"]) for n in (1, 2)]
                up, down = loha(*pairs)
            else:
                up, down = lokr(*(tuple(t for name, t in sorted(factors.items()) if f"w{n}" in name) for n in (1, 2)))
            delta = layer.get_delta_weight("default")
            assert down.dtype == torch.float64 and up.shape[1] < min(delta.shape)
            torch.testing.assert_close(layer.scaling["default"] * up @ down, delta, atol=1e-12, rtol=1e-9)


def test_a_lokr_of_a_fused_projection(tmp_path):
    """A Kronecker product over queries, keys and values cannot be split; as a LoRA it can."""
    first, second = draw(12, 4), (draw(8, 2), draw(2, 8))
    name = "diffusion_model.double_blocks.0.txt_attn.qkv"
    tensors = {
        f"{name}.lokr_w1": first,
        f"{name}.lokr_w2_a": second[0],
        f"{name}.lokr_w2_b": second[1],
        f"{name}.alpha": torch.tensor(3.0),
    }
    delta = 3 / 2 * torch.kron(first, second[0] @ second[1])
    modules = [f"transformer_blocks.0.attn.{x}" for x in ("add_q_proj", "add_k_proj", "add_v_proj")]
    expected = dict(zip(modules, delta.chunk(3), strict=True))
    for family in ("Flux2KleinPipeline", "FluxPipeline"):
        weights = read(family, tensors, tmp_path)
        assert modules_of(weights) == set(modules)
        assert_close(velocity_with(family, weights), merged_velocity(family, expected))


def test_without_alpha_nothing_is_scaled(tmp_path):
    halves = [draw(32, 3, seed=1), draw(3, 32, seed=2), draw(32, 3, seed=3), draw(3, 32, seed=4)]
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    module = "transformer_blocks.0.attn.to_q"
    tensors = {f"lycoris_{module.replace('.', '_')}.{name}": half for name, half in zip(names, halves, strict=True)}
    weights = read("QwenImagePipeline", tensors, tmp_path)
    (update,) = updates_of(weights, [module]).values()
    expected = (halves[0] @ halves[1]) * (halves[2] @ halves[3])
    torch.testing.assert_close(update.float(), expected, atol=1e-6, rtol=1e-5)
    assert weights.config.r == 9 == weights.config.lora_alpha


def test_small_full_factors_have_no_alpha(tmp_path):
    """LyCORIS divides by a rank only where a factor has one."""
    family, module = "ZImagePipeline", "layers.1.feed_forward.w1"
    first, second = draw(85, 2), draw(1, 16)
    tensors = {f"{module}.lokr_w1": first, f"{module}.lokr_w2": second, f"{module}.alpha": torch.tensor(7.0)}
    (update,) = updates_of(read(family, tensors, tmp_path), [module]).values()
    torch.testing.assert_close(update.float(), torch.kron(first, second), atol=1e-6, rtol=1e-5)


def dora_reference(family, module, up, down, scale, magnitude):
    weight = tiny_transformer_of(family).get_submodule(module).weight
    moved = weight + scale * up @ down
    return magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True) - weight


@pytest.mark.parametrize("family", BUILDERS)
def test_dora(tmp_path, family):
    """`m (W + dW) / |W + dW|`, by rows."""
    tensors, expected = {}, {}
    for index, module in enumerate(TARGETS[family]):
        rows, columns = linear_layers(family)[module].weight.shape
        up, down, magnitude = draw(rows, 2, seed=index), draw(2, columns, seed=index), 1 + draw(rows, seed=index).abs()
        flat = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{flat}.lora_up.weight": up, f"{flat}.lora_down.weight": down, f"{flat}.alpha": torch.tensor(3.0)}
        tensors[f"{flat}.dora_scale"] = magnitude[:, None] if index else magnitude
        expected[module] = dora_reference(family, module, up, down, 1.5, magnitude)
    assert_close(velocity_with(family, read(family, tensors, tmp_path)), merged_velocity(family, expected))


def test_dora_of_a_fused_projection(tmp_path):
    family, block = "StableDiffusion3Pipeline", "transformer_blocks.0.attn2"
    up, down, magnitude = draw(96, 3), draw(3, 32), 1 + draw(96).abs()
    up[:32, 0] = 0  # does not count: the magnitude does
    name = "lora_unet_joint_blocks_0_x_block_attn2_qkv"
    tensors = {
        f"{name}.lora_up.weight": up,
        f"{name}.lora_down.weight": down,
        f"{name}.dora_scale": magnitude[:, None],
    }
    expected = {
        f"{block}.to_{x}": dora_reference(family, f"{block}.to_{x}", part, down, 1.0, own)
        for x, part, own in zip("qkv", up.chunk(3), magnitude.chunk(3), strict=True)
    }
    assert_close(velocity_with(family, read(family, tensors, tmp_path)), merged_velocity(family, expected))


def test_rslora_of_peft(tmp_path):
    """Alpha over the root of the rank, which differs from module to module."""
    family = "ZImagePipeline"
    config = LoraConfig(r=4, lora_alpha=3, target_modules=TARGETS[family], use_rslora=True, **patterns(family))
    model = get_peft_model(tiny_transformer_of(family), config)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            parameter.data = draw(*parameter.shape, seed=index)
    model.save_pretrained(tmp_path)
    deltas = {
        module: alpha / math.sqrt(rank) * layer.lora_B["default"].weight.data @ layer.lora_A["default"].weight.data
        for module, rank, alpha in zip(TARGETS[family], (4, 2, 4), (3, 3, 9), strict=True)
        for layer in [model.base_model.model.get_submodule(module)]
    }
    assert_close(velocity_with(family, read_lora(tmp_path)), merged_velocity(family, deltas))


QKV = "diffusion_model.layers.0.attention.qkv"
REFUSALS = {
    "both factors full": (
        {f"{QKV}.lokr_w1": draw(12, 4), f"{QKV}.lokr_w2": draw(8, 8)},
        r"as a LoRA this LoKr of a \[96, 32\] matrix has the rank 32, and more than 16 takes more memory",
    ),
    "a LoHa of a high rank": (
        {f"{QKV}.hada_w{n}_{x}": draw(*shape) for n in (1, 2) for x, shape in (("a", (96, 5)), ("b", (5, 32)))},
        "as a LoRA this LoHa .* has the rank 25",
    ),
    "halves of two shapes": (
        {f"{QKV}.hada_w{n}_{x}": draw(*shape) for n in (1, 2) for x, shape in (("a", (90 + n, 2)), ("b", (2, 32)))},
        r"its halves have the shapes \[91, 32\] and \[92, 32\], which must be equal",
    ),
    "factors that cannot be multiplied": (
        {f"{QKV}.lokr_w1": draw(12, 4), f"{QKV}.lokr_w2_a": draw(8, 2), f"{QKV}.lokr_w2_b": draw(3, 8)},
        r"factors of the shapes \[8, 2\] and \[3, 8\] cannot be multiplied",
    ),
    "a convolution": (
        {f"{QKV}.lokr_w1": draw(12, 4), f"{QKV}.lokr_w2": draw(8, 8, 3, 3)},
        r"a factor has the shape \[8, 8, 3, 3\], but only those of linear layers",
    ),
    "a factor twice": (
        {f"{QKV}.lokr_w1": draw(12, 4), f"{QKV}.lokr_w1_a": draw(12, 1), f"{QKV}.lokr_w2": draw(8, 8)},
        "its matrices are lokr_w1, lokr_w1_a, lokr_w2, which is not one LoRA, LoHa or LoKr",
    ),
    "no matrix": (
        {f"{QKV}.lokr_w1": draw(12, 4), f"{QKV}.lokr_w2_a": draw(8, 2), f"{QKV}.lokr_w2_b": torch.tensor(1.0)},
        r"a factor has the shape \[\], but only those of linear layers",
    ),
    "an absurd size": (
        {f"{QKV}.lokr_w1": draw(600, 1), f"{QKV}.lokr_w2": draw(600, 1)},
        r"this LoKr is of a \[360000, 1\] matrix, which is larger than those of any model",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(tmp_path, case):
    tensors, match = REFUSALS[case]
    with pytest.raises(
        ValueError, match=f"mine: 'lora.safetensors' has a LoRA of '{QKV}' that cannot be used: {match}"
    ):
        read("ZImagePipeline", tensors, tmp_path)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 4}, r"'adapter_model.safetensors' has the rank 3 in '.*', but by its options the rank is 4"),
        ({"alpha": "8"}, "`lora_alpha='8'`, but it must be a finite number"),
        ({"rank_pattern": ["x"]}, r"`rank_pattern=\['x'\]`, but it must be a mapping"),
        ({"modules_to_save": ["norm"]}, "uses options that change more than LoRA matrices"),
        ({"peft_type": "OFT"}, "`peft_type='OFT'`, but only LoRA"),
        ({"peft_type": "LORA"}, "has no `lora_A` and `lora_B`|is no tensor of a PEFT LoRA|nothing of the LoRA could"),
    ],
)
def test_options_of_peft(tmp_path, options, match):
    peft_model("ZImagePipeline", "loha").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    with pytest.raises(ValueError, match=f"^mine: .*({match})"):
        add_lora(tiny_transformer_of("ZImagePipeline"), read_lora(tmp_path, owner="mine"), "teacher")


def test_without_the_options_of_peft(tmp_path):
    peft_model("ZImagePipeline", "loha").save_pretrained(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "adapter_model.safetensors", tmp_path)
    with pytest.raises(FileNotFoundError, match="'adapter_config.json', which holds their scaling"):
        read_lora(tmp_path / "adapter_model.safetensors")
