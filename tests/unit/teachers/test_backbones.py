# SPDX-License-Identifier: Apache-2.0
"""Teachers on another backbone than the student's: full models by path, and LoRAs on another base."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL

from tests.support.large import large_pipeline, large_teachers, large_transformer, save_large
from tests.support.tiny import random_lora, save_diffusers_lora, tiny_inputs, tiny_pipeline, tiny_transformer, velocity
from trl_diffusion_opd.hub.locations import Source
from trl_diffusion_opd.lora.adapters import base_only, use_adapter
from trl_diffusion_opd.lora.fingerprints import backbone_sha256
from trl_diffusion_opd.models.sd3 import StableDiffusion3
from trl_diffusion_opd.models.transformer_places import find_transformer
from trl_diffusion_opd.teachers import loading
from trl_diffusion_opd.teachers.backbones import on_students_base
from trl_diffusion_opd.teachers.config import TeacherConfig, normalize_teachers
from trl_diffusion_opd.teachers.loading import fetch_teachers, load_teachers, teacher_fingerprint


FAMILY = StableDiffusion3()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_large(tmp_path_factory.mktemp("large"))


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def load(teachers, **kwargs):
    return load_teachers(
        teachers, tiny_transformer(), guidance_scale=2.0, family=FAMILY, show_progress=False, **kwargs
    )


@torch.no_grad()
def test_loras_on_another_base_compute_what_diffusers_computes(saved):
    student = tiny_transformer()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    teachers = load_teachers(large_teachers(saved), student, guidance_scale=2.0, family=FAMILY)
    assert teachers["count"].model is teachers["scene"].model, "loaded once"
    assert [teacher.adapters for teacher in teachers.values()] == [("teacher_0",), ("teacher_1",)]
    model = teachers["count"].model
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training
    for task, teacher in teachers.items():
        reference = large_pipeline()
        reference.load_lora_weights(str(saved / f"large_{task}"), weight_name="pytorch_lora_weights.safetensors")
        with use_adapter(model, *teacher.adapters):
            found = velocity(model, tiny_inputs())
        torch.testing.assert_close(found, velocity(reference.transformer, tiny_inputs()), rtol=1e-5, atol=1e-6)
        assert (found - velocity(large_transformer(), tiny_inputs())).abs().max() > 1e-2
    with base_only(model):
        assert velocity(model, tiny_inputs()).equal(velocity(large_transformer(), tiny_inputs()))
    assert all(tensor.equal(before[name]) for name, tensor in student.state_dict().items())
    assert student.state_dict().keys() == before.keys()


@torch.no_grad()
def test_every_way_to_name_a_full_model_is_one_model(saved):
    expected = velocity(large_transformer(), tiny_inputs())
    ways = {
        "a": TeacherConfig(saved / "large", subfolder="transformer"),
        "b": str(saved / "large" / "transformer"),
        "c": saved / "large",
        "d": TeacherConfig(saved / "large_count", base=saved / "large"),
    }
    teachers = load(ways)
    assert len({id(teacher.model) for teacher in teachers.values()}) == 1
    model = teachers["a"].model
    with base_only(model):
        assert velocity(model, tiny_inputs()).equal(expected)
    assert [teacher.adapters for teacher in teachers.values()] == [(), (), (), ("teacher_3",)]
    # The same weights in memory have the same fingerprint, whatever adapters came beside them.
    (given,) = load({"a": large_transformer()}).values()
    assert {teachers[task].fingerprint for task in "abc"} == {given.fingerprint, backbone_sha256(model)}
    assert teachers["d"].fingerprint not in (given.fingerprint, load({"a": ways["d"]})["a"].origin)


def test_what_is_loaded_has_the_precision_of_the_run_and_what_is_given_keeps_its_own(saved):
    teachers = load({"a": str(saved / "large"), "b": large_transformer(seed=3)}, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in teachers["a"].model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in teachers["b"].model.parameters()} == {torch.float32}
    loras = load(large_teachers(saved), dtype=torch.bfloat16)
    dtypes = {name.split(".")[-2]: p.dtype for name, p in loras["count"].model.named_parameters() if ".lora_" in name}
    assert set(dtypes.values()) == {torch.float32}


def test_the_fingerprint_covers_the_lora_and_its_base(saved):
    student = tiny_transformer()
    teachers = load_teachers(large_teachers(saved), student, guidance_scale=2.0, family=FAMILY)
    count, scene = teachers.values()
    weights = [count.model.proj_out.weight.data, dict(scene.model.named_parameters())]
    assert teacher_fingerprint(count, student) == count.fingerprint
    name = next(name for name in weights[1] if ".lora_A.teacher_1" in name)
    weights[1][name].data[0, 0] += 1
    assert teacher_fingerprint(scene, student) != scene.fingerprint
    assert teacher_fingerprint(count, student) == count.fingerprint
    weights[0][0, 0] = torch.nextafter(weights[0][0, 0], torch.tensor(torch.inf))
    assert teacher_fingerprint(count, student) != count.fingerprint


def test_a_base_in_memory_is_used_as_it_is(saved):
    pipeline = large_pipeline()
    configs = {"a": TeacherConfig(saved / "large_count", base=pipeline), "b": pipeline.transformer}
    teachers = load(configs)
    assert teachers["a"].model is teachers["b"].model is pipeline.transformer
    with pytest.raises(ValueError, match=r"base of teacher 'a': it has adapters already \(teacher_0\)"):
        load({"a": configs["a"]})


@torch.no_grad()
def test_a_full_model_with_adapters_of_its_own_is_queried_with_them():
    model = large_transformer()
    model.add_adapter(random_lora(model.config)[0], adapter_name="mine")
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    (teacher,) = load({"a": model}).values()
    assert teacher.adapters == ("mine",) and teacher.adapter_name is None


def test_the_base_of_the_student_is_not_loaded_twice(saved):
    configs = normalize_teachers({"a": large_teachers(saved)["count"], "b": saved / "large"})
    found = fetch_teachers(configs, FAMILY)
    key = found["a"].place.key
    assert key == found["b"].place.key
    settled = on_students_base(found, key, large_transformer().config, FAMILY)
    student = large_transformer()
    teachers = load_teachers(configs, student, guidance_scale=2.0, family=FAMILY, files=settled)
    assert [(teacher.model, teacher.base) for teacher in teachers.values()] == [(None, None)] * 2
    assert [teacher.adapters for teacher in teachers.values()] == [("teacher_0",), ()]
    assert teachers["b"].fingerprint == load({"b": saved / "large"})["b"].fingerprint
    own = load_teachers({"a": saved / "large_count"}, large_transformer(), guidance_scale=2.0, family=FAMILY)
    assert teachers["a"].fingerprint == own["a"].fingerprint


def test_a_config_that_is_of_no_model_of_diffusers_is_not_taken_for_one(folder):
    """As it lies beside LoRAs with unusual names, whose error says which files there are."""
    (folder / "large_count" / "config.json").write_text('{"model_type": "lora"}')
    assert find_transformer(Source(path=folder / "large_count"), "teacher 'a'", FAMILY) is None


def test_a_folder_with_a_lora_and_a_model_is_the_lora(folder):
    shutil.copy(folder / "large_count" / "pytorch_lora_weights.safetensors", folder / "large")
    found = fetch_teachers(normalize_teachers({"a": folder / "large"}), FAMILY)["a"]
    assert found.lora is not None and found.place is None


def change_config(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def other_class(folder):
    change_config(folder / "large" / "transformer" / "config.json", _class_name="FluxTransformer2DModel")
    return folder / "large"


def broken_config(folder):
    (folder / "large" / "transformer" / "config.json").write_text("{")
    return TeacherConfig(folder / "large", subfolder="transformer")


def no_weights(folder):
    next((folder / "large" / "transformer").glob("*.safetensors")).unlink()
    return folder / "large"


def pickled(folder):
    file = next((folder / "large" / "transformer").glob("*.safetensors"))
    file.rename(file.with_suffix(".bin"))
    return folder / "large"


def no_transformer(folder):
    shutil.rmtree(folder / "large" / "transformer")
    return TeacherConfig(folder / "large_count", base=folder / "large")


def no_base(folder):
    return TeacherConfig(folder / "large_count", base=folder / "nowhere")


def no_pipeline(folder):
    return TeacherConfig(folder / "large_count", base=folder / "large" / "transformer")


def full_model_and_base(folder):
    return TeacherConfig(folder / "large", base=folder / "large")


def unknown_pipeline(folder):
    change_config(folder / "large" / "model_index.json", _class_name="WanPipeline")
    return TeacherConfig(folder / "large_count", base=folder / "large")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            other_class,
            "teacher 'ocr' .*config.json' in .* is that of a 'FluxTransformer2DModel', but the student is a SD3",
        ),
        (broken_config, "teacher 'ocr' .*config.json' cannot be read: .* Download it again"),
        (no_weights, "teacher 'ocr' .*there is no 'diffusion_pytorch_model.safetensors' in .*'config.json'"),
        (pickled, "teacher 'ocr' .*is a pickle file and only safetensors is loaded"),
        (no_transformer, "base of teacher 'ocr': the pipeline .*large has no 'transformer/config.json'"),
        (no_base, "base of teacher 'ocr': there is no folder .*nowhere"),
        (
            no_pipeline,
            "base of teacher 'ocr'`: the folder .* has no `model_index.json`. Pass the folder of a whole pipe",
        ),
        (full_model_and_base, "teacher 'ocr' .*`base=.*large'` was given, but it is a full model, not a LoRA. Leave"),
        (unknown_pipeline, "`base of teacher 'ocr'` is a 'WanPipeline', which no known model family has"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_loaded(folder, make, message):
    with pytest.raises((ValueError, OSError), match=message) as error:
        fetch_teachers(normalize_teachers({"ocr": make(folder)}), FAMILY)
    assert "\n" not in str(error.value)


def test_another_size_of_latents_or_text_is_told_before_anything_is_loaded(folder):
    change_config(folder / "large" / "transformer" / "config.json", joint_attention_dim=64)
    found = fetch_teachers(normalize_teachers({"ocr": large_teachers(folder)["count"]}), FAMILY)
    with pytest.raises(ValueError, match="task 'ocr' has `joint_attention_dim=64` but the student has .*dim=32`"):
        on_students_base(found, (), tiny_transformer().config, FAMILY)


def test_another_vae_is_told_before_the_backbone_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(loading, "load_transformer", lambda *args: pytest.fail("the backbone was loaded"))
    vae = AutoencoderKL.from_config({**tiny_pipeline().vae.config, "scaling_factor": 0.5})
    with pytest.raises(ValueError, match="VAE of the teacher of task 'count' has `scaling_factor=1.5305` .*=0.5`"):
        load(large_teachers(folder), vae=vae)


def test_a_lora_of_another_base_than_the_one_named(folder):
    save_diffusers_lora(folder / "deep", *random_lora(tiny_transformer(num_layers=4)))
    with pytest.raises(ValueError, match="teacher 'ocr' .*deep.*no place in the transformer.*another base model"):
        load({"ocr": TeacherConfig(folder / "deep", base=folder / "large")})


def test_damaged_weights_are_told_in_one_line(folder):
    file = next((folder / "large" / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(OSError, match="teacher 'ocr' .*: the transformer in .* cannot be loaded") as error:
        load({"ocr": folder / "large"})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"base": "nothing"}, ValueError, "A base location must be .* but is 'nothing'"),
        ({"base": 3}, TypeError, "but is a int"),
        (
            {"name_or_path": tiny_transformer(), "base": "me/base"},
            ValueError,
            "`base='me/base'` was given for a teacher",
        ),
    ],
)
def test_configs_that_cannot_be(arguments, error, message):
    with pytest.raises(error, match=message):
        TeacherConfig(**{"name_or_path": "me/repo", **arguments})
