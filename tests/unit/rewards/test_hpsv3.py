# SPDX-License-Identifier: Apache-2.0
"""HPSv3: a tiny model against its definition, the weights under their published names, and the text it was trained with."""

import math
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from tests.support.random_images import pictures
from tests.support.tiny_hpsv3 import SOURCE, TEXT, TEXT_SHA256, random_weights, reference, save_tiny, size_of
from trl_diffusion_opd.hub.errors import SourceError
from trl_diffusion_opd.rewards import hpsv3_text, load_reward
from trl_diffusion_opd.rewards.hpsv3_text import ADDRESS, SHA256, load_text


PROMPTS = ["a red cat", "dog", "a dog a red cat it is good"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("hpsv3"))


@pytest.fixture
def tiny_text(monkeypatch):
    monkeypatch.setattr(hpsv3_text, "SHA256", TEXT_SHA256)


@pytest.fixture
def build(folder, tiny_text):
    """Builds the reward on the tiny model, in float32."""
    options = {"model_name_or_path": folder, "base_name_or_path": folder / "base", "text_path": folder / "text.py"}
    return lambda **changes: load_reward("hpsv3", **{"device": "cpu", "dtype": "float32", **options, **changes})


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (40, 67), (600, 300)])
def test_scores_are_those_of_the_definition(build, size):
    images = pictures(3, *size)
    scores = build()(images, PROMPTS)  # one batch, padded: the prompts have different lengths
    expected = [reference(random_weights(), *pair) for pair in zip(images, PROMPTS, strict=True)]
    assert scores == pytest.approx(expected, abs=2e-5)
    assert max(expected) - min(expected) > 1e-2


def test_sizes_are_multiples_of_28_with_about_256_squares():
    assert [size_of(*size) for size in ((512, 512), (32, 32), (768, 512))] == [(448, 448), (448, 448), (532, 364)]


def test_tokens_of_the_image_are_numbered_one_after_the_other(build):
    image = pictures(1, 64, 64)
    score = build()(image, ["a cat"])[0]
    in_a_row, in_a_grid = (reference(random_weights(), image[0], "a cat", by_row=by_row) for by_row in (False, True))
    assert score == pytest.approx(in_a_row, abs=2e-5) and abs(in_a_row - in_a_grid) > 1e-3


def test_names_of_before_and_after_transformers_4_52(build, tmp_path):
    renamed = {}
    for name, tensor in random_weights().items():
        if name.startswith("model."):
            name = f"model.language_model.{name.removeprefix('model.')}"
        renamed[f"model.{name}" if name.startswith("visual.") else name] = tensor
    save_file(renamed, tmp_path / "new.safetensors")
    images = pictures(2, 32, 32)
    assert build()(images, PROMPTS[:2]) == build(model_name_or_path=tmp_path / "new.safetensors")(images, PROMPTS[:2])


