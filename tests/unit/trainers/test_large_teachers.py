# SPDX-License-Identifier: Apache-2.0
"""Distillation from teachers on a larger base: training, offloading, resuming, plan, card and comparison."""

import json
import shutil

import pytest
import torch

from tests.support.large import large_pipeline, large_teachers, large_transformer, save_large
from tests.support.runs import PROMPTS, SAVING_RUN, make_teachers, make_trainer, student_state
from tests.support.tiny import tiny_pipeline
from trl_diffusion_opd import TeacherConfig
from trl_diffusion_opd.cli.recipe import OPDScriptArguments
from trl_diffusion_opd.publishing.card_sections import teacher_table
from trl_diffusion_opd.publishing.record import RunRecord
from trl_diffusion_opd.publishing.space_content import gather
from trl_diffusion_opd.teachers import loading
from trl_diffusion_opd.trainers import base_trainer
from trl_diffusion_opd.trainers.checkpoints import ResumeError
from trl_diffusion_opd.trainers.plan import describe_plan
from trl_diffusion_opd.utils.hardware import module_bytes


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = save_large(tmp_path_factory.mktemp("large"))
    tiny_pipeline().save_pretrained(folder / "base")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def offload(trainer) -> list[list]:
    """As `offload_teachers` does on a GPU; returns what was there after the beginning of each turn."""
    there, begin = [], trainer.turns.begin

    def watched(*args, **kwargs):
        begin(*args, **kwargs)
        there.append(trainer.turns.resident())

    trainer.turns.begin = watched
    for backbone in trainer.backbones.values():
        trainer.turns.add(backbone)
    return there


def test_a_lora_on_another_base_teaches_what_diffusers_has_of_it(folder):
    """To the bit as with a transformer that has the LoRA from diffusers' own loader."""
    loaded = {}
    for task in PROMPTS:
        pipeline = large_pipeline()
        pipeline.load_lora_weights(str(folder / f"large_{task}"), weight_name="pytorch_lora_weights.safetensors")
        loaded[task] = TeacherConfig(pipeline.transformer, guidance_scale=large_teachers(folder)[task].guidance_scale)
    states = []
    for teachers in (large_teachers(folder), loaded):
        trainer = make_trainer(folder, teachers=teachers)
        trainer.train()
        states.append((student_state(trainer), [entry.get("kl/count") for entry in trainer.state.log_history]))
    assert states[0][1] == states[1][1] and states[0][1][0] > 0.01
    assert all(tensor.equal(states[1][0][name]) for name, tensor in states[0][0].items())


def test_the_first_divergence_is_that_of_the_two_bases(folder):
    trainer = make_trainer(
        folder, teachers={"scene": folder / "large"}, data={"scene": PROMPTS["scene"]}, num_inference_steps=2
    )
    [batch] = trainer.rounds.batches(0)
    noise = trainer.sampler.noise(batch.seeds)[0].double()
    encoded = trainer.prompts.encode([*batch.prompts, ""])
    text, negative = ([encoded[prompt] for prompt in prompts] for prompts in (batch.prompts, [""] * len(noise)))

    def guided(transformer):
        def forward(rows):
            embeds, pooled = (torch.stack([row[name] for row in rows]).double() for name in rows[0])
            return transformer(noise, embeds, pooled, torch.full((len(noise),), 1000.0), return_dict=False)[0]

        return forward(negative) + 2.0 * (forward(text) - forward(negative))

    with torch.no_grad():
        difference = guided(tiny_pipeline().transformer.double()) - guided(large_transformer().double())
    dt = (trainer.schedule.sigmas[1] - trainer.schedule.sigmas[0]).double()
    trainer.train()
    expected = (dt**2 * difference.square()).mean().item() / 2
    assert trainer.state.log_history[0]["kl/scene"] == pytest.approx(expected, rel=1e-4)


def test_offloading_changes_no_bit(folder):
    teachers = {**large_teachers(folder), "own": make_teachers(folder)["count"], "full": large_transformer(seed=4)}
    data = {**PROMPTS, "own": PROMPTS["scene"], "full": PROMPTS["scene"]}
    held_out = {task: prompts[:2] for task, prompts in data.items()}
    plain, offloaded = (
        make_trainer(folder, teachers=teachers, data=data, eval_dataset=held_out, max_steps=2) for _ in range(2)
    )
    there = offload(offloaded)
    results = []
    for trainer in (plain, offloaded):
        trainer.train()
        metrics = trainer.evaluate()
        results.append((student_state(trainer), {name: metrics[name] for name in metrics if "kl" in name}))
    large, full = offloaded.backbones.values()
    # Of each round: both LoRAs on the larger base, the one on the student's, the other full model
    assert there[:8] == [[large], [large], [full], [full, large]] + [[large], [large], [full], [full, large]]
    assert all(len(modules) <= 2 for modules in there)
    assert results[0][1] == results[1][1] and len(results[0][1]) == 4
    assert all(tensor.equal(results[1][0][name]) for name, tensor in results[0][0].items())
    for teacher in offloaded.loaded_teachers.values():
        assert loading.teacher_fingerprint(teacher, offloaded.transformer) == teacher.fingerprint


def test_a_killed_run_goes_on_to_the_bit(folder):
    base = str(folder / "base")
    whole = make_trainer(folder, pipeline=base, teachers=large_teachers(folder), **SAVING_RUN)
    whole.train()
    resumed = make_trainer(folder, pipeline=base, teachers=large_teachers(folder), offload_teachers=True, **SAVING_RUN)
    resumed.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))
    expected = student_state(whole)
    assert all(tensor.equal(expected[name]) for name, tensor in student_state(resumed).items())


