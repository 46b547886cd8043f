# SPDX-License-Identifier: Apache-2.0
"""Evaluation, comparison and images: values, and that they leave training alone."""

import json
import math

import PIL.Image
import pytest
import torch

from tests.support.runs import PROMPTS, make_teachers, make_trainer, student_state
from tests.support.tiny import random_lora, save_diffusers_lora, tiny_transformer
from trl_diffusion_opd.evaluation.comparison import format_table, save_results
from trl_diffusion_opd.evaluation.gains import gains
from trl_diffusion_opd.evaluation.score import evaluation_batch
from trl_diffusion_opd.lora.adapters import use_adapter
from trl_diffusion_opd.losses.opd import step_divergence
from trl_diffusion_opd.utils.figures import draw_curves, image_grid


def brightness(images, prompts, **columns):
    assert images.dtype == torch.float32 and images.shape[1:] == (3, 16, 16)
    assert 0 <= images.min() and images.max() <= 1
    return [float(image.mean()) for image in images]


def length(images, prompts, **columns):
    return [len(prompt) for prompt in prompts]


def test_metrics_of_every_task_with_independent_values(tmp_path):
    trainer = make_trainer(
        tmp_path, eval_dataset=PROMPTS, reward_funcs={"count": [brightness, length], "scene": length}
    )
    metrics = trainer.evaluate()
    assert metrics["eval_reward/length/count"] == pytest.approx(sum(map(len, PROMPTS["count"])) / 5)
    assert metrics["eval_reward/scene"] == pytest.approx(sum(map(len, PROMPTS["scene"])) / 3)
    batch = evaluation_batch(trainer.eval_datasets["count"], "count", list(range(5)), seed=42, column="prompt")
    images = trainer.grid.sample_batch(trainer.student_policy, batch)
    assert metrics["eval_reward/brightness/count"] == pytest.approx(images.mean().item(), rel=1e-4)
    expected = metrics["eval_reward/brightness/count"] + metrics["eval_reward/length/count"]
    assert metrics["eval_reward/count"] == pytest.approx(expected)
    conditioning = trainer.grid.prompts.conditioning(batch.prompts)
    text, values = conditioning.batch(2.0), []
    for step in list(trainer.evaluator.rollout(trainer.student_policy, conditioning, batch.seeds))[:3]:
        timestep = trainer.eval_schedule.timesteps[step.index]
        with torch.no_grad(), use_adapter(trainer.transformer, "teacher_0"):
            target = trainer.model(step.sample, timestep, *text, 2.0)
        values.append(step_divergence(step.velocity, target, step.transition))
    assert metrics["eval_kl/count"] == pytest.approx(torch.stack(values).mean().item(), rel=1e-4)
    assert metrics["eval_loss"] == pytest.approx((metrics["eval_kl/count"] + metrics["eval_kl/scene"]) / 2)


def test_average_and_raw_weights_are_both_evaluated(tmp_path):
    settings = {"eval_dataset": {"count": PROMPTS["count"]}, "reward_funcs": {"count": brightness}}
    trainer = make_trainer(tmp_path, max_steps=4, ema_decay=0.9, ema_update_every=1, **settings)
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_kl/count", "eval_raw_kl/count", "eval_reward/count", "eval_raw_reward/count"} <= metrics.keys()
    assert metrics["eval_raw_kl/count"] != metrics["eval_kl/count"]
    trainer.ema.load_state_dict({name: p.detach().clone() for name, p in trainer.ema.parameters.items()})
    assert trainer.evaluate()["eval_kl/count"] == pytest.approx(metrics["eval_raw_kl/count"], rel=1e-6)


def test_evaluating_does_not_change_training(tmp_path):
    states = []
    for settings in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": PROMPTS, "num_grid_prompts": 1}):
        trainer = make_trainer(tmp_path, max_steps=3, **settings)
        trainer.train()
        states.append(student_state(trainer))
    assert all(tensor.equal(states[1][name]) for name, tensor in states[0].items())
    trainer.train()  # prepares the evaluation's embeddings
    before = torch.get_rng_state()
    trainer.evaluate()
    assert torch.get_rng_state().equal(before)


def test_unknown_tasks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`eval_dataset` names unknown tasks \\['nope'\\]"):
        make_trainer(tmp_path).evaluate({"nope": ["a"]})


