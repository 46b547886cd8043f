# SPDX-License-Identifier: Apache-2.0
"""How reward functions are called: in time, with a word after a while, and with the arguments they are made for."""

import asyncio
import logging
import threading
import time

import pytest
import torch

from tests.support import rl_runs, runs
from tests.support.runs import PROMPTS
from trl_diffusion_opd.data.rounds import TaskBatch
from trl_diffusion_opd.rewards import functions
from trl_diffusion_opd.rewards.base import Reward
from trl_diffusion_opd.rewards.functions import normalize_reward_funcs, reward_columns
from trl_diffusion_opd.rewards.sums import weighted_sum


IMAGES = torch.full((2, 3, 4, 4), 0.5)
BATCH = TaskBatch("ocr", [{"prompt": "a"}, {"prompt": "b"}], ["a", "b"], [0, 1], [0, 0])
GAVE_UP = (
    "Gave up on the reward '{name}' of task '{task}': no scores for {images} images within 0.2 s. Find out where it "
    "hangs, or raise `reward_timeout`"
)


@pytest.fixture
def released():
    """What hanging rewards wait for; set at the end."""
    event = threading.Event()
    yield event
    event.set()


def hanging(released, asynchronous: bool):
    def hangs(images, prompts, **columns):
        released.wait(30)
        return [0.0] * len(prompts)

    async def hangs_too(images, prompts, **columns):
        while not released.is_set():
            await asyncio.sleep(0.01)
        return [0.0] * len(prompts)

    return hangs_too if asynchronous else hangs


@pytest.mark.parametrize("asynchronous", [False, True])
class TestTimeout:
    def test_a_reward_that_hangs_ends_with_its_name(self, released, asynchronous):
        reward, start = hanging(released, asynchronous), time.monotonic()
        with pytest.raises(TimeoutError) as caught:
            reward_columns([reward], IMAGES, BATCH, timeout=0.2)
        assert str(caught.value).startswith(GAVE_UP.format(name=reward.__name__, task="ocr", images=2))
        assert 0.2 <= time.monotonic() - start < 10

    @pytest.mark.parametrize("method", ["grpo", "nft"])
    def test_in_training(self, tmp_path, released, asynchronous, method):
        reward = hanging(released, asynchronous)
        data = {"count": PROMPTS["count"]}
        trainer = rl_runs.make_trainer(method, tmp_path, rewards={"count": reward}, data=data, reward_timeout=0.2)
        with pytest.raises(TimeoutError) as caught:
            trainer.train()
        assert str(caught.value).startswith(GAVE_UP.format(name=reward.__name__, task="count", images=4))

    def test_at_evaluation(self, tmp_path, released, asynchronous):
        reward = hanging(released, asynchronous)
        trainer = runs.make_trainer(tmp_path, eval_dataset=PROMPTS, reward_funcs={"scene": reward}, reward_timeout=0.2)
        with pytest.raises(TimeoutError) as caught:
            trainer.evaluate()
        assert str(caught.value).startswith(GAVE_UP.format(name=reward.__name__, task="scene", images=3))

    def test_after_a_while_it_is_said_what_is_waited_for(self, released, asynchronous, monkeypatch, caplog):
        monkeypatch.setattr(functions, "_PATIENCE", 0.1)
        reward, said = hanging(released, asynchronous), []

        class Release(logging.Handler):
            def emit(self, record):
                said.append(record.getMessage())
                released.set()

        handler = Release()
        functions.logger.addHandler(handler)
        try:
            for timeout in (20, None):
                released.clear()
                assert reward_columns([reward], IMAGES, BATCH, timeout=timeout) == {"reward": [0.0, 0.0]}
        finally:
            functions.logger.removeHandler(handler)
        start = f"Still waiting for the reward '{reward.__name__}' of task 'ocr' after 0.1 s"
        assert said == [f"{start} (`reward_timeout` is 20 s).", f"{start} (there is no limit)."]


class TestCalls:
    def test_the_time_to_load_does_not_count(self):
        class Slow(Reward):
            name = "slow"

            def load_models(self):
                time.sleep(0.4)
                return {"model": torch.nn.Linear(1, 1)}

            def score(self, images, prompts):
                return [1.0] * len(prompts)

        assert reward_columns([Slow(device="cpu")], IMAGES, BATCH, timeout=0.2) == {"reward": [1.0, 1.0]}

    def test_what_a_reward_raises_comes_through_also_its_own_timeout(self):
        def refused(images, prompts, **columns):
            raise TimeoutError("the server did not answer")

        async def broken(images, prompts, **columns):
            raise KeyError("score")

        with pytest.raises(TimeoutError, match="^the server did not answer$"):
            reward_columns([refused], IMAGES, BATCH)
        with pytest.raises(KeyError, match="score"):
            reward_columns([broken], IMAGES, BATCH)

    def test_quick_rewards_are_silent_and_have_no_gradients(self, caplog):
        graded = []

        def quick(images, prompts, **columns):
            graded.append(torch.is_grad_enabled())
            return [1.0, None]

        with torch.enable_grad():
            scores = reward_columns([quick], IMAGES, BATCH, timeout=5)["reward"]
        assert scores[0] == 1.0 and scores[1] != scores[1] and graded == [False] and not caplog.records

    @pytest.mark.parametrize("timeout", [0, -1.0, float("inf"), float("nan")])
    def test_other_time_outs_are_refused(self, tmp_path, timeout):
        with pytest.raises(ValueError, match="`reward_timeout` must be (positive|a finite number), but is"):
            runs.make_config(tmp_path, reward_timeout=timeout)

    def test_the_default_is_shorter_than_the_patience_of_other_processes(self, tmp_path):
        config = runs.make_config(tmp_path)
        assert config.reward_timeout == 900 and config.reward_timeout < config.ddp_timeout


def text_reward(completions, **kwargs):
    return [0.0] * len(completions)


def trl_reward(prompts, completions, **kwargs):
    return [0.0] * len(completions)


def swapped(prompts, images, **columns):
    return [0.0] * len(images)


def images_alone(images, **columns):
    return [0.0] * len(images)


def by_name(*, images, prompts, **columns):
    return [0.0] * len(images)


@pytest.mark.parametrize("func", [text_reward, trl_reward, swapped, images_alone, by_name])
def test_functions_with_other_arguments_get_a_hint_at_start_up(func, tmp_path):
    with pytest.raises(ValueError) as caught:
        rl_runs.make_trainer("grpo", tmp_path, rewards={"count": func}, data={"count": PROMPTS["count"]})
    message = str(caught.value)
    assert message.startswith(f"`reward_funcs['count']` has '{func.__name__}', which takes (")
    assert message.endswith("Write it as `f(images, prompts, **columns) -> list[float]`.")
    assert ("`completions` are what text models write" in message) == (func in (text_reward, trl_reward))
    assert "\n" not in message


def test_functions_with_these_arguments_are_taken():
    class Callable:
        def __call__(self, images, prompts, answer, **columns):
            return [0.0]

    async def later(images, prompts, **columns):
        return [0.0]

    funcs = [Callable(), later, lambda *arguments, **columns: [0.0], lambda pictures, texts: [0.0], max]
    assert normalize_reward_funcs({"ocr": funcs}, ["ocr"]) == {"ocr": funcs}


def test_a_weighted_sum_of_functions_is_refused_in_a_line():
    with pytest.raises(
        ValueError, match="A weighted sum is made of.*but one is <function images_alone.*reward_weights`"
    ) as e:
        weighted_sum({images_alone: 1.0})
    assert "\n" not in str(e.value)