def on_the_students_base(folder):
    return make_teachers(folder)


def on_a_deeper_base(folder):
    pipeline = large_pipeline()
    pipeline.transformer.register_to_config(dual_attention_layers=(), pos_embed_max_size=16)
    pipeline.save_pretrained(folder / "other")
    return large_teachers(folder, base="other")


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        (on_the_students_base, "other teachers: count backbone 'that of the student' instead of {.*num_layers"),
        (on_a_deeper_base, "other teachers: count backbone pos_embed_max_size 16 instead of 8"),
    ],
)
def test_another_base_of_a_teacher_is_refused_before_anything_is_loaded(folder, monkeypatch, teachers, message):
    base = str(folder / "base")
    settings = {"pipeline": base, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(folder, teachers=large_teachers(folder), **settings).train()
    monkeypatch.setattr(base_trainer, "load_pipeline", lambda *args, **kwargs: pytest.fail("the base was loaded"))
    with pytest.raises(ResumeError, match=message) as error:
        make_trainer(folder, teachers=teachers(folder), resume_from_checkpoint="true", **settings)
    assert "\n" not in str(error.value)


def test_other_weights_of_a_teachers_base_are_refused(folder):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_trainer(folder, teachers=large_teachers(folder), **settings).train()
    large_pipeline(seed=1).save_pretrained(folder / "retrained")
    trainer = make_trainer(folder, teachers=large_teachers(folder, base="retrained"), **settings)
    with pytest.raises(ResumeError, match="other teachers"):
        trainer.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-1"))


def test_a_backbone_that_does_not_fit_is_refused_before_the_base_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(base_trainer, "load_pipeline", lambda *args, **kwargs: pytest.fail("the base was loaded"))
    file = folder / "large" / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "in_channels": 8}))
    with pytest.raises(ValueError, match="teacher of task 'count' has `in_channels=8` but the student has"):
        make_trainer(folder, pipeline=str(folder / "base"), teachers=large_teachers(folder))


def test_plan_counts_each_backbone_once_and_names_it(folder):
    plain = make_trainer(folder, teachers=large_teachers(folder))
    [backbone] = plain.backbones.values()
    text = describe_plan(plain)
    assert "teacher: LoRA run/large_count on run/large, guidance 2" in text
    assert "teacher: LoRA run/large_scene on run/large, guidance 1" in text
    assert plain.plan().models == module_bytes(backbone) > 0 and "offload" not in text
    own = make_trainer(folder)
    assert own.plan().models == 0 and " on " not in describe_plan(own).partition("rollout")[0]
    seeds = {"a": 1, "b": 2, "c": 3}
    models = {task: large_transformer(seed) for task, seed in seeds.items()}
    three = make_trainer(folder, teachers=models, data={task: ["a red circle"] for task in seeds})
    size = module_bytes(models["a"])
    assert three.plan().models == 3 * size
    offload(three)
    assert three.plan().models == 2 * size
    assert f"offload    {3 * size / 1e6:.1f} MB of teachers in host memory" in describe_plan(three)


def test_the_base_of_a_teacher_is_on_the_card_and_not_in_the_space(folder):
    teachers = {**large_teachers(folder), "scene": str(folder / "base")}
    trainer = make_trainer(folder, pipeline=str(folder / "base"), teachers=teachers)
    trainer.train()
    trainer.save_model()
    assert len(trainer.backbones) == 1, "the student's own base as a teacher is no other one"
    record = RunRecord.load(folder / "out")
    assert record.teachers == trainer.make_record().teachers
    count, scene = record.teachers
    assert (count.is_lora, count.base.name, scene.is_lora, scene.base) == (True, "run/large", False, None)
    table = teacher_table(record)
    assert "large_count` on `run/large`" in table and "`run/base`, a full model" in table
    content = gather(folder / "out", base=folder / "base")
    assert content.teachers == {}
    # One of an earlier version has no base
    file = folder / "out" / "run.json"
    content = json.loads(file.read_text())
    for teacher in content["teachers"]:
        del teacher["base"]
    file.write_text(json.dumps(content))
    assert RunRecord.load(folder / "out").teachers[0].base is None


def test_there_is_no_merge_of_loras_on_other_bases(folder):
    def brightness(images, prompts):
        return images.flatten(1).mean(1).tolist()

    teachers = make_teachers(folder, scene=large_teachers(folder)["scene"])
    trainer = make_trainer(
        folder, teachers=teachers, eval_dataset={"count": ["a red circle"]}, reward_funcs={"count": brightness}
    )
    results = trainer.compare()
    assert "merge" not in results and results["teachers"].keys() == teachers.keys()
    assert results["teachers"]["scene"] != results["base"]


def test_a_recipe_names_the_base_relative_to_itself(folder):
    arguments = OPDScriptArguments(
        model_name_or_path="base",
        teachers={
            "a": {"name_or_path": "large_count", "base": "large"},
            "b": {"name_or_path": "large", "subfolder": "transformer"},
        },
        datasets={"a": ["x"], "b": ["x"]},
    )
    teachers = arguments.trainer_arguments(folder / "recipe.yaml")["teachers"]
    assert teachers["a"] == {"name_or_path": str(folder / "large_count"), "base": str(folder / "large")}
    assert teachers["b"] == {"name_or_path": str(folder / "large"), "subfolder": "transformer"}
    trainer = make_trainer(folder, teachers=teachers, data={"a": ["a red circle"], "b": ["a red circle"]})
    assert len(trainer.backbones) == 1