def test_evaluations_repeat_exactly_and_batching_does_not_matter(tmp_path):
    metrics = [
        make_trainer(tmp_path, eval_dataset=PROMPTS, per_device_eval_batch_size=size).evaluate() for size in (4, 4, 1)
    ]
    assert metrics[0]["eval_kl/count"] == metrics[1]["eval_kl/count"]
    assert metrics[0]["eval_kl/count"] == pytest.approx(metrics[2]["eval_kl/count"], rel=1e-4)


def test_num_eval_images_repeats_prompts_with_other_noise(tmp_path):
    prompts_seen = []

    def spy(images, prompts, **columns):
        prompts_seen.extend(prompts)
        seen_images.extend(images)
        return [0.0] * len(prompts)

    seen_images = []
    settings = {"eval_dataset": {"scene": PROMPTS["scene"]}, "reward_funcs": {"scene": spy}, "num_eval_images": 7}
    make_trainer(tmp_path, **settings).evaluate()
    assert prompts_seen == [PROMPTS["scene"][i % 3] for i in range(7)]
    assert (seen_images[0] - seen_images[3]).abs().max() > 1e-3


def test_failed_scores_are_counted_and_left_out(tmp_path):
    def sometimes(images, prompts, **columns):
        return [None if "red" in prompt else 2.0 for prompt in prompts]

    trainer = make_trainer(tmp_path, eval_dataset={"count": PROMPTS["count"]}, reward_funcs={"count": sometimes})
    metrics = trainer.evaluate()
    assert metrics["eval_reward/count"] == 2.0 and metrics["eval_reward_failures/count"] == 2


def test_rewards_get_the_other_columns(tmp_path):
    def check(images, prompts, tag, **columns):
        assert len(tag) == len(prompts)
        return tag

    data = {"count": [{"prompt": "a red circle", "tag": 1.5}, {"prompt": "a boat", "tag": 2.5}]}
    metrics = make_trainer(tmp_path, eval_dataset=data, reward_funcs={"count": check}).evaluate()
    assert metrics["eval_reward/count"] == 2.0


def test_a_reward_with_too_few_scores_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset={"count": ["a", "b"]}, reward_funcs={"count": lambda *a, **k: [1.0]})
    with pytest.raises(ValueError, match="returned 1 scores for 2 images"):
        trainer.evaluate()


def test_nothing_to_evaluate_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="Pass an `eval_dataset`"):
        make_trainer(tmp_path).evaluate()


# Comparison


def test_comparison_scores_base_teachers_merge_and_student(tmp_path):
    rewards = {"count": brightness, "scene": brightness}
    trainer = make_trainer(tmp_path, eval_dataset=PROMPTS, reward_funcs=rewards, guidance_scale=1.0)
    results = trainer.compare()
    assert results["student"] == results["base"], "a new student is the base"
    assert set(results["teachers"]) == {"count", "scene"} and set(results["merge"]) == {"count", "scene"}
    batch = evaluation_batch(trainer.eval_datasets["count"], "count", list(range(5)), seed=42, column="prompt")
    conditioning = trainer.grid.prompts.conditioning(batch.prompts)

    # The merge, independently: a fresh transformer with both updates added to its weights.
    merged = tiny_transformer()
    weights = merged.state_dict()
    for (config, state), scaling in (
        (random_lora(seed=1, scale=0.1), 8 / 4),
        (random_lora(rank=2, alpha=3, seed=2, scale=0.1), 3 / 2),
    ):
        for name in state:
            if "lora_A" in name:
                update = state[name.replace("lora_A", "lora_B")] @ state[name]
                weights[name.replace("lora_A.", "")] += scaling * update
        assert config.lora_alpha / config.r == scaling
    x = trainer.sampler.noise(batch.seeds)[0]
    for j in range(4):
        text = conditioning.positive["prompt_embeds"], conditioning.positive["pooled_prompt_embeds"]
        v = merged(x, *text, trainer.schedule.timesteps[j].repeat(5), return_dict=False)[0]
        x = (x + (trainer.schedule.sigmas[j + 1] - trainer.schedule.sigmas[j]) * v).detach()
    assert results["merge"]["count"] == pytest.approx(trainer.sampler.decode(x).mean().item(), rel=1e-4)


