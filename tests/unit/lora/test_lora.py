# SPDX-License-Identifier: Apache-2.0
"""LoRA files: both formats give the velocity of merged weights, and nothing is skipped in silence."""

import json
import math
import re

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
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
from trl_diffusion_opd.lora.adapters import add_lora, load_lora_into, lora_scaling, lora_state_dict, save_lora
from trl_diffusion_opd.lora.files import LoraWeights, read_lora


VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"attn.to_k": 2, "attn.to_q": 6}, "alpha_pattern": {"attn.to_q": 3, "to_out.0": 1}},
    "targets": {"targets": ["attn.to_q", "ff.net.2"]},
    "regex": {"targets": r"transformer_blocks\.1\.attn\.to_[qk]"},
}

# Fp32 sums in another order; a LoRA changes the velocity by some 1e-2.
TOLERANCE = {"atol": 3e-6, "rtol": 0.0}


def merged_velocity(config, state_dict, inputs, scaling_one=False):
    """The reference: `W + scaling * B @ A`, with the scaling worked out from the config by hand."""
    transformer = tiny_transformer()
    layers = dict(transformer.named_modules())
    for name in {key.split(".lora_")[0] for key in state_dict}:
        lora_a, lora_b = state_dict[f"{name}.lora_A.weight"], state_dict[f"{name}.lora_B.weight"]
        rank = lora_a.shape[0]
        alpha = next((v for key, v in config.alpha_pattern.items() if name.endswith(key)), config.lora_alpha)
        scaling = 1.0 if scaling_one else alpha / (math.sqrt(rank) if config.use_rslora else rank)
        layers[name].weight.data += scaling * lora_b @ lora_a
    with torch.no_grad():
        return velocity(transformer, inputs)


def adapter_velocity(transformer, adapter_name, inputs):
    transformer.set_adapter(adapter_name)
    with torch.no_grad():
        return velocity(transformer, inputs)


def with_student(seed=0, **kwargs):
    transformer = tiny_transformer().requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=SD3_TARGETS, **kwargs))
    generator = torch.Generator().manual_seed(seed)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return transformer


