# SPDX-License-Identifier: Apache-2.0
"""Writing under the names of kohya's scripts: diffusers' converters give the same LoRA back, and so does this package."""

import math
import re

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from tests.support.foreign_files import (
    SD3_ORIGINALS,
    dotted,
    draw,
    kohya,
    modules_of,
    read,
    shapes_of,
    updates_of,
    velocity_with,
)
from tests.support.tiny import random_lora, save_diffusers_lora, save_peft_lora, tiny_pipeline
from tests.support.tiny_transformers import BUILDERS, pipeline_class, tiny_transformer_of, velocity_of
from trl_diffusion_opd.cli.main import main
from trl_diffusion_opd.lora.convert import convert_lora
from trl_diffusion_opd.lora.files import LoraWeights, read_lora
from trl_diffusion_opd.lora.fingerprints import lora_sha256
from trl_diffusion_opd.lora.names import TABLES
from trl_diffusion_opd.lora.writing import write_kohya


SD3 = "StableDiffusion3Pipeline"
FILE = "comfyui_lora.safetensors"
# Linear layers whose names diffusers' converter of LoRAs does not know, or takes at one width only.
UNKNOWN_TO_DIFFUSERS = {
    # Of the last layer it leaves out the alpha.
    "FluxPipeline": (r"single_transformer_blocks.\d.attn", "proj_mlp", "^proj_out", "^norm_out"),
    "ZImagePipeline": ("all_x_embedder", "all_final_layer"),
    "Flux2KleinPipeline": ("modulation",),
}
NOT_WRITTEN = {"Flux2KleinPipeline": ("norm_out",)}


def lora_of(family, seed=0, *, without=(), **options):
    """A LoRA of all linear layers, with random ranks and alphas or those of `options`."""
    modules = [name for name in shapes_of(family) if not any(re.search(part, name) for part in without)]
    state_dict, ranks, alphas = {}, {}, {}
    for index, module in enumerate(modules):
        rows, columns = shapes_of(family)[module]
        rank = options.get("r", 1 + (index + seed) % 3)
        state_dict[f"{module}.lora_A.weight"] = draw(rank, columns, seed=index + seed)
        state_dict[f"{module}.lora_B.weight"] = draw(rows, rank, seed=index + seed)
        ranks[f"^{module.replace('.', chr(92) + '.')}"], alphas[f"^{module.replace('.', chr(92) + '.')}"] = (
            rank,
            1 + index % 5,
        )
    patterns = {} if options else {"rank_pattern": ranks, "alpha_pattern": alphas}
    targets = "|".join(module.replace(".", r"\.") for module in modules)
    return LoraWeights(LoraConfig(target_modules=targets, **patterns, **options), state_dict)


