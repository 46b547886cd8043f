# SPDX-License-Identifier: Apache-2.0
"""Rounds of the trainers that learn from rewards: groups of images, rewards of all kinds, several tasks."""

import asyncio
import math
import threading
import time

import pytest
import torch
from datasets import IterableDataset

from tests.support.rl_runs import TRAINERS, Forwards, brightness, logs, make_trainer, prepare, redness, run_round
from tests.support.runs import PROMPTS
from tests.support.tiny import tiny_pipeline


def learned_from(trainer) -> list:
    """The batches that a trainer goes on to learn from, in order, for as long as it lives."""
    seen, learn = [], trainer.learn

    def note(model, experience, loss_weight, is_last_batch):
        seen.append(experience)
        return learn(model, experience, loss_weight, is_last_batch)

    trainer.learn = note
    return seen


def given(*scores):
    """A reward that gives these scores to the images of a batch, or lists of them to those of one after another."""
    batches = list(scores) if isinstance(scores[0], list) else None

    def given_scores(images, prompts, **columns):
        return batches.pop(0) if batches is not None else list(scores)

    return given_scores


class TestGroups:
    def test_images_of_a_group_share_a_prompt_and_no_noise(self, tmp_path):
        """4 images a prompt, 2 a batch, 2 micro-rounds, 2 steps: a rollout of 8 images holds 2 prompts."""
        trainer = make_trainer(
            "grpo", tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, steps_per_rollout=2
        )
        asked = []
        trainer.reward_funcs["brightness"] = [
            lambda images, prompts, **columns: asked.extend(prompts) or [0.0, 1.0],
        ]
        seen = learned_from(trainer)
        trainer.train()
        assert len(asked) == 8 and asked[0] != asked[4] and set(asked) <= set(PROMPTS["count"])
        assert asked == [asked[0]] * 4 + [asked[4]] * 4
        batches = [experience.batch for experience in seen]
        assert [batch.prompts for batch in batches] == [asked[:2], asked[2:4], asked[4:6], asked[6:]]
        assert [group for batch in batches for group in batch.groups] == [0] * 4 + [1] * 4
        assert len({seed for batch in batches for seed in batch.seeds}) == 8

    def test_an_epoch_has_every_prompt_once(self, tmp_path):
        trainer = make_trainer("grpo", tmp_path, num_generations=2, num_train_epochs=2, max_steps=-1)
        seen = learned_from(trainer)
        trainer.train()
        assert trainer.state.global_step == 6, "5 prompts, 2 in a round"
        prompts = [prompt for experience in seen for prompt in experience.batch.prompts]
        assert sorted(prompts[:10]) == sorted(2 * PROMPTS["count"])
        assert sorted(prompts[10:20]) == sorted(2 * PROMPTS["count"]) and prompts[10:20] != prompts[:10]

    def test_tasks_have_their_share_and_their_own_reward(self, tmp_path):
        called = []

        def note(name):
            def reward(images, prompts, **columns):
                called.append((name, tuple(prompts)))
                return brightness(images, prompts)

            return reward

        trainer = make_trainer(
            "nft", tmp_path, rewards={"count": note("count"), "scene": note("scene")}, task_weights={"scene": 2}
        )
        seen = learned_from(trainer)
        trainer.train()
        assert [name for name, _ in called] == ["count", "scene", "scene"] * 2
        assert all(len(set(prompts)) == 1 and prompts[0] in PROMPTS[name] for name, prompts in called)
        assert [experience.batch.task for experience in seen] == ["count", "scene", "scene"] * 2
        assert [experience.batch.groups[0] for experience in seen] == [0, 0, 1, 1, 2, 3]

    def test_prompts_beyond_the_cache_are_encoded_rollout_by_rollout(self, tmp_path):
        whole = run_round(make_trainer("grpo", tmp_path, num_generations=2, steps_per_rollout=2), 2)
        trainer = make_trainer("grpo", tmp_path, num_generations=2, steps_per_rollout=2, prompt_cache_size=4)
        for name, gradient in run_round(trainer, 2).items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-9)
        assert len(trainer.prompts._embeddings) <= 5
        with pytest.raises(ValueError, match="`prompt_cache_size` is 3, but this process needs 4 prompts at once"):
            make_trainer("grpo", tmp_path, num_generations=2, steps_per_rollout=2, prompt_cache_size=3)


