# SPDX-License-Identifier: Apache-2.0
"""Objectives, targets, queries and prompts of the distillation trainer: their gradients, and that nothing is lost."""

import pytest
import torch

from tests.support.runs import PROMPTS, SAVING_RUN, make_teachers, make_trainer, small_lora, student_state
from tests.support.tiny import tiny_pipeline
from tests.unit.trainers.test_opd_trainer import run_round
from trl_diffusion_opd.lora.adapters import lora_state_dict
from trl_diffusion_opd.models.sampler import Policy


# One of every kind, with settings that it goes with.
RUNS = {
    "mean": {"objective": "mean", "noise_level": 0.5},
    "velocity": {"objective": "velocity"},
    "x0": {"objective": "x0"},
    "branches": {"objective": "branches", "objective_kwargs": {"form": "difference"}},
    "policy_gradient": {"objective": "policy_gradient", "noise_level": 0.7},
    "log_ratio": {
        "objective": "policy_gradient",
        "objective_kwargs": {"advantage": "log_ratio", "reduction": "sum"},
        "noise_level": 0.7,
    },
    "dmd": {"objective": "dmd", "objective_kwargs": {"fake_updates": 2}},
    "tdm": {"objective": "tdm", "num_inference_steps": 4},
    "sft": {"objective": "sft", "objective_kwargs": {"guided": True}},
    "queries": {"query_steps": 1, "query_distribution": "late"},
    "importance": {"query_steps": 2, "query_distribution": "importance"},
    "mixture": {"targets": {"count": {"count": 0.5, "scene": 0.5}}, "teacher_extrapolation": 1.25},
    "average": {"targets": {"scene": {"average": 0.5, "scene": 0.5}}, "ema_decay": 0.5, "ema_update_every": 1},
    "anchor": {"anchor": "base", "anchor_weight": 0.5},
    "adaptive": {"adaptive_task_weights": 1.0},
}
JOINT = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
JOINT += ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]
RUNS["merged"] = {"merge_teachers": "ties", "peft_config": small_lora(target_modules=JOINT)}
RUNS["ssr"] = {"merge_teachers": "ssr", "peft_config": small_lora(target_modules=JOINT), "ema_decay": 0.9}


def guided_teachers(folder) -> dict:
    return {**make_teachers(folder), "scene": str(folder / "scene")}


def trainer_of(folder, name: str, **settings):
    given = {"teachers": guided_teachers(folder), **RUNS[name]}
    return make_trainer(folder, **{**given, **settings})