def test_weights_that_do_not_fit_are_refused(build, folder, tmp_path):
    weights = random_weights()

    def loading(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, tmp_path / "HPSv3.safetensors")
        build(model_name_or_path=tmp_path).load()

    with pytest.raises(ValueError, match=r"hpsv3: the weights do not fit Qwen2VLModel: missing: .*norm\.weight \(1\)"):
        loading({name: tensor for name, tensor in weights.items() if name != "model.norm.weight"})
    with pytest.raises(ValueError, match="unexpected: .*more"):
        loading({**weights, "visual.more": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="rm_head|layers.5.bias"):
        loading({name: tensor for name, tensor in weights.items() if name != "rm_head.5.bias"})
    short = {**weights, "model.embed_tokens.weight": weights["model.embed_tokens.weight"][:-1].clone()}
    with pytest.raises(ValueError, match="embeddings of 21 tokens, but the tokenizer .* has 22.*`base_name_or_path`"):
        loading(short)


def test_half_precision_keeps_the_head_and_the_frequencies(build):
    reward = build(dtype=None).load()
    model, head = reward.models["model"], reward.models["head"]
    assert model.dtype == torch.bfloat16 and head.layers[0].weight.dtype == torch.float32
    rotary = model.language_model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32 and rotary.tolist() == pytest.approx([10000 ** (-i / 4) for i in range(4)])
    images = pictures(2, 32, 32)
    assert reward(images, PROMPTS[:2]) == pytest.approx(build()(images, PROMPTS[:2]), abs=0.1)
    assert reward.to(dtype="float32").load().models["model"].dtype == torch.float32
    assert reward.free().models == {} and reward.to("cpu").models == {}


def test_a_special_token_in_a_prompt_is_a_failed_score(build, caplog):
    reward = build()
    images = pictures(3, 32, 32)
    scores = reward(images, ["a cat", "a <|Reward|> cat", "<|image_pad|>"])
    assert math.isnan(scores[1]) and math.isnan(scores[2]) and reward.num_failed == 2
    assert scores[0] == pytest.approx(reward(images[:1], ["a cat"])[0], abs=1e-5)
    assert "holds a special token of the model ('a <|Reward|> cat')" in caplog.text


class TestText:
    @pytest.fixture
    def cache(self, monkeypatch, tmp_path, tiny_text) -> Path:
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
        return tmp_path / "cache" / "trl_diffusion_opd" / f"hpsv3-{TEXT_SHA256[:8]}.py"

    @pytest.fixture
    def server(self, monkeypatch, tmp_path):
        """A server with the authors' source; `server.file` is what it serves."""
        (tmp_path / "served").mkdir()
        handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "served")
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.file = tmp_path / "served" / "source.py"
        server.file.write_text(SOURCE)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        monkeypatch.setattr(hpsv3_text, "ADDRESS", f"http://127.0.0.1:{server.server_port}/source.py")
        yield server
        server.shutdown()
        server.server_close()

    def test_it_is_fetched_once_and_not_run(self, cache, server, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        assert load_text() == TEXT and cache.read_text() == SOURCE
        server.file.unlink()
        assert load_text() == TEXT and not (tmp_path / "ran").exists()
        assert list(cache.parent.iterdir()) == [cache]

    def test_a_cache_that_cannot_be_written_is_done_without(self, cache, server, tmp_path):
        (tmp_path / "cache").write_text("no folder")
        assert load_text() == TEXT

    def test_another_text_is_refused_and_not_kept(self, cache, server):
        server.file.write_text(SOURCE.replace("good", "bad"))
        with pytest.raises(
            ValueError, match=r"not that of the published model: its SHA-256 is [0-9a-f]{8}\.\.\. and not"
        ):
            load_text()
        server.file.write_text("prompt_with_special_token = 'x'\n")
        with pytest.raises(ValueError, match="has no text 'INSTRUCTION'. Get http"):
            load_text()
        server.file.write_text("<html>")
        with pytest.raises(ValueError, match="is not the source with the model's text: "):
            load_text()
        assert not cache.exists()

    def test_what_cannot_be_fetched(self, cache, server, monkeypatch, tmp_path):
        server.file.unlink()
        with pytest.raises(
            SourceError, match="cannot be fetched .*404.* Download http.* and pass the file as `text_path`"
        ):
            load_text()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(SourceError, match="not in the cache and HF_HUB_OFFLINE is set. Download http"):
            load_text()
        with pytest.raises(SourceError, match=r"no local file '.*none\.py'. Check the spelling of `text_path`"):
            load_text(tmp_path / "none.py")
        (tmp_path / "mine.py").write_text(SOURCE)
        assert load_text(tmp_path / "mine.py") == TEXT

    def test_the_published_one_is_pinned(self):
        assert ADDRESS.startswith("https://raw.githubusercontent.com/MizzenAI/HPSv3/") and len(SHA256) == 64
        assert len(ADDRESS.split("/")[5]) == 40, "a commit, not a branch"