class TestRead:
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("save", [save_diffusers_lora, save_peft_lora])
    def test_velocity_is_that_of_merged_weights(self, tmp_path, save, variant):
        config, state_dict = random_lora(seed=1, **VARIANTS[variant])
        weights = read_lora(save(tmp_path, config, state_dict))
        assert weights.state_dict.keys() == state_dict.keys()
        inputs = tiny_inputs()
        transformer = tiny_transformer()
        base = velocity(transformer, inputs)
        add_lora(transformer, weights, "teacher_0")
        expected = merged_velocity(config, state_dict, inputs)
        assert (expected - base).abs().mean() > 1e-3
        torch.testing.assert_close(adapter_velocity(transformer, "teacher_0", inputs), expected, **TOLERANCE)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_without_metadata_as_diffusers(self, tmp_path, variant):
        config, state_dict = random_lora(seed=1, **VARIANTS[variant])
        save_diffusers_lora(tmp_path, config, state_dict, metadata=False)
        inputs = tiny_inputs()
        transformer = tiny_transformer()
        add_lora(transformer, read_lora(tmp_path), "teacher_0")
        found = adapter_velocity(transformer, "teacher_0", inputs)
        torch.testing.assert_close(found, merged_velocity(config, state_dict, inputs, scaling_one=True), **TOLERANCE)
        pipe = tiny_pipeline()
        pipe.load_lora_weights(tmp_path)
        torch.testing.assert_close(found, velocity(pipe.transformer, inputs), **TOLERANCE)

    def test_alpha_tensors(self, tmp_path):
        config, state_dict = random_lora(alpha=12)
        tensors = {f"transformer.{name}": tensor for name, tensor in state_dict.items()}
        modules = {name.split(".lora_")[0] for name in tensors}
        tensors |= {f"{module}.alpha": torch.tensor(12.0) for module in modules}
        save_file(tensors, tmp_path / "x.safetensors")
        transformer = tiny_transformer()
        add_lora(transformer, read_lora(tmp_path / "x.safetensors"), "teacher_0")
        assert set(lora_scaling(transformer, "teacher_0").values()) == {3.0}
        inputs = tiny_inputs()
        torch.testing.assert_close(
            adapter_velocity(transformer, "teacher_0", inputs),
            merged_velocity(config, state_dict, inputs),
            **TOLERANCE,
        )

    @pytest.mark.parametrize("save", [save_diffusers_lora, save_peft_lora])
    @pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
    # PEFT takes the biases, which have one dimension, for shards of matrices.
    @pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor.s. have invalid shape")
    def test_dora_and_bias_as_peft(self, tmp_path, save, option):
        config, state_dict = random_lora(seed=1, **{option: True})
        save(tmp_path / "checked", config, state_dict)
        save_peft_lora(tmp_path / "reference", config, state_dict)
        transformer = tiny_transformer()
        add_lora(transformer, read_lora(tmp_path / "checked"), "teacher_0")
        inputs = tiny_inputs()
        reference = PeftModel.from_pretrained(tiny_transformer(), tmp_path / "reference")
        with torch.no_grad():
            expected = velocity(reference, inputs)
        assert (expected - velocity(tiny_transformer(), inputs)).abs().mean() > 1e-3
        torch.testing.assert_close(adapter_velocity(transformer, "teacher_0", inputs), expected, **TOLERANCE)

    def test_config_is_fit_for_a_teacher(self, tmp_path):
        config, state_dict = random_lora(lora_dropout=0.5, init_lora_weights="gaussian")
        read = read_lora(save_peft_lora(tmp_path, config, state_dict)).config
        assert (read.lora_dropout, read.task_type, read.init_lora_weights) == (0.0, None, True)
        assert (read.r, read.lora_alpha, read.target_modules) == (4, 8, set(SD3_TARGETS))

    def test_peft_file_wins_over_diffusers_file_and_weight_name_over_both(self, tmp_path):
        config, state_dict = random_lora(alpha=8)
        save_diffusers_lora(tmp_path, config, state_dict)
        config, state_dict = random_lora(alpha=16)
        save_peft_lora(tmp_path, config, state_dict)
        assert read_lora(tmp_path).config.lora_alpha == 16
        assert read_lora(tmp_path, weight_name="pytorch_lora_weights.safetensors").config.lora_alpha == 8


