# SPDX-License-Identifier: Apache-2.0
"""LoRAs of kohya, ComfyUI and ai-toolkit give the velocity that diffusers' own loader gives, or are refused."""

import random
import re

import pytest
import torch
from safetensors.torch import save_file

from tests.support.foreign_files import (
    ORIGINALS,
    SD3_ORIGINALS,
    dotted,
    draw,
    kohya,
    modules_of,
    read,
    shapes_of,
    stock_velocity,
    updates_of,
    velocity_with,
)
from tests.support.tiny_transformers import BUILDERS, linear_layers, pipeline_class, tiny_transformer_of, velocity_of
from trl_diffusion_opd.lora.files import read_lora
from trl_diffusion_opd.lora.names import TABLES
from trl_diffusion_opd.models.sd3 import StableDiffusion3


FUSED = {name: shape for name, shape in SD3_ORIGINALS.items() if name.endswith("qkv")}


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-6 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("alpha", [True, False])
@pytest.mark.parametrize("family", ORIGINALS)
def test_kohya(tmp_path, family, alpha):
    tensors = kohya(ORIGINALS[family], alpha=alpha)
    found = velocity_with(family, read(family, tensors, tmp_path))
    assert_close(found, stock_velocity(family, tensors))
    base = velocity_of(family, tiny_transformer_of(family))
    assert (found - base).abs().mean() > 0.02


@pytest.mark.parametrize("family", ["Flux2KleinPipeline", "ZImagePipeline", "QwenImagePipeline"])
def test_ai_toolkit(tmp_path, family):
    shapes = {name: shape for name, shape in ORIGINALS[family].items() if not name.endswith(("attention.qkv", ".out"))}
    tensors = dotted(shapes)
    assert_close(velocity_with(family, read(family, tensors, tmp_path)), stock_velocity(family, tensors))


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer."])
def test_names_of_diffusers_with_alpha(tmp_path, family, prefix):
    """Every linear layer; against the same tensors without a prefix, loaded by diffusers with alpha in them."""
    tensors = dotted(shapes_of(family), prefix, alpha=True)
    if family == "Flux2KleinPipeline":  # not read under names of other programs, see `names.py`
        tensors = {name: tensor for name, tensor in tensors.items() if "norm_out" not in name}
    plain = {}
    for name, tensor in tensors.items():
        module = name.removeprefix(prefix).rpartition(".lora_")[0]
        if name.endswith("lora_B.weight"):
            plain[f"transformer.{module}.lora_B.weight"] = (
                tensor * tensors[f"{prefix}{module}.alpha"] / tensor.shape[1]
            )
        elif name.endswith("lora_A.weight"):
            plain[f"transformer.{module}.lora_A.weight"] = tensor
    transformer = tiny_transformer_of(family)
    # As a prefix of its own: the pipelines' converters do not pass on all of these modules.
    transformer.load_lora_adapter(plain, prefix="transformer", adapter_name="stock")
    weights = read(family, tensors, tmp_path)
    assert modules_of(weights) == {
        name.removesuffix(".alpha").removeprefix(prefix) for name in tensors if "alpha" in name
    }
    assert_close(velocity_with(family, weights), velocity_of(family, transformer))


def test_z_image_with_fused_attention(tmp_path):
    """diffusers passes these names on unsplit, and its loader then leaves them out."""
    family, name = "ZImagePipeline", "layers.0.attention.qkv"
    tensors = dotted({name: (96, 32)}, alpha=True)
    weights = read(family, tensors, tmp_path)
    up, down = (tensors[f"diffusion_model.{name}.lora_{kind}.weight"] for kind in "BA")
    parts = dict(zip((f"layers.0.attention.to_{x}" for x in "qkv"), (0.75 * up @ down).chunk(3), strict=True))
    for module, update in updates_of(weights, parts).items():
        torch.testing.assert_close(update, parts[module].double(), atol=1e-7, rtol=1e-6)
    as_kohya = {n.replace("diffusion_model.", "").replace(".", "_", 3): t for n, t in tensors.items()}
    as_kohya = {
        f"lora_unet_{n}".replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for n, t in as_kohya.items()
    }
    assert_close(velocity_with(family, weights), stock_velocity(family, as_kohya))


