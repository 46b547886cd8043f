# SPDX-License-Identifier: Apache-2.0
"""A prompt that a rollout draws twice: its images are compared with each other, wherever they lie."""

import numpy as np
import pytest

from tests.support.rl_runs import make_trainer, run_round


def published_advantages(prompts: list[str], rewards: list[float], scale: str) -> np.ndarray:
    """The statistics of the published trackers: by the text of the prompt, over all that was drawn."""
    prompts, rewards = np.array(prompts), np.array(rewards)
    advantages = np.empty_like(rewards)
    for prompt in np.unique(prompts):
        own = rewards[prompts == prompt]
        std = np.std(rewards if scale == "task" else own) + 1e-4
        advantages[prompts == prompt] = (own - own.mean()) / std
    return advantages


def rollout(tmp_path, data, scores, **settings) -> tuple[list[str], list[float], list[float]]:
    """Prompts, rewards and advantages of a rollout of 4 groups of 2 images, in order; the task is called `scores`."""
    prompts, rewards = [], iter(scores)

    def scored(images, texts, **columns):
        prompts.extend(texts)
        return [next(rewards) for _ in texts]

    trainer = make_trainer(
        "nft",
        tmp_path,
        rewards=scored,
        data=data,
        per_device_train_batch_size=4,
        num_generations=2,
        gradient_accumulation_steps=2,
        advantage_clip=100.0,
        **settings,
    )
    advantages, learn = [], trainer.learn

    def note(model, experience, *arguments, **keywords):
        advantages.extend(experience.advantages.tolist())
        return learn(model, experience, *arguments, **keywords)

    trainer.learn = note
    run_round(trainer)
    return prompts, list(scores), advantages


SCORES = [0.0, 1.0, 0.25, 0.5, 3.0, 2.0, 0.75, 7.0]


@pytest.mark.parametrize("scale", ["task", "group"])
class TestAdvantages:
    def test_a_prompt_drawn_twice_is_one_group(self, tmp_path, scale):
        """2 prompts, 4 groups: the rollout passes through the prompts twice."""
        prompts, rewards, got = rollout(tmp_path, ["a red circle", "a boat at night"], SCORES, scale_rewards=scale)
        assert sorted(prompts) == ["a boat at night"] * 4 + ["a red circle"] * 4
        np.testing.assert_allclose(got, published_advantages(prompts, rewards, scale), rtol=1e-6)
        by_position = [f"{prompt} {index // 2}" for index, prompt in enumerate(prompts)]
        assert np.abs(published_advantages(by_position, rewards, scale) - got).max() > 0.1  # what it was before

    def test_a_prompt_that_the_dataset_has_twice_is_one_group(self, tmp_path, scale):
        data = ["a red circle", "a boat at night", "a red circle", "a tree at dawn"]
        prompts, rewards, got = rollout(tmp_path, data, SCORES, scale_rewards=scale)
        assert prompts.count("a red circle") == 4 and len(set(prompts)) == 3
        np.testing.assert_allclose(got, published_advantages(prompts, rewards, scale), rtol=1e-6)

    def test_different_prompts_are_groups_of_their_own(self, tmp_path, scale):
        data = ["a red circle", "a boat at night", "a house at noon", "a tree at dawn"]
        prompts, rewards, got = rollout(tmp_path, data, SCORES, scale_rewards=scale)
        assert len(set(prompts)) == 4
        np.testing.assert_allclose(got, published_advantages(prompts, rewards, scale), rtol=1e-6)
