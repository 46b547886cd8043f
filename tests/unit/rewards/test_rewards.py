# SPDX-License-Identifier: Apache-2.0
"""The frame of the rewards: the registry, batches, failed scores, memory, sums."""

import gc
import logging
import math
import subprocess
import sys
import threading
import time
import weakref
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from tests.support.random_images import pictures
from trl_diffusion_opd.rewards import REWARDS, base, check, load_reward, weighted_sum
from trl_diffusion_opd.rewards.base import Reward


class Brightness(Reward):
    """The mean of an image times a weight that its model holds; fails for images that are called dark."""

    name = "brightness"
    batch_size = 4

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.loads = 0
        self.calls = []

    def load_models(self):
        self.loads += 1
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, 2.0)
        return {"model": model, "words": ["dark"]}

    def score(self, images, prompts):
        self.calls.append((len(images), images.dtype, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        means = images.mean((1, 2, 3), keepdim=True).flatten(1)
        scores = self.models["model"](means.to(self.dtype)).flatten().tolist()
        return [
            self.failed("it is dark", prompt) if prompt in self.models["words"] else score
            for score, prompt in zip(scores, prompts, strict=True)
        ]


class Length(Reward):
    """The number of words of a column."""

    name = "length"
    columns_needed = ("caption",)

    def score(self, images, prompts, caption):
        return [len(text.split()) for text in caption]


class TestRegistry:
    def test_every_name_has_a_class_of_that_name(self):
        assert list(REWARDS) == [
            "geneval",
            "ocr",
            "pickscore",
            "clipscore",
            "hpsv2",
            "aesthetic",
            "imagereward",
            "unifiedreward",
            "hpsv3",
            "geneval2",
        ]
        factors = {}
        for name in REWARDS:
            reward = load_reward(name, device="cpu", batch_size=3)
            assert (reward.name, reward.__name__, reward.batch_size, reward.models) == (name, name, 3, {})
            factors[name] = reward.table_factor
        assert {name: factor for name, factor in factors.items() if factor != 1} == {
            "pickscore": 26.0,
            "unifiedreward": 5.0,
        }

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="There is no reward 'pickscor'. Did you mean 'pickscore'") as error:
            load_reward("pickscor")
        assert all(name in str(error.value) for name in REWARDS)
        with pytest.raises(ValueError, match=r"There is no reward 'xyz'\. The rewards are geneval"):
            load_reward("xyz")

    def test_the_package_is_light(self):
        code = (
            "import sys, trl_diffusion_opd.rewards as rewards; rewards.REWARDS\n"
            "assert not {'torch', 'transformers', 'rapidocr'} & set(sys.modules)\n"
            "rewards.load_reward('ocr'); rewards.load_reward('pickscore', device='cpu')\n"
            "assert not {'transformers', 'rapidocr', 'cv2', 'diffusers'} & set(sys.modules)\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_missing_package(self):
        class NeedsMuch(Brightness):
            name = "needs_much"
            requires = ("torch", "no_such_package_a", "no_such_package_b")

        with pytest.raises(ImportError, match=r"`needs_much` needs 'no_such_package_a' and 'no_such_package_b'") as e:
            NeedsMuch()
        assert 'pip install "trl-diffusion-opd[rewards]"' in str(e.value)

    @pytest.mark.parametrize(
        ("name", "package"), [("ocr", "rapidocr"), ("ocr", "onnxruntime"), ("ocr", "rapidfuzz"), ("geneval", "scipy")]
    )
    def test_packages_of_the_rewards(self, name, package, monkeypatch, capsys):
        for module in (base, check):
            monkeypatch.setattr(module, "find_spec", lambda name: None if name == package else find_spec(name))
        with pytest.raises(
            ImportError, match=rf"`{name}` needs '{package}'.*pip install \"trl-diffusion-opd\[rewards\]"
        ):
            load_reward(name)
        check.main([name])
        assert capsys.readouterr().out.endswith(f"Not installed: ['{package}'].\n")


class TestReward:
    def test_scores_in_batches_without_gradients_and_autocast(self):
        reward = Brightness(device="cpu")
        images = pictures(10).bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            scores = reward(images, ["a"] * 10, unused=list(range(10)))
        expected = 2 * images.detach().float().mean((1, 2, 3))
        assert scores == pytest.approx(expected.tolist(), abs=1e-6)
        assert all(type(score) is float for score in scores)
        assert reward.calls == [(size, torch.float32, False, False) for size in (4, 4, 2)]
        assert (reward.num_scored, reward.num_failed) == (10, 0)
        assert Brightness(device="cpu", batch_size=3)(images, ["a"] * 10) == pytest.approx(scores, abs=1e-6)
        assert reward(images[:0], []) == []

    def test_failed_scores_are_nan_and_counted(self, caplog):
        reward = Brightness(device="cpu")
        with caplog.at_level(logging.WARNING):
            scores = reward(pictures(5), ["a", "dark", "b", "dark", "c"])
            reward(pictures(1), ["dark"])
        assert [math.isnan(score) for score in scores] == [False, True, False, True, False]
        assert (reward.num_scored, reward.num_failed) == (3, 3)
        assert [record.getMessage() for record in caplog.records] == [
            "The reward `brightness` has no score for an image: it is dark (dark). It is counted as failed; more of "
            "this kind are not logged."
        ]

    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    def test_a_value_that_is_not_finite_is_a_failure(self, value, caplog):
        reward = Brightness(device="cpu").load()
        nn.init.constant_(reward.models["model"].weight, value)
        with caplog.at_level(logging.WARNING):
            scores = reward(pictures(3), ["a"] * 3)
        assert all(map(math.isnan, scores)) and reward.num_failed == 3
        assert len(caplog.records) == 1 and "not finite" in caplog.records[0].getMessage()

    def test_columns(self):
        reward = Length()
        assert reward(pictures(2), ["p", "q"], caption=["one two", "three"], other=None) == [2.0, 1.0]
        with pytest.raises(ValueError, match="`length` needs the dataset's columns 'caption'.*no 'caption'"):
            reward(pictures(2), ["p", "q"], other=[1, 2])
        with pytest.raises(ValueError, match=r"one length, but got \{'images': 2, 'prompts': 2, 'caption': 1\}"):
            reward(pictures(2), ["p", "q"], caption=["one"])

    @pytest.mark.parametrize(
        "images", [torch.rand(3, 8, 8), torch.rand(2, 4, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)]
    )
    def test_wrong_images(self, images):
        with pytest.raises(ValueError, match=r"`images` of the reward `brightness` must be a floating tensor"):
            Brightness()(images, ["a", "b"])

    def test_loads_once_frees_and_loads_again(self):
        reward = Brightness(device="cpu")
        assert reward.models == {} and reward.loads == 0
        first = reward.load()(pictures(6), ["a"] * 6)
        reward(pictures(6), ["a"] * 6)
        assert reward.loads == 1
        model = weakref.ref(reward.models["model"])
        assert not model().training and not model().weight.requires_grad
        assert reward.free().models == {}
        gc.collect()
        assert model() is None
        assert reward(pictures(6), ["a"] * 6) == first and reward.loads == 2

    def test_to_before_and_after_loading(self):
        reward = Brightness(device="cpu", dtype="bfloat16").load()
        assert reward.models["model"].weight.dtype == torch.bfloat16
        assert reward.to(dtype=torch.float64).models == {}, "rounded weights would stay rounded"
        assert reward.load().models["model"].weight.dtype == torch.float64 and reward.device.type == "cpu"
        reward.to("meta")
        assert reward.models["model"].weight.is_meta and reward.dtype == torch.float64
        reward.free().to("cpu", "float16")
        assert reward.load().models["model"].weight.dtype == torch.float16

    def test_batch_size_must_be_positive(self):
        with pytest.raises(ValueError, match="`batch_size` must be at least 1, but is 0"):
            Brightness(batch_size=0)

    def test_threads_wait_for_each_other(self):
        running, most = 0, 0

        class Slow(Brightness):
            def score(self, images, prompts):
                nonlocal running, most
                running += 1
                most = max(most, running)
                time.sleep(0.02)
                running -= 1
                return super().score(images, prompts)

        reward = Slow(device="cpu")
        threads = [threading.Thread(target=reward, args=(pictures(2), ["a", "dark"])) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (most, reward.loads, reward.num_scored, reward.num_failed) == (1, 1, 5, 5)


class TestWeightedSum:
    def test_sums_without_dividing(self):
        total = weighted_sum({Brightness(device="cpu"): 0.5, Length(): 3.0})
        assert total.__name__ == total.name == "brightness+length" and total.columns_needed == ("caption",)
        images, prompts, captions = pictures(5), ["a", "dark", "b", "c", "d"], ["x", "x", "x y", "x y z", ""]
        components = total.components(images, prompts, caption=captions, other=[0] * 5)
        assert components["length"] == [1, 1, 2, 3, 0]
        scores = total(images, prompts, caption=captions)
        bright = (2 * images.mean((1, 2, 3))).tolist()
        expected = [0.5 * b + 3 * len(c.split()) for b, c in zip(bright, captions, strict=True)]
        assert math.isnan(scores[1]) and (total.num_scored, total.num_failed) == (4, 1)
        assert [s for i, s in enumerate(scores) if i != 1] == pytest.approx(expected[:1] + expected[2:], abs=1e-6)
        assert total.combine(components)[2:] == scores[2:]

    def test_a_failed_component_fails_the_sum_at_weight_zero(self):
        total = weighted_sum({Brightness(device="cpu"): 0.0, Length(): 1.0})
        scores = total(pictures(2), ["dark", "a"], caption=["x", "x"])
        assert math.isnan(scores[0]) and scores[1] == 1.0

    def test_loads_moves_and_frees_its_parts(self):
        total = weighted_sum({Brightness(device="cpu"): 1.0, Length(): 1.0})
        part = total.rewards["brightness"]
        total.load()
        assert part.loads == 1
        assert total.to(dtype="float64").load() is total and part.loads == 2
        assert part.models["model"].weight.dtype == torch.float64
        assert total.free() is total and part.models == {}

    def test_by_name(self):
        total = weighted_sum({"pickscore": 1.0, "clipscore": 1.0, "hpsv2": 1.0}, device="cpu", batch_size=7)
        assert list(total.weights.items()) == [("pickscore", 1.0), ("clipscore", 1.0), ("hpsv2", 1.0)]
        assert {reward.batch_size for reward in total.rewards.values()} == {7}

    def test_no_reward_and_two_of_one_name(self):
        with pytest.raises(ValueError, match=r"one or more rewards of different names, but has \[\]"):
            weighted_sum({})
        with pytest.raises(ValueError, match=r"\['brightness', 'brightness'\]"):
            weighted_sum({Brightness(): 1.0, Brightness(): 1.0})
