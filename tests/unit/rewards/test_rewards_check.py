# SPDX-License-Identifier: Apache-2.0
"""`trl-diffusion-opd rewards`: the checks themselves, and rewards whose models are on a Hub."""

import argparse
import json

import pytest
from PIL import Image

from tests.support.hub_server import run
from tests.support.tiny_clip import save_clip
from trl_diffusion_opd.cli.commands import COMMANDS
from trl_diffusion_opd.rewards import REWARDS, check
from trl_diffusion_opd.rewards.base import Reward
from trl_diffusion_opd.rewards.check import Published, as_table, check_rewards, draw, main


class Judge(Reward):
    """Knows the texts of the drawn shapes, or takes one for the other."""

    def __init__(self, name: str, right: bool = True):
        self.name = name
        self.right = right
        super().__init__(device="cpu")

    def score(self, images, prompts):
        red = (images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))).tolist()
        match = [("circle" in prompt) == (value < 0.35) for value, prompt in zip(red, prompts, strict=True)]
        return [0.3 if good == self.right else 0.2 for good in match]


class Broken(Judge):
    def score(self, images, prompts):
        raise RuntimeError("out of | memory")


@pytest.fixture
def pictures(monkeypatch, tmp_path):
    """Two images instead of the published ones, by the same way."""
    for i in range(2):
        draw(shape="square", background="green").resize((20, 30)).save(tmp_path / f"{i}.webp")
    monkeypatch.setattr(check, "IMAGES", [(tmp_path / f"{i}.webp").as_uri() for i in range(2)])
    published = {"pickscore": Published((0.2, 0.201), 0.005, "here"), "hpsv2": Published((0.3, 0.2), 0.01, "there")}
    monkeypatch.setattr(check, "PUBLISHED", published)


class TestChecks:
    def test_relations_and_published_scores(self, pictures):
        lines = check_rewards([Judge("pickscore"), Judge("hpsv2", right=False), Judge("clipscore")])
        assert [(line.name, line.status) for line in lines] == [
            ("pickscore", "ok"),
            ("pickscore", "ok"),
            ("hpsv2", "differs"),
            ("hpsv2", "differs"),
            ("clipscore", "ok"),
        ]
        assert lines[1].score == "0.2, 0.2" and lines[1].expected == "0.2, 0.201 +- 0.005"
        assert lines[1].source == "here"
        assert lines[2].score == "0.2, 0.2, 0.3, 0.3"

    def test_what_fails_is_told_and_the_rest_goes_on(self, monkeypatch, tmp_path):
        monkeypatch.setattr(check, "IMAGES", [(tmp_path / "missing.webp").as_uri()])
        lines = check_rewards([Broken("pickscore"), "no_reward", Judge("aesthetic"), Judge("clipscore")])
        assert [line.name for line in lines] == ["pickscore"] * 2 + ["no_reward"] + ["aesthetic"] * 2 + ["clipscore"]
        assert lines[0].status.startswith("no images: ") and lines[3].status.startswith("no images: ")
        assert lines[1].status == "failed: RuntimeError: out of | memory"
        assert lines[2].status.startswith("not loaded: ValueError: There is no reward 'no_reward'")
        assert [line.status for line in lines[4:]] == ["differs", "ok"]
        table = as_table(lines).splitlines()
        assert table[0] == "| reward | status | score | expected | source |" and len(table) == 2 + len(lines)
        assert table[3] == "| pickscore | failed: RuntimeError: out of &#124; memory |  |  |  |"

    def test_published_scores_are_in_our_scale(self):
        ranges = {"pickscore": (0.7, 0.9), "hpsv2": (0.15, 0.4), "aesthetic": (4, 7), "imagereward": (-2.5, 2)}
        assert ranges.keys() == check.PUBLISHED.keys() and check.RELATIONS.keys() == REWARDS.keys()
        for name, (low, high) in ranges.items():
            published = check.PUBLISHED[name]
            assert len(published.scores) == 4 == len(check.IMAGES)
            assert all(low < score < high for score in published.scores)

    def test_drawn_images(self):
        circle = draw(shape="circle", color="red")
        assert circle.getpixel((256, 256)) == (255, 0, 0) and circle.getpixel((5, 5)) == (255, 255, 255)
        assert circle.getpixel((140, 140)) == (255, 255, 255)  # a corner that a square would fill
        square = draw(shape="square", color="blue", background="yellow")
        assert square.getpixel((140, 140)) == (0, 0, 255) and square.getpixel((5, 5)) == (255, 255, 0)
        assert isinstance(circle, Image.Image) and draw("Hi").getextrema() != draw().getextrema()


class TestCommand:
    def parse(self, *argv):
        parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
        COMMANDS["rewards"].add_arguments(parser)
        return vars(parser.parse_args(argv))

    def test_checks_ocr_for_real(self, capsys):
        main(**self.parse("ocr", "--check", "--device", "cpu"))
        assert "| ocr | ok | 1, 0" in capsys.readouterr().out

    def test_exit_code(self, capsys):
        with pytest.raises(SystemExit) as error:
            main(**self.parse("--check", "nothing"))
        assert error.value.code == 1 and "| nothing | not loaded" in capsys.readouterr().out

    def test_lists_the_rewards(self, capsys):
        main(**self.parse())
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in lines] == list(REWARDS)


def test_models_on_the_hub(hub, tmp_path):
    """One commit for all files, and errors that say what to do, with the real clients."""
    hub.put("acme/clip", save_clip(tmp_path / "clip"))
    commit = hub.commits("acme/clip")[0][0]
    hub.put("acme/clip", save_clip(tmp_path / "other", seed=1))
    code = """
import json, sys, torch
from trl_diffusion_opd.rewards import load_reward
images, prompts = torch.ones(2, 3, 40, 40) * torch.tensor([0.2, 0.9]).view(2, 1, 1, 1), ["a red circle", "two cats"]
results = []
for location in sys.argv[1:]:
    try:
        results.append(load_reward("clipscore", model_name_or_path=location, device="cpu")(images, prompts))
    except Exception as error:
        results.append(f"{type(error).__name__}: {error}")
try:
    load_reward("hpsv2", model_name_or_path="acme/clip", device="cpu").load()
except Exception as error:
    results.append(f"{type(error).__name__}: {error}")
print("RESULTS" + json.dumps(results))
"""
    locations = ["acme/clip", f"acme/clip@{commit}", tmp_path / "other", tmp_path / "clip", "acme/nothing"]
    done = run(code, hub.environment(tmp_path / "home"), *locations, patient=False)
    assert done.returncode == 0, done.stderr
    newest, first, other, clip, nothing, no_file = json.loads(done.stdout.rpartition("RESULTS")[2])
    assert newest == other != clip == first
    assert nothing.startswith("SourceError: clipscore: the repository 'acme/nothing' was not found on the Hub")
    assert no_file.startswith("AbsentError: hpsv2: there is no file 'HPS_v2.1_compressed.pt' in acme/clip")