@pytest.mark.parametrize("name", RUNS)
def test_every_kind_trains_the_student_alone_and_resumes_to_the_bit(tmp_path, name):
    whole = trainer_of(tmp_path, name, **{**SAVING_RUN, "max_steps": 4}, output_dir=str(tmp_path / "whole"))
    before, teachers = student_state(whole), lora_state_dict(whole.transformer, "teacher_0")
    teachers = {key: tensor.clone() for key, tensor in teachers.items()}
    whole.train()
    after = student_state(whole)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert any(not torch.equal(after[key], before[key]) for key in after)
    for key, tensor in lora_state_dict(whole.transformer, "teacher_0").items():
        assert torch.equal(tensor, teachers[key])
    trainable = {key for key, p in whole.transformer.named_parameters() if p.requires_grad}
    assert trainable == set(after)

    resumed = trainer_of(tmp_path, name, **{**SAVING_RUN, "max_steps": 4}, output_dir=str(tmp_path / "whole"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for key, tensor in student_state(resumed).items():
        assert torch.equal(tensor, after[key]), key


def test_all_steps_by_name_are_all_steps(tmp_path):
    dense = run_round(make_trainer(tmp_path, skip_last_steps=1))
    named = run_round(make_trainer(tmp_path, skip_last_steps=1, query_steps=3))
    for key, gradient in dense.items():
        torch.testing.assert_close(named[key], gradient, rtol=1e-6, atol=0)


def first_step_gradient(trainer, asked: list[str], prompts: list[str], losses: list[tuple[float, list]]) -> dict:
    """
    Of distances of velocities at the first state alone: for each its weight and its target, weights and policies.
    """
    batch, scale = trainer.rounds.batches(0)[0], trainer.args.guidance_scale
    x, _ = trainer.sampler.noise(batch.seeds)
    timestep = trainer.schedule.timesteps[0]
    texts = [trainer.prompts.conditioning(words) for words in (asked, prompts)]
    targets = [
        (factor, sum(weight * trainer.sampler.velocity(policy, x, timestep, texts[1]) for weight, policy in terms))
        for factor, terms in losses
    ]
    velocity = trainer.model(x, timestep, *texts[0].batch(scale), scale)
    trainer.model.zero_grad()
    sum(factor * (velocity - target).square().mean() for factor, target in targets).backward()
    return {name: p.grad.clone() for name, p in trainer.transformer.named_parameters() if p.requires_grad}


FIRST_STEP = {"num_inference_steps": 2, "skip_last_steps": 1, "objective": "velocity"}


@pytest.mark.parametrize(
    ("settings", "losses"),
    [
        ({"targets": {"count": {"count": 0.25, "scene": 0.75}}}, [(1, {"count": 0.25, "scene": 0.75})]),
        ({"teacher_extrapolation": 1.5}, [(1, {"count": 1.5, "base": -0.5})]),
        ({"teacher_extrapolation": 0.5, "extrapolation_reference": "scene"}, [(1, {"count": 0.5, "scene": 0.5})]),
        ({"targets": {"count": {"count": 0.5, "base": 0.5}}, "teacher_extrapolation": 2.0}, [(1, {"count": 1.0})]),
        ({"anchor": "base", "anchor_weight": 0.5}, [(1, {"count": 1.0}), (0.5, {"base": 1.0})]),
        ({"anchor": "scene"}, [(1, {"count": 1.0}), (0.04, {"scene": 1.0})]),
    ],
)
def test_targets_are_sums_of_velocities(tmp_path, settings, losses):
    teachers, used = guided_teachers(tmp_path), {model for _, terms in losses for model in terms}
    trainer = make_trainer(
        tmp_path,
        teachers={task: teachers[task] for task in teachers if task in used},
        data={"count": PROMPTS["count"]},
        targets=settings.get("targets", {"count": {"count": 1.0}}),
        **FIRST_STEP,
        **{name: value for name, value in settings.items() if name != "targets"},
    )
    policies = {**trainer.teachers, "base": Policy("base", 2.0)}
    expected = [(factor, [(weight, policies[model]) for model, weight in terms.items()]) for factor, terms in losses]
    got, prompts = run_round(trainer), trainer.rounds.batches(0)[0].prompts
    assert any(gradient.abs().max() > 1e-6 for gradient in got.values())
    for key, gradient in first_step_gradient(trainer, prompts, prompts, expected).items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-4, atol=1e-8)


def test_guidance_of_teachers_is_folded_into_an_unguided_student(tmp_path):
    settings = {**FIRST_STEP, "guidance_scale": 1.0, "teacher_guidance_scale": 3.0}
    trainer = make_trainer(
        tmp_path,
        teachers={"count": make_teachers(tmp_path)["count"]},
        data={"count": PROMPTS["count"]},
        **settings,
    )
    assert trainer.teachers["count"].guidance_scale == 3 and trainer.student_policy.guidance_scale == 1
    got, prompts = run_round(trainer), trainer.rounds.batches(0)[0].prompts
    guided = [(1, [(1, Policy("", 3.0, trainer.teachers["count"].adapters))])]
    for key, gradient in first_step_gradient(trainer, prompts, prompts, guided).items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("given", ["column", "function"])
def test_the_student_is_asked_in_other_words_than_the_teacher(tmp_path, given):
    rows = [{"prompt": prompt, "words": f"here is {prompt}"} for prompt in PROMPTS["count"]]
    trainer = make_trainer(
        tmp_path,
        teachers={"count": make_teachers(tmp_path)["count"]},
        data={"count": rows},
        **FIRST_STEP,
        student_prompt="words" if given == "column" else lambda row, seed: f"here is {row['prompt']}",
    )
    batch = trainer.rounds.batches(0)[0]
    assert batch.asked == [f"here is {prompt}" for prompt in batch.prompts]
    got = run_round(trainer)
    target = [(1, [(1, trainer.teachers["count"])])]
    for key, gradient in first_step_gradient(trainer, batch.asked, batch.prompts, target).items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-4, atol=1e-8)
    same = first_step_gradient(trainer, batch.prompts, batch.prompts, target)
    assert any(not torch.allclose(got[key], same[key], rtol=1e-2) for key in got if got[key].abs().max() > 0)


def test_a_student_that_starts_from_the_sum_does_what_the_sum_does(tmp_path):
    lora = small_lora(r=8, lora_alpha=4, target_modules=JOINT)
    trainer = make_trainer(tmp_path, merge_teachers="sum", peft_config=lora)
    batch = trainer.rounds.batches(0)[0]
    x, _ = trainer.sampler.noise(batch.seeds)
    text, timestep = trainer.prompts.conditioning(batch.prompts), trainer.schedule.timesteps[1]
    names = tuple(name for teacher in trainer.teachers.values() for name in teacher.adapters)
    student, both, base = (
        trainer.sampler.velocity(Policy("", 1.0, adapters), x, timestep, text)
        for adapters in (("default",), names, ())
    )
    assert (both - base).abs().max() > 1e-3
    torch.testing.assert_close(student, both, rtol=1e-4, atol=1e-5)