class TestAdvantages:
    def test_larger_rewards_of_a_task_do_not_change_the_update(self, tmp_path):
        def times(factor, reward):
            return lambda images, prompts, **columns: [factor * score for score in reward(images, prompts)]

        # So large that the small constant in the denominator does not matter.
        def step(factor):
            rewards = {"count": times(1e4, brightness), "scene": times(factor, redness)}
            trainer = make_trainer("grpo", tmp_path, rewards=rewards)
            return learned_from(trainer), run_round(trainer)

        (first, gradients), (second, others) = step(1e4), step(1e6)
        assert [e.batch.task for e in first] == ["count", "scene"]
        assert first[0].advantages.equal(second[0].advantages)
        torch.testing.assert_close(first[1].advantages, second[1].advantages, rtol=1e-4, atol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())

    def test_advantages_are_clipped(self, tmp_path):
        trainer = make_trainer("nft", tmp_path, rewards=given(0, 0, 0, 1), advantage_clip=0.7)
        seen = learned_from(trainer)
        run_round(trainer)
        std = math.sqrt(3) / 4
        torch.testing.assert_close(seen[0].advantages, torch.tensor([-0.25 / (std + 1e-4)] * 3 + [0.7]))

    @pytest.mark.parametrize("method", ["grpo", "nft"])
    def test_what_is_not_learned_from_has_no_influence(self, tmp_path, method):
        """Failed scores, and for GRPO images as good as the mean: their trajectories may be anything, also NaN."""
        scores = [0.0, 1.0, math.nan, None, 0.5, math.inf] if method == "grpo" else [0, 1, math.nan, None, 0, math.inf]
        settings = {"rewards": given(*scores), "per_device_train_batch_size": 6, "num_generations": 6}
        gradients = run_round(make_trainer(method, tmp_path, **settings))
        trainer = make_trainer(method, tmp_path, **settings)
        learn = trainer.learn

        def spoil(model, experience, loss_weight, is_last_batch):
            assert experience.taken.tolist() == [True, True, False, False, method == "nft", False]
            steps = [] if method == "nft" else experience.trajectory
            kept = [tensor for step in steps for tensor in (step.sample, step.velocity, step.noise)]
            for tensor in kept or [experience.trajectory]:
                tensor[~experience.taken] = math.nan
            return learn(model, experience, loss_weight, is_last_batch)

        trainer.learn = spoil
        for name, gradient in run_round(trainer).items():
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
        assert any(gradient.abs().max() > 0 for gradient in gradients.values())

    def test_the_loss_is_the_mean_over_what_is_learned_from(self, tmp_path):
        """Two images with a score among four weigh as much as two alone."""
        alone = make_trainer("nft", tmp_path, rewards=given(0, 1), num_generations=2, per_device_train_batch_size=2)
        among = make_trainer("nft", tmp_path, rewards=given(0, 1, None, None))
        expected = run_round(alone)
        for name, gradient in run_round(among).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * gradient.abs().max().item())

    def test_batches_of_equal_images_are_not_forwarded(self, tmp_path):
        trainer = make_trainer("grpo", tmp_path, rewards={"count": given(7, 7, 7, 7), "scene": brightness})
        with Forwards(trainer.model) as forwards:
            run_round(trainer)
        assert sum(forwards.graded) == 3 and len(forwards.graded) == 3 + 2 * 4, "3 trained steps of one batch of two"
        assert trainer.metrics["frac_reward_zero_std/count"] == [1.0]
        assert "log_ratio/count" not in trainer.metrics and trainer.metrics["log_ratio/scene"] == [0.0]

    @pytest.mark.parametrize(("method", "scores"), [("grpo", [2] * 4), ("grpo", [None] * 4), ("nft", [None] * 4)])
    def test_a_rollout_without_anything_to_learn_goes_by(self, tmp_path, method, scores):
        trainer = make_trainer(method, tmp_path, rewards={"count": given(*scores), "scene": given(*scores)})
        with Forwards(trainer.model) as forwards:
            gradients = run_round(trainer)
        assert sum(forwards.graded) == 3, "one batch all the same, for the other processes"
        assert all(gradient.abs().max() == 0 for gradient in gradients.values())
        trainer.train()
        assert trainer.state.global_step == 2 and logs(trainer, "loss") == [0, 0]


