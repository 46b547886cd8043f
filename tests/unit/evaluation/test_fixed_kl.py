# SPDX-License-Identifier: Apache-2.0
"""The divergence from the teacher at states that are the same for all students."""

import copy

import pytest
import torch

from tests.support.runs import PROMPTS, make_teachers, make_trainer
from tests.support.tiny import random_lora, save_diffusers_lora
from trl_diffusion_opd.lora.adapters import use_adapter


HELD_OUT = {task: prompts[:3] for task, prompts in PROMPTS.items()}
SETTINGS = {"eval_dataset": HELD_OUT, "eval_fixed_kl": True, "eval_num_inference_steps": 5}


def move_student(trainer, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trainer.transformer.named_parameters():
        if ".default." in name:
            parameter.data.normal_(0.0, 0.2, generator=generator)


@torch.no_grad()
def reference(trainer, task: str, noise_level: float) -> float:
    """By the book, in float64: the teacher is rolled out, and the student is asked at each of its states."""
    transformer = copy.deepcopy(trainer.transformer).double()
    teacher = trainer.loaded_teachers[task]
    rows = HELD_OUT[task]
    batch = trainer.evaluator.batch(trainer.eval_datasets[task], task, list(range(len(rows))))
    encoded = trainer.prompts.encode([*rows, ""])
    x, generators = trainer.sampler.noise(batch.seeds)
    x = x.double()
    sigmas, timesteps = trainer.eval_schedule.sigmas.double().tolist(), trainer.eval_schedule.timesteps

    def guided(name: str, scale: float, time: torch.Tensor) -> torch.Tensor:
        def forward(prompts):
            embeds, pooled = (torch.stack([encoded[p][key] for p in prompts]).double() for key in encoded[""])
            return transformer(x, embeds, pooled, time.double().repeat(len(x)), return_dict=False)[0]

        with use_adapter(transformer, name):
            if scale <= 1:
                return forward(rows)
            negative = forward([""] * len(rows))
            return negative + scale * (forward(rows) - negative)

    values = []
    for j in range(len(timesteps) - trainer.args.skip_last_steps):
        s, dt = sigmas[j], sigmas[j + 1] - sigmas[j]
        k2 = noise_level**2 * s / (1 - (sigmas[1] if s == 1 else s))
        v = guided(teacher.adapter_name, teacher.guidance_scale, timesteps[j])
        coefficient = (1 + k2 * (1 - s) / (2 * s)) * dt
        difference = coefficient * (guided("default", 2.0, timesteps[j]) - v)
        values.append(difference.square().mean() / (2 * (k2 * -dt if noise_level else 1.0)))
        x = (1 + k2 / (2 * s) * dt) * x + coefficient * v
        if noise_level:
            noise = torch.stack([torch.randn(x.shape[1:], generator=generator) for generator in generators])
            x = x + (k2 * -dt) ** 0.5 * noise.double()
    return torch.stack(values).mean().item()


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
def test_equals_an_independent_reference(tmp_path, noise_level):
    trainer = make_trainer(tmp_path, **SETTINGS, eval_noise_level=noise_level)
    move_student(trainer)
    metrics = trainer.evaluate()
    for task in HELD_OUT:
        expected = reference(trainer, task, noise_level)
        assert metrics[f"eval_fixed_kl/{task}"] == pytest.approx(expected, rel=1e-4)
        assert metrics[f"eval_fixed_kl/{task}"] != pytest.approx(metrics[f"eval_kl/{task}"], rel=1e-2)
    assert metrics["eval_loss"] == pytest.approx(sum(metrics[f"eval_kl/{task}"] for task in HELD_OUT) / 2)


def test_is_zero_of_a_student_that_is_its_teacher(tmp_path):
    config, state = random_lora(seed=1)
    save_diffusers_lora(tmp_path / "zero", config, {name: torch.zeros_like(t) for name, t in state.items()})
    teachers = make_teachers(tmp_path, count=str(tmp_path / "zero"))
    metrics = make_trainer(tmp_path, teachers=teachers, **SETTINGS).evaluate()
    assert metrics["eval_fixed_kl/count"] == 0.0 < metrics["eval_fixed_kl/scene"]


def test_does_not_depend_on_the_batch_size(tmp_path):
    values = []
    for size in (1, 2, 3):
        trainer = make_trainer(tmp_path, **SETTINGS, per_device_eval_batch_size=size)
        move_student(trainer)
        values.append(trainer.evaluate()["eval_fixed_kl/count"])
    assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-6)


def test_its_states_are_those_of_the_teacher_whoever_the_student_is(tmp_path):
    trainer = make_trainer(tmp_path, **SETTINGS)
    velocity, seen = trainer.sampler.velocity, []

    def watched(policy, sample, *args):
        seen[-1].append((policy.name, sample.clone()))
        return velocity(policy, sample, *args)

    trainer.sampler.velocity = watched
    values = []
    for seed in (5, 6):
        move_student(trainer, seed)
        seen.append([])
        values.append(trainer.evaluate()["eval_fixed_kl/count"])
    assert values[0] != values[1]
    # Of each task: 5 steps of the student, 4 of them with its teacher; then 5 of the teacher, 4 with the student
    assert [len(calls) for calls in seen] == [2 * (9 + 9)] * 2
    for (name, state), (_, other) in zip(seen[0][9:18], seen[1][9:18], strict=True):
        assert torch.equal(state, other), name
    assert [name for name, _ in seen[0][9:18]] == ["teacher count", "student"] * 4 + ["teacher count"]
    assert not torch.equal(seen[0][4][1], seen[1][4][1])


def test_of_both_weights_where_there_is_an_average_and_of_none_unless_asked(tmp_path):
    trainer = make_trainer(tmp_path, **SETTINGS, ema_decay=0.5, ema_update_every=1)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_fixed_kl/count"] != metrics["eval_raw_fixed_kl/count"]
    names = make_trainer(tmp_path, **{**SETTINGS, "eval_fixed_kl": False}).evaluate()
    assert not [name for name in names if "fixed" in name] and "eval_kl/count" in names