class TestRefusals:
    """Every message names the owner."""

    @pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga"])
    @pytest.mark.parametrize("save", [save_diffusers_lora, save_peft_lora])
    def test_init_that_changes_the_base(self, tmp_path, save, init):
        config, state_dict = random_lora()
        save(tmp_path, config, state_dict)
        self._edit(tmp_path, save, init_lora_weights=init)
        with pytest.raises(ValueError, match=f"mine: .*init_lora_weights='{init}'.*path_initial_model_for_weight"):
            read_lora(tmp_path, owner="mine")

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"bias": "all"}, "`bias='all'`.*merge the LoRA"),
            ({"modules_to_save": ["proj_out"]}, r"'modules_to_save': \['proj_out'\].*Merge the LoRA"),
            ({"layer_replication": [[0, 2]]}, "layer_replication"),
            ({"peft_type": "IA3"}, "`peft_type='IA3'`, but only LoRA"),
        ],
    )
    def test_options(self, tmp_path, options, match):
        save_peft_lora(tmp_path, *random_lora())
        self._edit(tmp_path, save_peft_lora, **options)
        with pytest.raises(ValueError, match=f"mine: .*{match}"):
            read_lora(tmp_path, owner="mine")

    def _edit(self, folder, save, **options):
        if save is save_peft_lora:
            file = folder / "adapter_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | options))
        else:
            file = folder / "pytorch_lora_weights.safetensors"
            config = {f"transformer.{key}": value for key, value in options.items()}
            save_file(load_file(file), file, metadata={"lora_adapter_metadata": json.dumps(config)})

    @pytest.mark.parametrize(
        ("rename", "match"),
        [
            ("text_encoder.", "also changes a text encoder.*text_encoder.transformer_blocks"),
            ("unet.", "neither in the diffusers format.*nor in the PEFT format.*save_lora_weights"),
        ],
    )
    def test_names(self, tmp_path, rename, match):
        _, state_dict = random_lora()
        tensors = {f"transformer.{name}": tensor for name, tensor in state_dict.items()}
        tensors |= {f"{rename}{name}": tensor.clone() for name, tensor in state_dict.items()}
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=f"mine: .*{match}"):
            read_lora(tmp_path / "x.safetensors", owner="mine")

    def test_old_diffusers_names(self, tmp_path):
        _, state_dict = random_lora()
        tensors = {f"transformer.{name.replace('lora_A', 'lora.down')}": t for name, t in state_dict.items()}
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match="mine: .*lora.down.weight', which is no tensor of a PEFT LoRA"):
            read_lora(tmp_path / "x.safetensors", owner="mine")

    def test_pickle(self, tmp_path):
        torch.save({}, tmp_path / "adapter_model.bin")
        for path in (tmp_path, tmp_path / "adapter_model.bin"):
            with pytest.raises(ValueError, match="mine: 'adapter_model.bin' is a pickle file and only safetensors"):
                read_lora(path, owner="mine")

    def test_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="mine: there is no file or folder .*nowhere"):
            read_lora(tmp_path / "nowhere", owner="mine")
        with pytest.raises(FileNotFoundError, match="mine: .*The folder holds nothing"):
            read_lora(tmp_path, owner="mine")
        save_file({"a": torch.ones(1)}, tmp_path / "style.safetensors")
        with pytest.raises(FileNotFoundError, match=r"mine: .*Pass one of \['style.safetensors'\] as `weight_name`"):
            read_lora(tmp_path, owner="mine")
        (tmp_path / "broken.safetensors").write_bytes(b"version https://git-lfs")
        with pytest.raises(ValueError, match="mine: .*broken.safetensors' is not a readable safetensors file"):
            read_lora(tmp_path / "broken.safetensors", owner="mine")
        save_peft_lora(tmp_path / "peft", *random_lora())
        (tmp_path / "peft" / "adapter_config.json").unlink()
        with pytest.raises(FileNotFoundError, match="mine: .*'adapter_config.json', which holds their scaling"):
            read_lora(tmp_path / "peft" / "adapter_model.safetensors", owner="mine")
        tiny_transformer().save_pretrained(tmp_path / "full")
        with pytest.raises(ValueError, match="mine: .*full' holds a full model, not a LoRA"):
            read_lora(tmp_path / "full", owner="mine")

    def test_nan(self, tmp_path):
        config, state_dict = random_lora()
        state_dict["transformer_blocks.0.attn.to_k.lora_B.weight"][0, 0] = torch.nan
        save_diffusers_lora(tmp_path, config, state_dict)
        with pytest.raises(ValueError, match="mine: tensors hold NaN.*blocks.0.attn.to_k.lora_B"):
            read_lora(tmp_path, owner="mine")

    def test_add(self):
        config, state_dict = random_lora()
        first = sorted(state_dict)[0]
        cases = {
            "nothing of the LoRA could be applied .*another base model": (
                LoraConfig(target_modules=["to_nowhere"]),
                {f"other.{name}": tensor for name, tensor in state_dict.items()},
            ),
            "nothing of the LoRA could be applied .*have no place": (
                config,
                {f"transformer.{name}": tensor for name, tensor in state_dict.items()},
            ),
            f"missing.*{re.escape(first)}": (config, {k: v for k, v in state_dict.items() if k != first}),
            "no place in the transformer: blocks.9.lora_A.weight": (
                config,
                state_dict | {"blocks.9.lora_A.weight": torch.ones(1)},
            ),
            r"wrong shapes.*is \[4, 16\] and should be \[2, 16\]": (random_lora(rank=2)[0], state_dict),
        }
        transformer = with_student()
        before = {name: parameter.requires_grad for name, parameter in transformer.named_parameters()}
        for match, (config, tensors) in cases.items():
            with pytest.raises(ValueError, match=f"teacher 'ocr': .*{match}"):
                add_lora(transformer, LoraWeights(config, tensors, "teacher 'ocr'"), "teacher_0")
            # Nothing is left of it.
            assert list(transformer.peft_config) == ["default"]
            assert transformer.active_adapters() == ["default"]
            assert {name: p.requires_grad for name, p in transformer.named_parameters()} == before
        with pytest.raises(ValueError, match="mine: the transformer already has an adapter called 'default'"):
            add_lora(transformer, LoraWeights(*random_lora(), "mine"), "default")

    def test_missing_tensor_without_metadata(self, tmp_path):
        config, state_dict = random_lora()
        del state_dict["transformer_blocks.0.attn.to_k.lora_B.weight"]
        weights = read_lora(save_diffusers_lora(tmp_path, config, state_dict, metadata=False))
        with pytest.raises(ValueError, match="missing.*blocks.0.attn.to_k.lora_B"):
            add_lora(tiny_transformer(), weights, "teacher_0")


