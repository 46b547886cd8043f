# SPDX-License-Identifier: Apache-2.0
"""`trl-diffusion-opd rewards`: the checks themselves, and rewards whose models are on a Hub."""

import argparse
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from tests.support.hub_server import run
from tests.support.tiny_clip import save_clip
from trl_diffusion_opd.cli.commands import COMMANDS
from trl_diffusion_opd.rewards import REWARDS, check
from trl_diffusion_opd.rewards.base import Reward
from trl_diffusion_opd.rewards.check import as_table, check_rewards, draw, main
from trl_diffusion_opd.rewards.published import Published


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
def server(tmp_path):
    """A server with two images; `asked` are the paths that it was asked for."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    asked: list[str] = []
    for number in (1, 2):
        draw(shape="square", background="green").resize((20, 30)).save(tmp_path / f"{number}.webp")
    (tmp_path / "no.webp").write_text("<html>")
    handler = partial(Handler, directory=tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    server.address, server.asked = f"http://127.0.0.1:{server.server_port}", asked
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def publish(monkeypatch, server):
    """Says what was published, of images of the server; all by the way of those that were."""

    def set_published(**scores: tuple[tuple[float, ...], float]) -> None:
        images = (f"{server.address}/1.webp", f"{server.address}/2.webp")
        published = {
            name: (Published(images, "a square", values, tolerance, f"https://example.com/{name}"),)
            for name, (values, tolerance) in scores.items()
        }
        monkeypatch.setattr(check, "PUBLISHED", published)

    return set_published


class TestChecks:
    def test_relations_and_published_scores(self, publish, server):
        publish(pickscore=((0.2, 0.201), 0.005), hpsv2=((0.3, 0.2), 0.01))
        lines = check_rewards([Judge("pickscore"), Judge("hpsv2", right=False), Judge("clipscore")])
        assert [(line.name, line.status, line.passed) for line in lines] == [
            ("pickscore", "ok", True),
            ("pickscore", "ok", True),
            ("hpsv2", "differs", False),
            ("hpsv2", "differs", False),
            ("clipscore", "ok", True),
            ("clipscore", "none published", True),
        ]
        # A green square is no circle: 0.2, and 0.3 of the judge who takes one for the other.
        assert (lines[1].score, lines[1].expected) == ("0.2, 0.2", "0.2, 0.201")
        assert (
            lines[1].difference == "+0, -0.001 (allowed: 0.005)" and lines[1].source == "https://example.com/pickscore"
        )
        assert lines[2].score == "0.2, 0.2, 0.3, 0.3" and lines[2].difference == ""
        assert (lines[3].score, lines[3].difference) == ("0.3, 0.3", "+0, +0.1 (allowed: 0.01)")
        assert lines[5].source == "the scores that were found are of another CLIP, ViT-H/14"
        assert server.asked == ["/1.webp", "/2.webp"], "each image is fetched once"

    def test_the_edge_of_the_tolerance(self, publish):
        publish(pickscore=((0.25, 0.2), 0.05))
        assert check_rewards([Judge("pickscore")])[1].status == "ok"
        publish(pickscore=((0.2501, 0.2), 0.05))
        assert check_rewards([Judge("pickscore")])[1].status == "differs"

    def test_several_publications_and_a_score_that_fails(self, publish, monkeypatch, server):
        publish(aesthetic=((0.2, 0.2), 0.1))
        twice = check.PUBLISHED["aesthetic"] * 2
        monkeypatch.setattr(check, "PUBLISHED", {"aesthetic": twice})
        lines = check_rewards([Judge("aesthetic")])
        assert [line.status for line in lines] == ["differs", "ok", "ok"]
        judge = Judge("aesthetic")
        judge.score = lambda images, prompts: [judge.failed("tired") for _ in prompts]
        assert [line.status for line in check_rewards([judge])] == ["failed: no score"] * 3

    def test_what_fails_is_told_and_the_rest_goes_on(self, publish, server, monkeypatch):
        publish(pickscore=((0.2, 0.2), 0.1), aesthetic=((0.2, 0.2), 0.1))
        broken = Published((f"{server.address}/no.webp",), "a square", (0.2,), 0.1, "there")
        missing = Published((f"{server.address}/3.webp",), "a square", (0.2,), 0.1, "nowhere")
        published = {**check.PUBLISHED, "pickscore": (broken,), "aesthetic": (missing,)}
        monkeypatch.setattr(check, "PUBLISHED", published)
        lines = check_rewards([Broken("pickscore"), "no_reward", Judge("aesthetic"), Judge("clipscore")])
        names = ["pickscore"] * 2 + ["no_reward"] + ["aesthetic"] * 2 + ["clipscore"] * 2
        assert [line.name for line in lines] == names
        assert lines[0].status == "failed: RuntimeError: out of | memory"
        assert lines[1].status.startswith("no images: cannot identify image") and lines[1].source == "there"
        assert lines[2].status.startswith("not loaded: ValueError: There is no reward 'no_reward'")
        assert lines[4].status.startswith("no images: HTTP Error 404")
        assert [line.status for line in (lines[3], *lines[5:])] == ["differs", "ok", "none published"]
        table = as_table(lines).splitlines()
        assert table[0] == "| reward | status | here | expected | difference | source |"
        assert len(table) == 2 + len(lines)
        assert table[2] == "| pickscore | failed: RuntimeError: out of &#124; memory |  |  |  |  |"

    def test_published_scores_are_in_our_scale_and_have_sources(self):
        ranges = {"pickscore": (0.7, 0.9), "hpsv2": (0.15, 0.4), "aesthetic": (4, 7), "imagereward": (-2.5, 2)}
        ranges["hpsv3"] = (5, 15)
        assert ranges.keys() == check.PUBLISHED.keys() and check.RELATIONS.keys() == REWARDS.keys()
        assert check.PUBLISHED.keys() | check.UNPUBLISHED.keys() == REWARDS.keys()
        assert not check.PUBLISHED.keys() & check.UNPUBLISHED.keys()
        for name, (low, high) in ranges.items():
            for published in check.PUBLISHED[name]:
                assert len(published.scores) == len(published.images) > 0 and published.prompt
                assert all(low < score < high for score in published.scores)
                # It would tell these images apart.
                assert (
                    published.tolerance < max(published.scores) - min(published.scores) or len(published.scores) == 1
                )
                assert all(address.startswith("https://") for address in (*published.images, published.source))

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
        table = capsys.readouterr().out
        assert "| ocr | ok | 1, 0" in table and "| ocr | none published |  |  |  | its published means are of" in table

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