def test_the_teachers_samples_are_drawn_once(tmp_path):
    settings = {**RUNS["sft"], "max_steps": 4}
    first = make_trainer(tmp_path, **settings)
    first.train()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "_samples").iterdir()}
    seen = {(batch.task, prompt) for r in range(4) for batch in first.rounds.batches(r) for prompt in batch.prompts}
    assert len(files) == len(seen)
    second = make_trainer(tmp_path, **settings)
    drawn = []
    second.sampler.sample_latents = lambda *args, **kwargs: drawn.append(args)
    second.train()
    assert not drawn
    assert {path: path.stat().st_mtime_ns for path in files} == files
    for key, tensor in student_state(second).items():
        assert torch.equal(tensor, student_state(first)[key])


def test_damaged_samples_are_drawn_again(tmp_path):
    settings = {**RUNS["sft"], "max_steps": 1}
    first = make_trainer(tmp_path, **settings)
    first.train()
    for path in (tmp_path / "out" / "_samples").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    second = make_trainer(tmp_path, **settings)
    second.train()
    for key, tensor in student_state(second).items():
        assert torch.equal(tensor, student_state(first)[key])


def test_tasks_that_lag_get_weight(tmp_path):
    trainer = trainer_of(tmp_path, "adaptive")
    trainer.balance.add({"count": 1.0, "scene": 2.0})
    assert trainer.balance.weights() == {"count": 1.0, "scene": 1.0}
    trainer.balance.average = {"count": 0.25, "scene": 1.5}
    assert trainer.balance.weights() == {"count": pytest.approx(0.5), "scene": pytest.approx(1.5)}
    plain = run_round(trainer_of(tmp_path, "adaptive", adaptive_task_weights=0.0))
    weighted = run_round(trainer)
    alone = {
        task: run_round(make_trainer(tmp_path, teachers={task: guided_teachers(tmp_path)[task]}, data={task: data}))
        for task, data in PROMPTS.items()
    }
    for key in plain:
        expected = (0.5 * alone["count"][key] + 1.5 * alone["scene"][key]) / 2
        torch.testing.assert_close(weighted[key], expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "ppo"}, "`objective` must be one of kl, mean, .*, but is 'ppo'"),
        ({"objective_kwargs": {"beta": 1}}, "has beta, but the objective 'kl' has no settings"),
        ({"objective": "branches", "guidance_scale": 1.0}, "both branches of the student's guidance, but at"),
        ({"objective": "branches", "teachers": "as they are"}, "at guidance 1 the teacher of task 'scene' has one"),
        (
            {"objective": "branches", "teacher_guidance_scale": 1.0, "anchor": "base", "teachers": "guided"},
            "at guidance 1 the base in a target has one",
        ),
        (
            {"objective": "policy_gradient", "noise_level": 0.7, "solver": "ddim", "skip_last_steps": 0},
            "step 3 of 4 of the solver 'ddim' has none. Leave it out: `skip_last_steps=1`",
        ),
        ({"targets": {"count": None}}, "must map models to weights"),
        ({"objective": "policy_gradient"}, "at `noise_level` 0 the step is a function of the state"),
        ({"objective": "dmd", "noise_level": 0.7}, "along its ODE, but `noise_level` is 0.7"),
        ({"objective": "sft"}, "to be used without guidance, but `guidance_scale` is 2"),
        ({"objective": "sft", "query_steps": 1}, "`query_steps` is of objectives that compare"),
        ({"query_steps": 9}, "at most the number of trained steps, 3, but is 9"),
        ({"query_distribution": "late"}, "Set `query_steps`"),
        (
            {"objective": "policy_gradient", "noise_level": 0.7, "query_steps": 1, "query_distribution": "importance"},
            "needs an objective that is a weighted distance",
        ),
        ({"targets": {"count": {"count": 0.5}}}, "must sum to 1, but sum to 0.5"),
        ({"targets": {"count": {"nobody": 1.0}}}, "unknown models \\['nobody'\\]"),
        ({"targets": {"count": {"scene": 1.0}}}, "teachers that no task follows: \\['count'\\]"),
        ({"targets": {"else": {"base": 1.0}}}, "names tasks without prompts: \\['else'\\]"),
        ({"anchor": "nobody"}, "`anchor` must be one of count, scene, base, average"),
        ({"anchor": "average"}, "Set `ema_decay`"),
        ({"teacher_extrapolation": float("nan")}, "teacher_extrapolation"),
        ({"merge_teachers": "soup"}, "`merge_teachers` must be one of sum, mean, ties, dare, ssr"),
        ({"student_prompt": "words"}, "is the column 'words', but the prompts of task 'count' have only prompt"),
        ({"student_prompt": 3}, "the name of a column or a function"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, settings, message):
    settings = dict(settings)
    given = settings.pop("teachers", None)
    teachers = make_teachers(tmp_path) if given == "as they are" else guided_teachers(tmp_path)
    if given == "guided":
        teachers = {task: {"name_or_path": teacher, "guidance_scale": 2.0} for task, teacher in teachers.items()}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, teachers=teachers, pipeline=tiny_pipeline(), **settings)