class TestAdd:
    @pytest.mark.parametrize("targets", [None, ["ff.net.2", "attn.to_q"]])
    def test_student_is_left_as_it_was(self, targets):
        transformer = with_student()
        inputs = tiny_inputs()
        before = {name: p.requires_grad for name, p in transformer.named_parameters() if p.requires_grad}
        expected = velocity(transformer, inputs)
        add_lora(transformer, LoraWeights(*random_lora(targets=targets)), "teacher_0")
        assert {name: p.requires_grad for name, p in transformer.named_parameters() if p.requires_grad} == before
        assert transformer.active_adapters() == ["default"]
        assert torch.equal(velocity(transformer, inputs), expected)

    def test_model_without_adapter_computes_the_base_and_stays_trainable(self):
        transformer = tiny_transformer()
        inputs = tiny_inputs()
        expected = velocity(transformer, inputs)
        add_lora(transformer, LoraWeights(*random_lora()), "teacher_0")
        assert torch.equal(velocity(transformer, inputs), expected)
        assert {p.requires_grad for name, p in transformer.named_parameters() if "lora_" not in name} == {True}
        assert {p.requires_grad for name, p in transformer.named_parameters() if "lora_" in name} == {False}
        # The student can also come last.
        transformer.add_adapter(LoraConfig(r=4, target_modules=SD3_TARGETS))
        assert transformer.active_adapters() == ["default"]

    def test_disabled_adapters_stay_disabled(self):
        transformer = with_student()
        transformer.disable_adapters()
        expected = velocity(transformer, tiny_inputs())
        add_lora(transformer, LoraWeights(*random_lora(targets=["attn.to_q", "ff.net.2"])), "teacher_0")
        assert torch.equal(velocity(transformer, tiny_inputs()), expected)

    def test_fp32_adapters_on_a_bf16_base(self):
        transformer = tiny_transformer().to(torch.bfloat16)
        config, state_dict = random_lora(use_dora=True)
        add_lora(transformer, LoraWeights(config, state_dict), "teacher_0")
        loaded = lora_state_dict(transformer, "teacher_0")
        assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state_dict.items())
        assert transformer.proj_out.weight.dtype == torch.bfloat16
        output = adapter_velocity(transformer, "teacher_0", tiny_inputs(dtype=torch.bfloat16))
        assert output.dtype == torch.bfloat16
        assert output.isfinite().all()

    def test_half_precision_files_become_fp32(self):
        config, state_dict = random_lora()
        halved = {name: tensor.half() for name, tensor in state_dict.items()}
        transformer = tiny_transformer()
        add_lora(transformer, LoraWeights(config, halved), "teacher_0")
        loaded = lora_state_dict(transformer, "teacher_0")
        assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in halved.items())