def test_flux_single_blocks_of_the_real_width(tmp_path):
    """diffusers takes `linear1` only at this width: queries, keys and values of 3072 and the MLP of 12288."""
    tensors = kohya({"single_blocks.3.linear1": (21504, 16)})
    weights = read("FluxPipeline", tensors, tmp_path)
    expected = pipeline_class("FluxPipeline").lora_state_dict(dict(tensors))
    modules = {name.removeprefix("transformer.").rpartition(".lora_")[0] for name in expected}
    assert modules == modules_of(weights) and len(modules) == 4
    for module, update in updates_of(weights, modules).items():
        up, down = (expected[f"transformer.{module}.lora_{kind}.weight"] for kind in "BA")
        torch.testing.assert_close(update.float(), up @ down, atol=1e-7, rtol=1e-5)


def test_xlabs(tmp_path):
    block = "double_blocks.0.processor"
    shapes = {f"{block}.qkv_lora1": 96, f"{block}.proj_lora1": 32, f"{block}.qkv_lora2": 96, f"{block}.proj_lora2": 32}
    tensors = {}
    for name, rows in shapes.items():
        tensors |= {f"{name}.down.weight": draw(3, 32, seed=rows), f"{name}.up.weight": draw(rows, 3, seed=1)}
    expected = stock_velocity("FluxPipeline", tensors)
    assert_close(velocity_with("FluxPipeline", read("FluxPipeline", tensors, tmp_path)), expected)


def test_alphas_and_tensors_stay_as_they_are(tmp_path):
    tensors = {name: t.bfloat16() if t.ndim else t for name, t in kohya(SD3_ORIGINALS).items()}
    weights = read("StableDiffusion3Pipeline", tensors, tmp_path)
    up = tensors["lora_unet_joint_blocks_1_x_block_attn_proj.lora_up.weight"]
    assert torch.equal(weights.state_dict["transformer_blocks.1.attn.to_out.0.lora_B.weight"], up)
    queries = weights.state_dict["transformer_blocks.0.attn2.to_q.lora_B.weight"]
    assert torch.equal(queries, tensors["lora_unet_joint_blocks_0_x_block_attn2_qkv.lora_up.weight"][:32])
    assert {tensor.dtype for tensor in weights.state_dict.values()} == {torch.bfloat16}
    assert weights.config.rank_pattern and weights.config.alpha_pattern


def test_a_top_level_module_is_not_that_of_the_blocks(tmp_path):
    """In a list of targets `proj_out` would also be that of each single block, for which the file has nothing."""
    weights = read("FluxPipeline", dotted({"final_layer.linear": (16, 32), "img_in": (32, 16)}), tmp_path)
    assert modules_of(weights) == {"proj_out", "x_embedder"}
    velocity_with("FluxPipeline", weights)


@pytest.mark.parametrize("family", BUILDERS)
def test_every_linear_layer_has_a_name(family):
    table, without = TABLES[family], {"norm_out.linear"} if family == "Flux2KleinPipeline" else set()
    layers = linear_layers(family)
    assert {name for name in layers if table.original(name) is None} == without
    for name in layers.keys() - without:
        place = table.original(name)
        assert name in place.modules and sum(place.shares) >= len(place.modules)
        for form in (place.original, place.original.replace(".", "_")):
            assert table.find(form) == place
        for form in (name, name.replace(".", "_")):
            assert name in table.find(form).modules


