# SPDX-License-Identifier: Apache-2.0
"""The OCR reward, with the real RapidOCR and its models on text drawn with Pillow."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from trl_diffusion_opd.rewards import load_reward
from trl_diffusion_opd.rewards.ocr import quoted, similarity


def drawn(*lines: str, color: str = "black", background: str = "white", size: int = 320) -> torch.Tensor:
    """An image with lines of text below each other."""
    image = Image.new("RGB", (size, size), background)
    pen = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        position = (size / 2, size * (number + 1) / (len(lines) + 1))
        pen.text(position, line, fill=color, font=ImageFont.load_default(size=size // 8), anchor="mm")
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


@pytest.fixture(scope="module")
def reward():
    reward = load_reward("ocr", num_threads=1)
    yield reward
    reward.free()


class TestSimilarity:
    @pytest.mark.parametrize(
        "recognized, target, expected",
        [
            ("NASA 2049", "nasa2049", 1.0),
            ("the sign says: Hello World!", "hello world", 1.0),  # more text costs nothing
            ("Helo Wrld", "Hello World", 1 - 2 / 10),
            ("Hello World", "Hello World!", 1 - 1 / 11),  # punctuation counts
            ("", "abc", 0.0),
            ("a much longer text of something else", "xyz", 0.0),  # not below 0
        ],
    )
    def test_values(self, recognized, target, expected):
        assert similarity(recognized, target) == pytest.approx(expected, abs=1e-12)

    def test_matches_a_plain_edit_distance(self):
        def distance(a: str, b: str) -> int:
            row = list(range(len(b) + 1))
            for i, x in enumerate(a, 1):
                row, before = [i], row
                for j, y in enumerate(b, 1):
                    row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
            return row[-1]

        generator = np.random.default_rng(0)
        for _ in range(50):
            a, b = ("".join(generator.choice(list("abc"), generator.integers(1, 12))) for _ in range(2))
            expected = 1.0 if b in a else 1 - min(distance(a, b), len(b)) / len(b)
            assert similarity(a, b) == pytest.approx(expected, abs=1e-12)

    def test_quoted(self):
        assert quoted('a sign that says "Hello World" in red') == "Hello World"
        assert quoted('"first" and "second"') == "first"
        assert [quoted(prompt) for prompt in ("no quotes", 'only "one', '""')] == ["", "", ""]


class TestOCR:
    def test_reads_drawn_text(self, reward):
        images = torch.stack(
            [
                drawn("Hello World"),
                drawn("Hello World"),
                drawn("Grand Opening", "Sale 50% Off"),
                drawn("NASA 2049", color="yellow", background="blue"),
                drawn(),
            ]
        )
        texts = ["hello world", "Grand Opening", "Grand Opening Sale 50% Off", "NASA 2049", "Hello World"]
        scores = reward(images, [f'a poster with "{text}" on it' for text in texts])
        assert scores[0] == scores[2] == scores[3] == 1.0
        assert scores[1] < 0.4 and scores[4] == 0.0
        assert (reward.num_scored, reward.num_failed) == (5, 0)

    def test_half_precision_and_other_shapes(self, reward):
        image = drawn("Welcome")[None, :, 80:240].bfloat16()
        assert reward(image, ['"Welcome"']) == [1.0]

    def test_prompts_without_text_fail(self, reward):
        before = reward.num_failed
        scores = reward(drawn("Hello").expand(3, -1, -1, -1), ["no quotes", '"Hello"', 'empty "  "'])
        assert math.isnan(scores[0]) and scores[1] == 1.0 and math.isnan(scores[2])
        assert reward.num_failed - before == 2

    def test_one_engine_in_a_process(self, reward):
        other = load_reward("ocr", num_threads=1).load()
        assert other.models["engine"] is reward.load().models["engine"]

    def test_an_engine_that_fails_is_a_failed_score(self):
        reward = load_reward("ocr", num_threads=1).load()

        def broken(image):
            raise RuntimeError("no memory")

        reward.models = {"engine": broken}
        assert math.isnan(reward(drawn("Hello")[None], ['"Hello"'])[0]) and reward.num_failed == 1

    def test_quiet_without_network_and_free(self, tmp_path):
        code = (
            "import socket, sys, weakref, gc\n"
            "def refuse(*args): raise AssertionError('network')\n"
            "socket.socket.connect = refuse\n"
            "import torch\n"
            "from trl_diffusion_opd.rewards import load_reward\n"
            "reward = load_reward('ocr')\n"
            "assert reward.num_threads == 1\n"
            "assert reward(torch.ones(1, 3, 64, 64), ['\"Hello\"']) == [0.0]\n"
            "engine = weakref.ref(reward.models['engine'])\n"
            "reward.free(); gc.collect()\n"
            "assert engine() is None\n"
            "assert reward(torch.ones(1, 3, 64, 64), ['\"Hello\"']) == [0.0]\n"
        )
        environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