def kohya_file(weights, family, folder):
    return write_kohya(folder, weights.state_dict, weights.config, TABLES[family])


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-6 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("options", [{}, {"r": 3, "lora_alpha": 7}, {"r": 3, "lora_alpha": 2, "use_rslora": True}])
@pytest.mark.parametrize("family", sorted(BUILDERS.keys() - {SD3}))
def test_diffusers_gives_the_same_updates(tmp_path, family, options):
    weights = lora_of(family, without=NOT_WRITTEN.get(family, ()) + UNKNOWN_TO_DIFFUSERS.get(family, ()), **options)
    file = kohya_file(weights, family, tmp_path)
    converted = pipeline_class(family).lora_state_dict(load_file(file))
    # FLUX.1's converter forgets the prefix of what is not in a block.
    converted = {name.removeprefix("transformer."): tensor for name, tensor in converted.items()}
    expected = updates_of(weights, modules_of(weights))
    assert {name.rpartition(".lora_")[0] for name in converted} == expected.keys()
    for module, update in expected.items():
        up, down = (converted[f"{module}.lora_{kind}.weight"].double() for kind in "BA")
        torch.testing.assert_close(up @ down, update, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("family", BUILDERS)
def test_there_and_back(tmp_path, family, seed):
    weights = lora_of(family, seed, without=NOT_WRITTEN.get(family, ()))
    back = read(family, load_file(kohya_file(weights, family, tmp_path)), tmp_path)
    assert back.state_dict.keys() == weights.state_dict.keys()
    for module, update in updates_of(weights, modules_of(weights)).items():
        torch.testing.assert_close(updates_of(back, [module])[module], update, atol=1e-7, rtol=1e-6)
    assert_close(velocity_with(family, back), velocity_with(family, weights))


@pytest.mark.parametrize("family", BUILDERS)
def test_with_one_alpha_the_tensors_are_the_same_to_the_bit(tmp_path, family):
    weights = lora_of(family, without=NOT_WRITTEN.get(family, ()), r=4, lora_alpha=8)
    back = read(family, load_file(kohya_file(weights, family, tmp_path)), tmp_path)
    assert back.config.r == 4 and back.config.lora_alpha == 8 and not back.config.rank_pattern
    assert back.state_dict.keys() == weights.state_dict.keys()
    assert all(torch.equal(back.state_dict[name], tensor) for name, tensor in weights.state_dict.items())


@pytest.mark.parametrize("family", BUILDERS)
def test_a_part_of_a_fused_projection(tmp_path, family):
    """Queries and values alone: the keys stay as they are, and nobody adds a LoRA of them on the way."""
    weights = lora_of(family, r=2, lora_alpha=3, without=("to_k", "add_k_proj", "linear", "ff", "mlp", "emb"))
    weights.state_dict = {name: t for name, t in weights.state_dict.items() if "to_q" in name or "to_v" in name}
    tensors = load_file(kohya_file(weights, family, tmp_path))
    back = read(family, tensors, tmp_path)
    assert lora_sha256(LoraWeights(back.config, back.state_dict)) and modules_of(back) == modules_of(weights)
    assert all(torch.equal(back.state_dict[name], tensor) for name, tensor in weights.state_dict.items())


def test_one_a_for_all_stays_one(tmp_path):
    """A fused LoRA that was split is written with its own rank again."""
    original = kohya({"layers.0.attention.qkv": (96, 32), "layers.1.attention.qkv": (96, 32)})
    weights = read("ZImagePipeline", original, tmp_path)
    written = load_file(kohya_file(weights, "ZImagePipeline", tmp_path))
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in original.items())


def test_flux_single_blocks_of_the_real_width(tmp_path):
    state_dict = {}
    for index, (name, rows) in enumerate({"attn.to_q": 3072, "attn.to_v": 3072, "proj_mlp": 12288}.items()):
        module = f"single_transformer_blocks.7.{name}"
        state_dict |= {f"{module}.lora_A.weight": draw(2, 8, seed=index), f"{module}.lora_B.weight": draw(rows, 2)}
    weights = LoraWeights(LoraConfig(r=2, lora_alpha=1), state_dict)
    converted = pipeline_class("FluxPipeline").lora_state_dict(
        load_file(kohya_file(weights, "FluxPipeline", tmp_path))
    )
    for module, update in updates_of(weights, modules_of(weights)).items():
        up, down = (converted[f"transformer.{module}.lora_{kind}.weight"].double() for kind in "BA")
        torch.testing.assert_close(up @ down, update, atol=1e-7, rtol=1e-6)
    keys = converted["transformer.single_transformer_blocks.7.attn.to_k.lora_B.weight"]
    assert not keys.any()