class TestRewards:
    def test_failures_are_counted_and_left_out_of_the_mean(self, tmp_path):
        rewards = given([0.25, None, 0.75, math.nan], [1.0, 0.0, 0.5, 0.5], [None] * 4)
        trainer = make_trainer("grpo", tmp_path, rewards=rewards, max_steps=3, learning_rate=1e-4)
        trainer.train()
        assert logs(trainer, "reward_failures/given_scores") == [2, 0, 4]
        assert logs(trainer, "reward/given_scores") == [0.5, 0.5], "a mean over nothing is not logged"
        assert logs(trainer, "reward_std/given_scores") == pytest.approx([0.25, math.sqrt(1 / 8)])
        assert logs(trainer, "frac_reward_zero_std/given_scores") == [0.5, 0.5, 1.0]

    def test_plain_async_and_weighted_rewards_get_the_columns(self, tmp_path):
        rows = [{"prompt": prompt, "answer": prompt.upper(), "n": n} for n, prompt in enumerate(PROMPTS["count"])]
        graded = []

        def plain(images, prompts, answer, n, **columns):
            assert answer == [prompt.upper() for prompt in prompts] and n == [
                PROMPTS["count"].index(p) for p in prompts
            ]
            assert not columns and images.shape == (4, 3, 16, 16) and 0 <= images.min() <= images.max() <= 1
            graded.append(torch.is_grad_enabled())
            return torch.tensor([0.0, 1.0, 2.0, 4.0])

        async def later(images, prompts, n, **columns):
            await asyncio.sleep(0)
            graded.append(torch.is_grad_enabled())
            return [4.0, None, 0.0, 0.0]

        trainer = make_trainer(
            "grpo", tmp_path, rewards=[plain, later], data=rows, reward_weights=[1.0, 0.5], eval_dataset=rows[:4]
        )
        seen = learned_from(trainer)
        run_round(trainer)
        assert trainer.metrics["reward/plain+later"] == pytest.approx([8 / 3])
        assert trainer.metrics["reward/plain/plain+later"] == [7 / 4]
        assert trainer.metrics["reward/later/plain+later"] == pytest.approx([4 / 3])
        assert trainer.metrics["reward_failures/plain+later"] == [1]
        assert seen[0].rewards["reward"][::2] == [2.0, 2.0] and math.isnan(seen[0].rewards["reward"][1])
        assert seen[0].taken.tolist() == [True, False, True, True]
        assert graded == [False, False], "no gradients in the threads either"
        trainer.reward_funcs["plain+later"][0] = lambda images, prompts, **columns: [1.0] * len(prompts)

        async def in_a_notebook():
            return trainer.evaluate()

        metrics = asyncio.run(in_a_notebook())
        assert metrics["eval_reward/plain+later"] == pytest.approx((3 + 1 + 1) / 3), "weighted there too"
        assert metrics["eval_reward_failures/plain+later"] == 1 and graded == [False] * 3

    def test_a_client_that_is_kept_stays_in_its_event_loop(self, tmp_path):
        loops = []

        async def remote(images, prompts, **columns):
            loops.append(asyncio.get_running_loop())
            assert loops[-1] is loops[0] and not torch.is_grad_enabled()
            return brightness(images, prompts)

        trainer = make_trainer(
            "grpo", tmp_path, rewards=remote, gradient_accumulation_steps=3, reward_workers=2, eval_dataset=["a", "b"]
        )
        trainer.train()
        trainer.evaluate()
        assert len(loops) > 6 and loops[0].is_running()

    def test_what_is_no_list_of_scores_is_named(self, tmp_path):
        trainer = make_trainer("grpo", tmp_path, rewards=lambda images, prompts, **columns: None)
        with pytest.raises(TypeError, match="'<lambda>' of task '<lambda>' returned NoneType"):
            trainer.train()

    @pytest.mark.parametrize("rows", [0, 1], ids=["first", "last"])
    def test_columns_of_a_stream_whose_rows_differ(self, tmp_path, rows):
        seen = []

        def reward(images, prompts, **columns):
            seen.extend(columns["mark"])
            return brightness(images, prompts)

        lines = [{"prompt": "a cat"}, {"prompt": "a dog"}]
        lines[rows]["mark"] = "here"
        stream = IterableDataset.from_generator(lambda: iter(lines))
        trainer = make_trainer("grpo", tmp_path, rewards=reward, data=stream, num_generations=2, max_steps=1)
        trainer.train()
        assert seen == [line.get("mark") for line in lines for _ in range(2)]

    def test_infinite_scores_are_failures_at_evaluation_too(self, tmp_path):
        trainer = make_trainer("grpo", tmp_path, rewards=given([0.25, math.inf, 0.75, 0.5]))
        metrics = trainer.evaluate(PROMPTS["count"][:4])
        assert metrics["eval_reward/given_scores"] == 0.5 and metrics["eval_reward_failures/given_scores"] == 1

    def test_evaluating_on_every_form_of_prompts_that_the_trainer_takes(self, tmp_path):
        (tmp_path / "words.txt").write_text("\n".join(PROMPTS["count"]))
        trainer = make_trainer("grpo", tmp_path)
        words = str(tmp_path / "words.txt")
        scores = [
            trainer.evaluate(form)["eval_reward/brightness"]
            for form in (PROMPTS["count"], words, {"path": words}, {"brightness": words})
        ]
        assert len(set(scores)) == 1

    def test_a_reward_by_name(self, tmp_path):
        trainer = make_trainer(
            "nft", tmp_path, rewards=["ocr", brightness], data=['a sign that says "hello"', "a cat"]
        )
        assert list(trainer.datasets) == ["ocr+brightness"]
        run_round(trainer)
        run_round(trainer, 1)
        assert sorted(trainer.metrics["reward_failures/ocr+brightness"]) == [0, 4], "a cat has nothing to read"
        assert trainer.make_record().reward_names == {"ocr+brightness": ["ocr", "brightness"]}

    def test_an_error_ends_the_run_at_once(self, tmp_path):
        def broken(images, prompts, **columns):
            raise RuntimeError("the judge is out")

        trainer = make_trainer("grpo", tmp_path, rewards=broken, gradient_accumulation_steps=50)
        with Forwards(trainer.model) as forwards, pytest.raises(RuntimeError, match="the judge is out"):
            trainer.train()
        assert len(forwards.graded) < 50 * 4, "not all of the images were drawn in vain"
        assert trainer.state.global_step == 0

    def test_slow_rewards_are_computed_while_images_are_drawn(self, tmp_path):
        lock, threads, active, drawing = threading.Lock(), set(), [0], []

        def slow(images, prompts, **columns):
            with lock:
                threads.add(threading.get_ident())
                active.append(active[-1] + 1)
            time.sleep(0.2)
            with lock:
                active.append(active[-1] - 1)
            return brightness(images, prompts)

        trainer = make_trainer("grpo", tmp_path, rewards=slow, gradient_accumulation_steps=8, reward_workers=4)
        prepare(trainer)
        draw = trainer.draw

        def timed(batch):
            start = time.perf_counter()
            result = draw(batch)
            drawing.append(time.perf_counter() - start)
            return result

        trainer.draw = timed
        start = time.perf_counter()
        trainer.roll_out(0)
        seconds = time.perf_counter() - start
        assert len(drawing) == 8 and seconds < sum(drawing) + 8 * 0.2 / 2
        assert 1 < max(active) <= 4 and threading.get_ident() not in threads

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"reward_weights": [1.0, 2.0]}, "`reward_weights` has 2 weights, but task 'brightness' has 1 reward"),
            ({"rewards": "beauty"}, "There is no reward 'beauty'. .*The rewards are geneval, ocr"),
            (
                {"rewards": {"count": brightness, "text": brightness}, "data": {"count": ["a"]}},
                r"no prompts for tasks of `reward_funcs`: \['text'\]",
            ),
            ({"rewards": {"count": brightness}}, r"`train_dataset` names unknown tasks \['scene'\]"),
            ({"rewards": [3]}, "must be callables"),
            ({"rewards": []}, "is empty"),
            ({"torch_compile": True}, "`torch_compile` is not supported: images are drawn by the model as it is"),
            ({"reward_weights": [math.nan]}, "`reward_weights` must be a list of finite numbers"),
            (
                {"steps_per_rollout": 2, "save_strategy": "epoch"},
                "`save_strategy='epoch'` would save in the middle of a rollout",
            ),
        ],
    )
    def test_what_cannot_be_is_refused_before_the_base_is_loaded(self, tmp_path, settings, message, monkeypatch):
        monkeypatch.setattr("trl_diffusion_opd.trainers.base_trainer.load_pipeline", None)
        with pytest.raises(ValueError, match=message):
            make_trainer("grpo", tmp_path, **settings)

    def test_no_evaluation_prompts_are_needed(self, tmp_path):
        trainer = make_trainer("grpo", tmp_path, rewards={"count": brightness, "scene": redness})
        with pytest.raises(ValueError, match="There is nothing to evaluate on"):
            trainer.evaluate()


@pytest.mark.parametrize(("method", "folder"), [("grpo", "flow-grpo"), ("nft", "diffusion-nft")])
def test_a_trainer_without_settings_has_the_defaults(tmp_path, monkeypatch, method, folder):
    trainer_class, config_class = TRAINERS[method]
    monkeypatch.chdir(tmp_path)
    trainer = trainer_class(tiny_pipeline(), brightness, train_dataset=PROMPTS["count"])
    assert isinstance(trainer.args, config_class) and trainer.args.output_dir == folder
    assert trainer.args.num_generations == trainer.args.per_device_train_batch_size == 24
