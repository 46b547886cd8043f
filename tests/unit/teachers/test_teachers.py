# SPDX-License-Identifier: Apache-2.0
"""Teachers beside the student: loading, checking, and switching without disturbing the student's training."""

import dataclasses
import gc
import re
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

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
from trl_diffusion_opd.lora.adapters import base_only, lora_state_dict, use_adapter
from trl_diffusion_opd.models.sd3 import StableDiffusion3
from trl_diffusion_opd.teachers.config import TeacherConfig, check_tasks, normalize_teachers
from trl_diffusion_opd.teachers.loading import load_teachers, teacher_fingerprint


@pytest.fixture
def folders(tmp_path):
    """Two LoRA teachers in both formats; the second also adapts layers that the student does not."""
    save_diffusers_lora(tmp_path / "a", *random_lora(seed=1))
    save_peft_lora(tmp_path / "b", *random_lora(seed=2, rank=2, targets=["attn.to_q", "ff.net.2"]))
    return {"ocr": str(tmp_path / "a"), "geneval": str(tmp_path / "b")}


@pytest.fixture
def student():
    transformer = tiny_transformer().requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=SD3_TARGETS))
    generator = torch.Generator().manual_seed(0)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return transformer


def trainable(transformer):
    return {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def state(transformer):
    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    flags = [parameter.requires_grad for parameter in transformer.parameters()]
    return [list(layer.active_adapters) for layer in layers], [layer.disable_adapters for layer in layers], flags


class TestTeacherConfig:
    def test_fields_are_documented(self):
        for item in dataclasses.fields(TeacherConfig):
            assert f"        {item.name} (" in TeacherConfig.__doc__
            assert item.metadata["help"]

    def test_source(self):
        spelled = TeacherConfig("me/repo", subfolder="a/b", revision="v1").source()
        assert spelled == TeacherConfig("me/repo/a/b@v1").source()
        assert str(spelled) == "me/repo/a/b@v1"

    def test_local_subfolder(self, tmp_path):
        assert TeacherConfig(tmp_path, subfolder="a").source().path == tmp_path / "a"

    @pytest.mark.parametrize(
        ("args", "match"),
        [
            ({"guidance_scale": -1.0}, "finite number of at least 0, but is -1.0"),
            ({"guidance_scale": float("nan")}, "but is nan"),
            ({"guidance_scale": float("inf")}, "but is inf"),
            ({"guidance_scale": "4.5"}, "but is '4.5'"),
            ({"guidance_scale": True}, "but is True"),
            ({"name_or_path": "me/repo/a", "subfolder": "b"}, "subfolder .* given twice: 'a' .* `subfolder='b'`"),
            ({"name_or_path": "me/repo@v1", "revision": "v2"}, "revision .* given twice: 'v1' .* `revision='v2'`"),
            ({"name_or_path": Path("here"), "revision": "v2"}, "only Hub repositories have revisions"),
            ({"weight_name": "lora.bin"}, "teacher me/repo: 'lora.bin' is a pickle"),
            ({"name_or_path": "nothing"}, "owner/repo.*but is 'nothing'"),
        ],
    )
    def test_refuses(self, args, match):
        with pytest.raises(ValueError, match=match):
            TeacherConfig(**{"name_or_path": "me/repo", **args})

    def test_loaded_model(self):
        model = tiny_transformer()
        assert TeacherConfig(model, guidance_scale=1.0).name_or_path is model
        with pytest.raises(
            ValueError, match="`subfolder='a'` was given for a teacher that is already loaded as a SD3"
        ):
            TeacherConfig(model, subfolder="a")
        with pytest.raises(TypeError, match="path or Hub name of a LoRA.*but is a Linear"):
            TeacherConfig(torch.nn.Linear(1, 1))


class TestNormalize:
    def test_forms(self):
        model = tiny_transformer()
        config = TeacherConfig("me/repo/c")
        found = normalize_teachers(
            {
                "a": "me/repo/a",
                "b": Path("b"),
                "c": config,
                "d": {"name_or_path": "me/d", "revision": "v1"},
                "e": model,
            }
        )
        assert list(found) == ["a", "b", "c", "d", "e"]
        assert found["a"] == TeacherConfig("me/repo/a")
        assert found["b"].source().path == Path("b")
        assert found["c"] is config
        assert found["d"] == TeacherConfig("me/d", revision="v1")
        assert found["e"].name_or_path is model
        assert normalize_teachers(found) == found

    def test_list(self):
        found = normalize_teachers([TeacherConfig("me/a", task="a"), {"name_or_path": "me/b", "task": "b"}])
        assert found == {"a": TeacherConfig("me/a", task="a"), "b": TeacherConfig("me/b", task="b")}

    @pytest.mark.parametrize(
        ("teachers", "error", "match"),
        [
            ({}, ValueError, "`teachers` is empty"),
            ([], ValueError, "`teachers` is empty"),
            ("me/repo", TypeError, "must map each task to a teacher"),
            ([TeacherConfig("me/a")], ValueError, "has no `task`"),
            ([{"name_or_path": "me/a", "task": "a"}] * 2, ValueError, "'a' and 'a' .* bound to one teacher only"),
            ({"OCR": "me/a", "ocr": "me/b"}, ValueError, "'OCR' and 'ocr' .* bound to one teacher only"),
            ({1: "me/a"}, ValueError, "task must be a non-empty string .* but is 1"),
            ({" a": "me/a"}, ValueError, "without spaces around it, but is ' a'"),
            ({"a": TeacherConfig("me/a", task="b")}, ValueError, "under task 'a' says `task='b'`"),
            ({"a": {"path": "me/a"}}, ValueError, r"must be a dict with `name_or_path`.*\['path'\]"),
            ({"a": 3}, TypeError, "but is a int"),
            ({"a": None}, TypeError, "but is a NoneType"),
        ],
    )
    def test_refuses(self, teachers, error, match):
        with pytest.raises(error, match=match):
            normalize_teachers(teachers)


class TestCheckTasks:
    def test_equal(self):
        check_tasks({"a": 1, "b": 2}, ["b", "a", "b"])
        check_tasks({"a": 1, "b": 2}, {"a": ["x"], "b": ["y"]})

    @pytest.mark.parametrize(
        ("prompts", "match"),
        [
            (["a", "b", "c"], r"\['a', 'b'\] .* \['a', 'b', 'c'\] .* prompts of tasks without a teacher: \['c'\]\. "),
            (["a"], r"\['a', 'b'\] .* \['a'\] .* teachers without prompts: \['b'\]\. "),
            (["a", "B"], r"without a teacher: \['B'\] and there are teachers without prompts: \['b'\]"),
            ({"a": ["x"], "b": []}, r"teachers without prompts: \['b'\]"),
        ],
    )
    def test_refuses(self, prompts, match):
        with pytest.raises(ValueError, match=match):
            check_tasks(["a", "b"], prompts)


class TestLoad:
    def test_loras(self, folders, student):
        expected = velocity(student, tiny_inputs())
        names = trainable(student)
        teachers = load_teachers(
            folders | {"ocr": TeacherConfig(folders["ocr"], guidance_scale=1)},
            student,
            guidance_scale=4.5,
            family=StableDiffusion3(),
        )
        ocr, geneval = teachers["ocr"], teachers["geneval"]
        assert (ocr.adapter_name, geneval.adapter_name) == ("teacher_0", "teacher_1")
        assert (ocr.guidance_scale, geneval.guidance_scale) == (1.0, 4.5)
        assert (ocr.source, ocr.commit, ocr.model) == (folders["ocr"], None, None)
        assert trainable(student) == names
        assert all(".default." in name for name in names)
        assert torch.equal(velocity(student, tiny_inputs()), expected)
        # The teachers differ from each other, the student and the base.
        with torch.no_grad():
            outputs = [expected]
            for teacher in teachers.values():
                with use_adapter(student, teacher.adapter_name):
                    outputs.append(velocity(student, tiny_inputs()))
            with base_only(student):
                outputs.append(velocity(student, tiny_inputs()))
        assert torch.equal(outputs[-1], velocity(tiny_transformer(), tiny_inputs()))
        for i, one in enumerate(outputs):
            for other in outputs[i + 1 :]:
                assert (one - other).abs().mean() > 1e-3

    def test_errors_name_the_teacher(self, folders, student, tmp_path):
        with pytest.raises(OSError, match="teacher 'ocr' .*nowhere.*: the local path .* does not exist"):
            load_teachers({"ocr": tmp_path / "nowhere"}, student, guidance_scale=1.0, family=StableDiffusion3())
        config, state_dict = random_lora(tiny_transformer(num_layers=3))
        save_diffusers_lora(tmp_path / "deep", config, state_dict)
        with pytest.raises(ValueError, match="teacher 'ocr' .*deep.*no place in the transformer.*another base model"):
            load_teachers({"ocr": tmp_path / "deep"}, student, guidance_scale=1.0, family=StableDiffusion3())

    def test_weight_name(self, folders, student):
        file = next(Path(folders["ocr"]).iterdir())
        file.rename(file.with_name("style.safetensors"))
        config = TeacherConfig(folders["ocr"], weight_name="style.safetensors")
        assert (
            load_teachers({"ocr": config}, student, guidance_scale=1.0, family=StableDiffusion3())["ocr"].adapter_name
            == "teacher_0"
        )

    def test_full_models(self, student):
        model, pipe = tiny_transformer(seed=1, num_layers=3).train(), tiny_pipeline(seed=2)
        teachers = load_teachers(
            {"a": TeacherConfig(model, guidance_scale=1.0), "b": pipe},
            student,
            guidance_scale=4.5,
            family=StableDiffusion3(),
            vae=pipe.vae,
        )
        assert (teachers["a"].model, teachers["b"].model) == (model, pipe.transformer)
        assert (teachers["a"].guidance_scale, teachers["b"].guidance_scale) == (1.0, 4.5)
        assert {teacher.adapter_name for teacher in teachers.values()} == {None}
        assert not trainable(model)
        assert not model.training
        assert teachers["a"].fingerprint != teachers["b"].fingerprint
        assert teachers["a"].source == "SD3Transformer2DModel"

    @pytest.mark.parametrize(
        ("name", "value"),
        [("in_channels", 8), ("out_channels", 8), ("joint_attention_dim", 16), ("pooled_projection_dim", 16)],
    )
    def test_refuses_other_latents_or_embeddings(self, student, name, value):
        model = SD3Transformer2DModel.from_config({**tiny_transformer().config, name: value})
        match = f"teacher of task 'a' has `{name}={value}` but the student has `{name}="
        with pytest.raises(ValueError, match=match):
            load_teachers({"a": model}, student, guidance_scale=1.0, family=StableDiffusion3())

    def test_refuses_other_vae(self, student):
        pipe = tiny_pipeline()
        vae = AutoencoderKL.from_config({**pipe.vae.config, "scaling_factor": 0.5})
        with pytest.raises(ValueError, match="VAE of the teacher of task 'a' has `scaling_factor=1.5305` .*=0.5`"):
            load_teachers({"a": pipe}, student, guidance_scale=1.0, family=StableDiffusion3(), vae=vae)

    def test_refuses_the_student_itself(self, student):
        with pytest.raises(ValueError, match="is the student's own transformer"):
            load_teachers({"a": student}, student, guidance_scale=1.0, family=StableDiffusion3())

    def test_bf16_base(self, folders):
        transformer = tiny_transformer().to(torch.bfloat16)
        load_teachers(folders, transformer, guidance_scale=1.0, family=StableDiffusion3())
        for name in ("teacher_0", "teacher_1"):
            assert {tensor.dtype for tensor in lora_state_dict(transformer, name).values()} == {torch.float32}


class TestFingerprint:
    def test_is_of_the_content(self, folders, tmp_path):
        digests = []
        for seed, alpha in ((1, 8), (1, 8), (1, 16), (2, 8)):
            save_diffusers_lora(tmp_path / "x", *random_lora(seed=seed, alpha=alpha))
            transformer = tiny_transformer()
            (teacher,) = load_teachers(
                {"a": tmp_path / "x"}, transformer, guidance_scale=1.0, family=StableDiffusion3()
            ).values()
            assert re.fullmatch("[0-9a-f]{64}", teacher.fingerprint)
            digests.append(teacher.fingerprint)
        assert digests[0] == digests[1]
        assert len(set(digests)) == 3

    def test_sees_a_changed_bit(self, folders, student):
        teachers = load_teachers(
            folders | {"full": tiny_transformer(seed=1)}, student, guidance_scale=1.0, family=StableDiffusion3()
        )
        tensors = [
            next(iter(lora_state_dict(student, "teacher_0").values())),
            teachers["full"].model.proj_out.weight.data,
        ]
        for name, tensor in zip(("ocr", "full"), tensors, strict=True):
            assert teacher_fingerprint(teachers[name], student) == teachers[name].fingerprint
            tensor[0, 0] = torch.nextafter(tensor[0, 0], torch.tensor(torch.inf))
            assert teacher_fingerprint(teachers[name], student) != teachers[name].fingerprint

    def test_training_leaves_the_teachers_alone(self, folders, student):
        teachers = load_teachers(
            folders | {"full": tiny_transformer(seed=1)}, student, guidance_scale=1.0, family=StableDiffusion3()
        )
        names = trainable(student)
        before = {name: p.detach().clone() for name, p in student.named_parameters()}
        optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
        for step in range(3):
            inputs = tiny_inputs(seed=step)
            for teacher in teachers.values():
                with torch.no_grad():
                    if teacher.model is not None:
                        target = velocity(teacher.model, inputs)
                    else:
                        with use_adapter(student, teacher.adapter_name):
                            target = velocity(student, inputs)
                (velocity(student, inputs) - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        for teacher in teachers.values():
            assert teacher_fingerprint(teacher, student) == teacher.fingerprint
        assert trainable(student) == names
        changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
        assert changed == names


class TestUseAdapter:
    @pytest.fixture
    def loaded(self, folders, student):
        load_teachers(folders, student, guidance_scale=1.0, family=StableDiffusion3())
        return student

    @pytest.mark.parametrize("name", ["teacher_0", "teacher_1", "default"])
    def test_equals_public_set_adapter(self, loaded, name):
        """Fails if PEFT stops to read the private attributes that the switch writes."""
        for layer in loaded.modules():
            if isinstance(layer, BaseTunerLayer):
                assert "_active_adapter" in vars(layer)
                assert "_disable_adapters" in vars(layer)
        inputs = tiny_inputs()
        with torch.no_grad(), use_adapter(loaded, name):
            assert loaded.active_adapters() == [name]
            layers = [layer for layer in loaded.modules() if isinstance(layer, BaseTunerLayer)]
            assert all(layer.active_adapters == [name] and not layer.disable_adapters for layer in layers)
            found = velocity(loaded, inputs)
        # The flags decide which kernel multiplies the matrices, so they must be equal for equal bits.
        flags = [parameter.requires_grad for parameter in loaded.parameters()]
        loaded.set_adapter(name)
        for parameter, flag in zip(loaded.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
        with torch.no_grad():
            assert torch.equal(found, velocity(loaded, inputs))

    def test_base_only_equals_public_disable_adapters(self, loaded):
        inputs = tiny_inputs()
        with torch.no_grad(), base_only(loaded):
            layers = [layer for layer in loaded.modules() if isinstance(layer, BaseTunerLayer)]
            assert all(layer.disable_adapters for layer in layers)
            found = velocity(loaded, inputs)
        loaded.disable_adapters()
        with torch.no_grad():
            assert torch.equal(found, velocity(loaded, inputs))

    def test_no_flag_changes_inside_or_after(self, loaded):
        before = state(loaded)
        with torch.no_grad():
            for context in (use_adapter(loaded, "teacher_0"), base_only(loaded)):
                with context:
                    assert state(loaded)[2] == before[2]
                assert state(loaded) == before

    def test_restores_after_an_exception(self, loaded):
        before = state(loaded)
        for context in (use_adapter(loaded, "teacher_1"), base_only(loaded)):
            with pytest.raises(KeyboardInterrupt), torch.no_grad(), context:
                raise KeyboardInterrupt
            assert state(loaded) == before
        # A forward that fails: the text has the wrong width.
        with pytest.raises(RuntimeError), torch.no_grad(), use_adapter(loaded, "teacher_0"):
            velocity(loaded, tiny_inputs() | {"encoder_hidden_states": torch.zeros(2, 6, 31)})
        assert state(loaded) == before
        assert loaded.active_adapters() == ["default"]
        assert all(".default." in name for name in trainable(loaded))

    def test_nested(self, loaded):
        before = state(loaded)
        with torch.no_grad(), use_adapter(loaded, "teacher_0"):
            outer = state(loaded)
            with base_only(loaded):
                with use_adapter(loaded, "teacher_1"):
                    assert state(loaded)[0][0] == ["teacher_1"]
                    assert not any(state(loaded)[1])
                assert all(state(loaded)[1])
            assert state(loaded) == outer
        assert state(loaded) == before

    def test_refuses_while_gradients_are_on(self, loaded):
        before = state(loaded)
        for context in (use_adapter(loaded, "teacher_0"), base_only(loaded)):
            with pytest.raises(RuntimeError, match="gradients disabled.*torch.no_grad"), context:
                pass
        assert state(loaded) == before

    def test_unknown_adapter(self, loaded):
        match = r"no adapter called 'ocr'; it has: \['default', 'teacher_0', 'teacher_1'\]"
        with pytest.raises(ValueError, match=match), torch.no_grad(), use_adapter(loaded, "ocr"):
            pass

    def test_sees_adapters_added_later(self, loaded, tmp_path):
        with torch.no_grad(), use_adapter(loaded, "teacher_0"):
            pass
        loaded.add_adapter(LoraConfig(target_modules=["proj_out"], init_lora_weights=False), "late")
        with torch.no_grad(), use_adapter(loaded, "late"):
            assert loaded.proj_out.active_adapters == ["late"]
            found = velocity(loaded, tiny_inputs())
        assert (found - velocity(tiny_transformer(), tiny_inputs())).abs().mean() > 1e-3

    def test_holds_no_model_alive(self, folders):
        transformer = tiny_transformer()
        load_teachers(folders, transformer, guidance_scale=1.0, family=StableDiffusion3())
        with torch.no_grad(), use_adapter(transformer, "teacher_0"):
            pass
        dead = weakref.ref(transformer)
        del transformer
        gc.collect()
        assert dead() is None

    def test_base_only_without_adapters(self):
        transformer = tiny_transformer()
        with torch.no_grad(), base_only(transformer):
            assert velocity(transformer, tiny_inputs()).isfinite().all()

    @pytest.mark.parametrize("switch_before_backward", [False, True])
    def test_gradient_with_activation_checkpointing(self, folders, student, switch_before_backward):
        """A teacher pass before the student forward, or between it and the backward, changes no gradient."""
        load_teachers(folders, student, guidance_scale=1.0, family=StableDiffusion3())
        inputs = tiny_inputs()
        student.train()

        def teacher_pass():
            with torch.no_grad(), use_adapter(student, "teacher_1"):
                return velocity(student, inputs)

        def gradients():
            student.zero_grad()
            target = teacher_pass()
            loss = (velocity(student, inputs) - target).square().mean()
            if switch_before_backward:
                teacher_pass()
            loss.backward()
            return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

        plain = gradients()
        student.enable_gradient_checkpointing()
        checkpointed = gradients()
        assert plain.keys() == checkpointed.keys() == trainable(student)
        for name, gradient in plain.items():
            torch.testing.assert_close(checkpointed[name], gradient, atol=1e-7, rtol=1e-5)
        # The text of the last block is not used any more, so its query has no gradient.
        assert {name for name, g in plain.items() if not g.any()} == {
            f"transformer_blocks.1.attn.add_q_proj.lora_{ab}.default.weight" for ab in "AB"
        }