def sd3_original() -> dict[str, torch.Tensor]:
    """The tiny transformer as its original checkpoint, by hand, and that diffusers converts it back."""
    weights, original = dict(tiny_transformer_of(SD3).state_dict()), {}

    def move(name, *sources, swap=False):
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"{source}.{kind}") for source in sources]
            parts = list(parts[0].chunk(2))[::-1] if swap else parts
            original[f"{name}.{kind}"] = torch.cat(parts)

    for index in range(2):
        block, last = f"transformer_blocks.{index}", index == 1
        for stream, attention, names in (
            ("x_block.attn", "attn", ("to_q", "to_k", "to_v", "to_out.0")),
            ("context_block.attn", "attn", ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
            ("x_block.attn2", "attn2", ("to_q", "to_k", "to_v", "to_out.0")),
        ):
            if last and attention == "attn2":
                continue
            move(f"joint_blocks.{index}.{stream}.qkv", *(f"{block}.{attention}.{name}" for name in names[:3]))
            norm = "norm_added_" if stream.startswith("context") else "norm_"
            for x in "qk":
                original[f"joint_blocks.{index}.{stream}.ln_{x}.weight"] = weights.pop(
                    f"{block}.{attention}.{norm}{x}.weight"
                )
            if not (last and stream.startswith("context")):
                move(f"joint_blocks.{index}.{stream}.proj", f"{block}.{attention}.{names[3]}")
        move(f"joint_blocks.{index}.x_block.adaLN_modulation.1", f"{block}.norm1.linear")
        move(f"joint_blocks.{index}.context_block.adaLN_modulation.1", f"{block}.norm1_context.linear", swap=last)
        for stream, ff in {"x_block": "ff", "context_block": "ff_context"}.items():
            if not (last and stream == "context_block"):
                move(f"joint_blocks.{index}.{stream}.mlp.fc1", f"{block}.{ff}.net.0.proj")
                move(f"joint_blocks.{index}.{stream}.mlp.fc2", f"{block}.{ff}.net.2")
    for name, source in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
        for number in (1, 2):
            move(f"{name}.mlp.{2 * number - 2}", f"time_text_embed.{source}.linear_{number}")
    move("context_embedder", "context_embedder")
    move("x_embedder.proj", "pos_embed.proj")
    move("final_layer.linear", "proj_out")
    move("final_layer.adaLN_modulation.1", "norm_out.linear", swap=True)
    original["pos_embed"] = weights.pop("pos_embed.pos_embed")
    assert not weights
    return original


def merged_in_the_original(tensors, prefix, ends) -> torch.Tensor:
    """
    The velocity with a LoRA added to the original checkpoint by ComfyUI's rule: `alpha / rank`, or 1 without an alpha.
    """
    original, used = sd3_original(), set()
    for name in [name for name in original if name.endswith(".weight")]:
        module = name.removesuffix(".weight")
        key = f"{prefix}{module.replace('.', '_') if prefix.endswith('_') else module}"
        if f"{key}.{ends[1]}.weight" in tensors:
            up, down = tensors[f"{key}.{ends[1]}.weight"], tensors[f"{key}.{ends[0]}.weight"]
            scale = tensors[f"{key}.alpha"].item() / down.shape[0] if f"{key}.alpha" in tensors else 1.0
            original[name] = original[name] + scale * up @ down
            used |= {f"{key}.{ends[0]}.weight", f"{key}.{ends[1]}.weight", f"{key}.alpha"} & tensors.keys()
    assert used == tensors.keys()
    transformer = tiny_transformer_of(SD3)
    transformer.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(original))
    return velocity_of(SD3, transformer)


def test_the_original_checkpoint_is_the_transformer():
    converted = convert_sd3_transformer_checkpoint_to_diffusers(sd3_original())
    expected = tiny_transformer_of(SD3).state_dict()
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("alpha", [True, False])
def test_sd3_reads_what_the_original_checkpoint_has(tmp_path, alpha):
    files = {
        "lora_unet_": (kohya(SD3_ORIGINALS, alpha=alpha), ("lora_down", "lora_up")),
        "diffusion_model.": (dotted(SD3_ORIGINALS, alpha=alpha), ("lora_A", "lora_B")),
    }
    for prefix, (tensors, ends) in files.items():
        expected = merged_in_the_original(tensors, prefix, ends)
        found = velocity_with(SD3, read(SD3, tensors, tmp_path))
        assert_close(found, expected)
        assert (found - velocity_of(SD3, tiny_transformer_of(SD3))).abs().mean() > 0.05


@pytest.mark.parametrize("options", [{}, {"r": 3, "lora_alpha": 7}, {"r": 3, "lora_alpha": 2, "use_rslora": True}])
def test_sd3_writes_what_the_original_checkpoint_needs(tmp_path, options):
    weights = lora_of(SD3, **options)
    tensors = load_file(kohya_file(weights, SD3, tmp_path))
    assert_close(merged_in_the_original(tensors, "lora_unet_", ("lora_down", "lora_up")), velocity_with(SD3, weights))