def test_the_table_and_its_file(tmp_path):
    results = {
        "base": {"ocr": 0.5, "aesthetic": 0.2},
        "teachers": {"ocr": {"ocr": 0.9, "aesthetic": 0.1}, "aesthetic": {"ocr": 0.4, "aesthetic": 0.7}},
        "merge": {"ocr": 0.6, "aesthetic": 0.5},
        "student": {"ocr": 0.88, "aesthetic": 0.7},
    }
    assert gains(results) == pytest.approx({"ocr": 0.95, "aesthetic": 1.0})
    table = format_table(results)
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1, table
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "base",
        "teacher ocr",
        "teacher aesthetic",
        "merge of the teachers",
        "**student**",
        "share of the gain",
    ]
    assert "0.880" in lines[6] and "95%" in lines[7] and "100%" in lines[7]
    assert json.loads(save_results(results, tmp_path).read_text()) == results


def test_comparison_without_rewards_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pass `eval_dataset` and `reward_funcs`"):
        make_trainer(tmp_path, eval_dataset=PROMPTS).compare()


# Images


def test_image_grids_are_drawn_saved_and_reported(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(
        tmp_path,
        max_steps=4,
        num_grid_prompts=1,
        eval_strategy="steps",
        eval_steps=3,  # so that the last grid is not that of an evaluation
        eval_dataset=PROMPTS,
        learning_rate=0.1,
        report_to=["tensorboard"],
        save_curves=True,
    )
    trainer.train()
    files = sorted(path.name for path in (tmp_path / "out" / "images").glob("step_*"))
    assert files == ["step_000003.png", "step_000004.png"]
    grids = [PIL.Image.open(tmp_path / "out" / "images" / name).convert("RGB") for name in files]
    tile, margin = 96, 6
    columns = [  # base, student, two teachers
        [grid.crop((margin + c * (tile + margin), 0, (c + 1) * (tile + margin), grid.height)) for grid in grids]
        for c in range(4)
    ]
    same = [first.tobytes() == second.tobytes() for first, second in columns]
    assert same == [True, False, True, True], "only the student's column changes"
    assert len({column[1].tobytes() for column in columns}) == 4
    events = next((tmp_path).rglob("events.out.tfevents*")).parent
    accumulator = EventAccumulator(str(events), size_guidance={"images": 0}).Reload()
    assert [image.step for image in accumulator.Images("images")] == [3, 4]
    assert "train/kl/count" in accumulator.Tags()["scalars"]
    curves = PIL.Image.open(tmp_path / "out" / "curves.png")
    assert curves.width > 1000 and len(curves.convert("L").getcolors()) > 20


def test_grid_labels_fit_their_columns():
    images = [torch.rand(3, 16, 16) for _ in range(2)]
    grid = image_grid({"a": images, "teacher composition": images}, ["a prompt " * 20, "short"])
    assert grid.width == 2 * (96 + 6) + 6
    assert grid.height > 2 * 96
    large = image_grid({"a": [torch.rand(3, 512, 512)]}, ["x"])
    assert large.width == 384 + 12


def test_curves_of_a_run_without_logs_are_not_drawn(tmp_path):
    draw_curves([{"step": 1, "train_runtime": 1.0}], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_a_full_model_teacher_has_no_merge(tmp_path):
    teachers = make_teachers(tmp_path, scene=tiny_transformer(seed=5))
    trainer = make_trainer(
        tmp_path, teachers=teachers, eval_dataset=PROMPTS, reward_funcs={"count": brightness}, guidance_scale=1.0
    )
    results = trainer.compare()
    assert "merge" not in results and math.isfinite(results["teachers"]["scene"]["count"])
    assert "merge" not in format_table(results)


def test_a_teacher_with_magnitudes_has_no_merge(tmp_path):
    """Its update cannot be added to others: PEFT rescales what the adapters before it gave."""
    dora = save_diffusers_lora(tmp_path / "dora", *random_lora(seed=3, use_dora=True))
    teachers = make_teachers(tmp_path, scene=str(dora))
    results = make_trainer(
        tmp_path, teachers=teachers, eval_dataset=PROMPTS, reward_funcs={"count": brightness}, guidance_scale=1.0
    ).compare()
    assert "merge" not in results and math.isfinite(results["teachers"]["scene"]["count"])


def test_a_student_of_a_zero_teacher_stays_the_base(tmp_path):
    config, state = random_lora(seed=1)
    save_diffusers_lora(tmp_path / "zero", config, {k: torch.zeros_like(v) for k, v in state.items()})
    data = {"count": PROMPTS["count"]}
    trainer = make_trainer(tmp_path, teachers={"count": str(tmp_path / "zero")}, data=data, eval_dataset=data)
    assert trainer.evaluate()["eval_kl/count"] == 0.0