class TestSave:
    @pytest.mark.parametrize("variant", [*VARIANTS, "use_dora"])
    def test_stock_pipeline_loads_it_exactly(self, tmp_path, variant):
        config, state_dict = random_lora(seed=2, **VARIANTS.get(variant, {"use_dora": True}))
        transformer = tiny_transformer()
        add_lora(transformer, LoraWeights(config, state_dict), "default")
        add_lora(transformer, LoraWeights(*random_lora(seed=3)), "teacher_0")
        file = save_lora(tmp_path, transformer)
        assert file == tmp_path / "pytorch_lora_weights.safetensors"
        tensors = load_file(file)
        assert tensors.keys() == {f"transformer.{name}" for name in state_dict}
        inputs = tiny_inputs()
        pipe = tiny_pipeline()
        pipe.load_lora_weights(tmp_path)
        (name,) = pipe.transformer.peft_config
        loaded = get_peft_model_state_dict(pipe.transformer, adapter_name=name)
        assert all(torch.equal(loaded[key], tensor) for key, tensor in state_dict.items())
        assert lora_scaling(pipe.transformer, name) == lora_scaling(transformer)
        # The flags decide which kernel multiplies the matrices, so they must be equal for equal bits.
        pipe.transformer.requires_grad_(False)
        transformer.requires_grad_(False)
        with torch.no_grad():
            found = velocity(pipe.transformer, inputs)
        transformer.set_adapter("default")
        transformer.requires_grad_(False)
        with torch.no_grad():
            assert torch.equal(found, velocity(transformer, inputs))

    def test_metadata_is_the_config_without_a_random_order(self, tmp_path):
        with safe_open(save_lora(tmp_path, with_student()), framework="pt") as file:
            metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        assert metadata["transformer.target_modules"] == sorted(SD3_TARGETS)
        assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (4, 8)

    def test_given_tensors_are_written_in_fp32(self, tmp_path):
        transformer = with_student()
        average = {name: (tensor * 2).bfloat16() for name, tensor in lora_state_dict(transformer).items()}
        tensors = load_file(save_lora(tmp_path, transformer, state_dict=average, weight_name="ema.safetensors"))
        assert all(torch.equal(tensors[f"transformer.{name}"], t.float()) for name, t in average.items())
        average.popitem()
        with pytest.raises(ValueError, match="`state_dict` of adapter 'default': tensors are missing"):
            save_lora(tmp_path, transformer, state_dict=average)

    def test_unknown_adapter(self, tmp_path):
        with pytest.raises(ValueError, match=r"no adapter called 'ema'; it has: \['default'\]"):
            save_lora(tmp_path, with_student(), adapter_name="ema")


class TestLoadInto:
    def test_restores(self, tmp_path):
        saved, other = with_student(seed=1), with_student(seed=2)
        add_lora(other, LoraWeights(*random_lora()), "teacher_0")
        file = save_lora(tmp_path, saved)
        before = {name: parameter.requires_grad for name, parameter in other.named_parameters()}
        teacher = {name: tensor.clone() for name, tensor in lora_state_dict(other, "teacher_0").items()}
        load_lora_into(other, file)
        assert torch.equal(velocity(other, tiny_inputs()), velocity(saved, tiny_inputs()))
        assert {name: parameter.requires_grad for name, parameter in other.named_parameters()} == before
        assert all(torch.equal(t, teacher[n]) for n, t in lora_state_dict(other, "teacher_0").items())

    def test_refuses_another_config(self, tmp_path):
        save_diffusers_lora(tmp_path, *random_lora(alpha=16))
        with pytest.raises(ValueError, match=r"adapter 'default' from .*\(file, model\): {'lora_alpha': \(16, 8\)}"):
            load_lora_into(with_student(), tmp_path)
        save_diffusers_lora(tmp_path, *random_lora(rank=2))
        with pytest.raises(ValueError, match="adapter 'default' from .*wrong shapes"):
            load_lora_into(with_student(), tmp_path)
        save_diffusers_lora(tmp_path, *random_lora(targets=["attn.to_q"]))
        with pytest.raises(ValueError, match="adapter 'default' from .*missing"):
            load_lora_into(with_student(), tmp_path)
        save_diffusers_lora(tmp_path, *random_lora(targets=[*SD3_TARGETS, "ff.net.2"]))
        with pytest.raises(ValueError, match="adapter 'default' from .*no place"):
            load_lora_into(with_student(), tmp_path)


def test_tiny_pipeline_round_trip_and_prompts_matter(tmp_path):
    """The builders that all tests share give a working pipeline whose images depend on the text."""
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    loaded = StableDiffusion3Pipeline.from_pretrained(tmp_path)

    def image(pipe, prompt):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        size = {"height": 16, "width": 16, "max_sequence_length": 16, "num_inference_steps": 2}
        return pipe(prompt, **size, generator=generator, output_type="pt").images

    red = image(pipe, "a red circle")
    assert red.shape == (1, 3, 16, 16)
    assert torch.equal(image(loaded, "a red circle"), red)
    assert (image(pipe, "two blue dogs") - red).abs().mean() > 1e-2