class TestConvert:
    @pytest.mark.parametrize("save", [save_diffusers_lora, save_peft_lora])
    def test_there_and_back(self, tmp_path, save):
        source = save(tmp_path / "source", *random_lora(seed=1, alpha_pattern={"attn.to_q": 3}))
        file = convert_lora(source, tmp_path / "kohya", "comfyui", base=SD3)
        assert file == tmp_path / "kohya" / FILE
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert all(name.startswith("lora_unet_joint_blocks_") for name in opened.keys())
        convert_lora(file, tmp_path / "back", base=SD3)  # to diffusers
        pipe = tiny_pipeline()
        pipe.load_lora_weights(tmp_path / "back")
        expected, found = (
            read_lora(source),
            LoraWeights(
                LoraConfig(
                    **{
                        k: getattr(pipe.transformer.peft_config["default_0"], k)
                        for k in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
                    }
                ),
                get_peft_model_state_dict(pipe.transformer, adapter_name="default_0"),
            ),
        )
        for module, update in updates_of(expected, modules_of(expected)).items():
            torch.testing.assert_close(updates_of(found, [module])[module], update, atol=1e-7, rtol=1e-6)

    def test_the_same_bytes(self, tmp_path):
        source = save_diffusers_lora(tmp_path / "source", *random_lora(seed=1))
        files = [convert_lora(source, tmp_path / name, "comfyui", base=SD3) for name in ("a", "b")]
        assert files[0].read_bytes() == files[1].read_bytes()

    def test_a_foreign_file_becomes_that_of_diffusers(self, tmp_path):
        weights = read("ZImagePipeline", kohya({"layers.0.attention.qkv": (96, 32)}), tmp_path)
        convert_lora(tmp_path / "lora.safetensors", tmp_path / "out", base="ZImagePipeline")
        assert lora_sha256(read_lora(tmp_path / "out")) == lora_sha256(weights)

    def test_the_command_takes_a_folder_or_a_class(self, tmp_path, capsys):
        source = save_diffusers_lora(tmp_path / "source", *random_lora())
        tiny_pipeline().save_pretrained(tmp_path / "base")
        for base, out in ((SD3, "a"), (tmp_path / "base", "b")):
            main(["convert", str(source), str(tmp_path / out), "--to", "comfyui", "--base", str(base)])
            assert capsys.readouterr().out == f"{tmp_path / out / FILE}\n"
        assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()

    def test_refusals(self, tmp_path):
        source = save_diffusers_lora(tmp_path / "source", *random_lora())
        with pytest.raises(ValueError, match="`base` must be one of StableDiffusion3Pipeline, .*, but is 'SD3'"):
            convert_lora(source, tmp_path / "out", base="SD3")
        with pytest.raises(
            ValueError, match=r"The LoRA of 'transformer_blocks.0.attn.add_k_proj' cannot.*Check `--base`"
        ):
            convert_lora(source, tmp_path / "out", "comfyui", base="ZImagePipeline")
        config, state_dict = random_lora()
        del state_dict["transformer_blocks.0.attn.to_k.lora_A.weight"]
        save_diffusers_lora(tmp_path / "half", config, state_dict)
        with pytest.raises(ValueError, match=r"The LoRA of 'transformer_blocks.0.attn.to_k' cannot .*not complete"):
            convert_lora(tmp_path / "half", tmp_path / "out", "comfyui", base=SD3)
        state_dict["transformer_blocks.0.attn.to_k.lora_A.weight"] = torch.ones(4, 17)
        save_diffusers_lora(tmp_path / "wide", config, state_dict)
        with pytest.raises(ValueError, match="have shapes that do not fit together"):
            convert_lora(tmp_path / "wide", tmp_path / "out", "comfyui", base=SD3)
        assert not (tmp_path / "out").exists()

    @pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor.s. have invalid shape")
    @pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
    def test_what_comfyui_would_apply_otherwise(self, tmp_path, option):
        source = save_diffusers_lora(tmp_path / "source", *random_lora(**{option: True}))
        with pytest.raises(ValueError, match=f"`{option}=True` cannot be written for ComfyUI"):
            convert_lora(source, tmp_path / "out", "comfyui", base=SD3)


def test_half_precision_keeps_its_dtype(tmp_path):
    weights = lora_of(SD3, r=4, lora_alpha=8)
    weights.state_dict = {name: tensor.bfloat16() for name, tensor in weights.state_dict.items()}
    tensors = load_file(kohya_file(weights, SD3, tmp_path))
    assert {t.dtype for name, t in tensors.items() if not name.endswith(".alpha")} == {torch.bfloat16}
    assert math.isclose(tensors["lora_unet_joint_blocks_0_x_block_attn_qkv.alpha"].item(), 24)