FAMILY = "StableDiffusion3Pipeline"
PROJ = "lora_unet_joint_blocks_0_x_block_attn_proj"
REFUSALS = {
    "diff": ({f"{PROJ}.diff": draw(32, 32)}, "which changes weights directly and is no product.*Merge it"),
    "diff_b": ({f"{PROJ}.diff_b": draw(32)}, "which changes weights directly"),
    "set_weight": ({"diffusion_model.final_layer.linear.set_weight": draw(4)}, "which changes weights directly"),
    "norm": ({"lora_unet_norm.w_norm": draw(4)}, "which changes weights directly"),
    "convolution": ({f"{PROJ}.lora_mid.weight": draw(2, 2, 3, 3)}, "a decomposition for convolutions"),
    "tucker": ({f"{PROJ}.hada_t1": draw(2, 2, 3, 3)}, "a decomposition for convolutions"),
    "tucker LoKr": ({f"{PROJ}.lokr_t2": draw(2, 2, 3, 3)}, "a decomposition for convolutions"),
    "text encoder": ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": draw(1)}, "also changes a text encoder"),
    "T5": ({"text_encoders.t5xxl.transformer.x.lora_A.weight": draw(2, 4)}, "also changes a text encoder"),
    "unknown kind": (
        {f"{PROJ}.glora_a1": draw(2, 4)},
        "which is no tensor of a LoRA, LoHa, LoKr or DoRA that is known",
    ),
    "no kind": ({"something": draw(2)}, "which is no tensor of a LoRA"),
    "unknown module": (
        {"lora_unet_joint_blocks_0_x_block_other.alpha": draw(1)},
        "no module of this family is called",
    ),
    "other family": ({"lora_unet_double_blocks_0_img_attn_proj.alpha": draw(1)}, "trained for another base model"),
    "pattern": ({"diffusion_model.joint_blocks.{}.x_block.attn.proj.alpha": draw(1)}, "no module of this family"),
    "number": ({"diffusion_model.joint_blocks.007.x_block.attn.proj.alpha": draw(1)}, "no module of this family"),
    "half": (
        {f"{PROJ.replace('proj', 'qkv')}.lora_up.weight": draw(96, 2)},
        "its matrices are lora_up, which is not one LoRA",
    ),
    "alpha alone": (
        {f"{PROJ.replace('proj', 'qkv')}.alpha": draw(1)},
        "its matrices are missing, which is not one LoRA",
    ),
    "two kinds": ({f"{PROJ}.hada_w1_a": draw(32, 2)}, "hada_w1_a, lora_down, lora_up, which is not one"),
    "two alphas": ({f"{PROJ}.alpha": draw(2)}, r"its alpha has the shape \[2\]"),
    "two names": (dotted({"joint_blocks.0.x_block.attn.proj": (32, 32)}), "holds two LoRAs of 'transformer_blocks.0"),
    "kind twice": ({f"{PROJ}.lora_A.weight": draw(1, 32)}, "twice, under two names"),
    "two ranks": ({f"{PROJ}.lora_up.weight": draw(32, 3)}, r"shapes \[32, 3\] and \[1, 32\], and so two ranks"),
    "rows": (
        kohya({"joint_blocks.0.x_block.attn.qkv": (97, 32)}),
        "its 97 rows cannot be shared out to 3 modules",
    ),
    "NaN": ({f"{PROJ}.alpha": torch.tensor(torch.nan)}, "hold NaN or infinite values"),
    "huge alpha": ({f"{PROJ}.alpha": torch.tensor(1e30)}, "it is multiplied by 1e.30, but more than 65504"),
    "no number of dimensions": ({f"{PROJ}.lora_up.weight": torch.tensor(1.0)}, "only those of linear layers"),
    "integers": ({f"{PROJ}.lora_up.weight": torch.ones(32, 1, dtype=torch.int8)}, "are not floating-point weights"),
    "convolution's shape": ({f"{PROJ}.lora_down.weight": draw(1, 32, 3, 3)}, "only those of linear layers"),
    "magnitudes of the inputs": (
        {f"{PROJ}.dora_scale": draw(1, 32)},
        r"only magnitudes of the 32 outputs \(\[32, 1\]\)",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(tmp_path, case):
    extra, match = REFUSALS[case]
    right = kohya({"joint_blocks.0.x_block.attn.proj": (32, 32)})
    with pytest.raises(ValueError, match=rf"^mine: .*{match}") as caught:
        read(FAMILY, right | extra, tmp_path)
    assert "\n" not in str(caught.value)


def test_magnitudes_of_some_modules_alone(tmp_path):
    tensors = kohya(FUSED) | {"lora_unet_joint_blocks_0_x_block_attn_qkv.dora_scale": draw(96, 1).abs()}
    with pytest.raises(ValueError, match=r"has magnitudes \(DoRA\), but none for 'lora_unet_joint_blocks_0_context_"):
        read(FAMILY, tensors, tmp_path)


def test_without_a_family(tmp_path):
    save_file(kohya(FUSED), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="neither in the diffusers format.*convert --base.*`save_lora_weights`"):
        read_lora(tmp_path / "lora.safetensors")


def test_options_of_diffusers_under_other_names(tmp_path):
    """Which of the two scalings would count?"""
    metadata = {"lora_adapter_metadata": '{"transformer.r": 4}'}
    save_file(kohya(FUSED), tmp_path / "lora.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="mine: 'lora.safetensors' has options of diffusers in its metadata.*Remove"):
        read_lora(tmp_path / "lora.safetensors", owner="mine", convert=StableDiffusion3().convert_lora)


def test_the_family_converts(tmp_path):
    save_file(kohya(FUSED), tmp_path / "lora.safetensors")
    weights = read_lora(tmp_path / "lora.safetensors", convert=StableDiffusion3().convert_lora)
    assert weights.saved_format == "other" and "transformer_blocks.0.attn2.to_k" in modules_of(weights)


def test_a_family_without_names(tmp_path):
    class Other(StableDiffusion3):
        pipeline_class = type("OtherPipeline", (), {})

    save_file(kohya(FUSED), tmp_path / "lora.safetensors")
    with pytest.raises(
        ValueError, match="modules of a OtherPipeline are not known, only those of StableDiffusion3Pip"
    ):
        read_lora(tmp_path / "lora.safetensors", owner="mine", convert=Other().convert_lora)


@pytest.mark.parametrize("seed", range(40))
def test_damage_never_passes_silently(tmp_path, seed):
    """A tensor renamed, added, removed or of another shape: one line that refuses it, or the file is right."""
    generator = random.Random(seed)
    family = generator.choice(list(BUILDERS))
    shapes = SD3_ORIGINALS if family == FAMILY else ORIGINALS[family]
    tensors = generator.choice((kohya, dotted))(dict(generator.sample(sorted(shapes.items()), 3)))
    name = generator.choice(sorted(tensors))
    tensor, alone = tensors[name], "alpha" in name
    damage = generator.choice(("rename", "add", "remove", "shape", "empty", "kind"))
    junk = "".join(generator.choice("abz_.0123AB-{}é") for _ in range(generator.randint(1, 12)))
    if damage == "rename":
        cut = generator.randrange(len(name))
        tensors[name[:cut] + junk + name[cut:]] = tensors.pop(name)
    elif damage == "add":
        tensors[generator.choice((junk, f"{name}.{junk}", f"lora_unet_{junk}.lora_up.weight"))] = tensor.clone()
    elif damage == "remove":
        del tensors[name]
    elif damage == "shape":
        wrong = [size + generator.choice((-1, 1, 40)) for size in tensor.shape] or [2]
        tensors[name] = draw(*(max(size, 0) for size in wrong))
    elif damage == "empty":
        tensors[name] = torch.zeros(0)
    else:
        end = generator.choice((".hada_w1_a", ".lokr_w1", ".lokr_w2_b", ".diff", ".dora_scale", ".lora_B.bias"))
        tensors[name.split(".lora_")[0].removesuffix(".alpha") + end] = tensors.pop(name)
    transformer = tiny_transformer_of(family)
    if damage == "remove" and alone:
        velocity_with(family, read(family, tensors, tmp_path), transformer)
        return
    with pytest.raises(ValueError) as caught:
        velocity_with(family, read(family, tensors, tmp_path), transformer)
    assert "\n" not in str(caught.value) and re.match("mine: ", str(caught.value))
