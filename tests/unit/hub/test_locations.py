# SPDX-License-Identifier: Apache-2.0
"""Locations of LoRAs, and downloading them with the real Hub client from a loopback server."""

import math
import re
from pathlib import Path

import pytest

from tests.support.hub_server import run
from trl_diffusion_opd.hub.download import resolve
from trl_diffusion_opd.hub.errors import SourceError
from trl_diffusion_opd.hub.locations import Source, check_not_pickle, parse_source


FILES = {
    "ocr/adapter_config.json": b"{}",
    "ocr/adapter_model.safetensors": b"peft weights",
    "ocr/optimizer.safetensors": b"not needed",
    "plain/pytorch_lora_weights.safetensors": b"diffusers weights",
    "named/style.safetensors": b"named weights",
    "old/adapter_model.bin": b"pickle",
}

# One process resolves many sources, because importing the client is what takes time.
RESOLVE = """
import sys
from trl_diffusion_opd.hub.locations import parse_source
from trl_diffusion_opd.hub.download import resolve
for text in sys.argv[1:]:
    location, _, weight_name = text.partition("#")
    try:
        resolved = resolve(parse_source(location), weight_name=weight_name or None, owner="teacher 'ocr'")
        print("OK", resolved.commit, resolved.path.name, resolved.path.read_bytes().decode())
    except Exception as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))
"""


def run_resolve(env, *sources, **extra):
    # The client waits for 23 s in all between its attempts to reach a Hub that does not answer: here it does not wait.
    done = run(RESOLVE, env | extra, *sources, patient=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


class TestParseSource:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("me/repo", Source("me/repo")),
            ("me/repo/a/b", Source("me/repo", "a/b")),
            ("me/repo@v1", Source("me/repo", None, "v1")),
            ("me/repo/a@refs/pr/3", Source("me/repo", "a", "refs/pr/3")),
        ],
    )
    def test_hub(self, text, expected):
        assert parse_source(text) == expected
        assert str(parse_source(text)) == text

    def test_existing_path_wins(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert parse_source("me/repo").repo_id == "me/repo"
        (tmp_path / "me" / "repo").mkdir(parents=True)
        assert parse_source("me/repo") == Source(path=Path("me/repo"))

    @pytest.mark.parametrize("text", ["./me/repo", "/me/repo", "../repo", Path("me/repo")])
    def test_local_by_form(self, text):
        assert parse_source(text) == Source(path=Path(text))

    @pytest.mark.parametrize("text", ["", "repo", "me/", "/".join(["me", "", "x"]), "me/repo@"])
    def test_refuses(self, text):
        with pytest.raises(ValueError, match=f"owner/repo.*but is {re.escape(repr(text))}"):
            parse_source(text)

    def test_refuses_url(self):
        with pytest.raises(ValueError, match="not a URL"):
            parse_source("https://huggingface.co/me/repo")


class TestResolve:
    def test_local(self, tmp_path):
        assert resolve(tmp_path).path == tmp_path
        assert resolve(str(tmp_path)).commit is None

    def test_local_missing(self, tmp_path):
        with pytest.raises(SourceError, match="teacher 'ocr': the local path .*nowhere.* does not exist"):
            resolve(tmp_path / "nowhere", owner="teacher 'ocr'")

    @pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.ckpt", "a.PTH"])
    def test_refuses_pickle(self, name):
        with pytest.raises(ValueError, match=r"teacher 'ocr': 'a\..*only safetensors is loaded.*save_file"):
            check_not_pickle(name, "teacher 'ocr'")
        with pytest.raises(ValueError, match="pickle"):
            resolve("me/repo", weight_name=name)

    def test_hub_success(self, hub, tmp_path):
        older = hub.put("me/teachers", FILES)
        commit = hub.put("me/teachers", {"plain/pytorch_lora_weights.safetensors": b"newer weights"})
        hub.repo("me/teachers").refs["tags/v1"] = older
        env = hub.environment(tmp_path / "home")
        lines = run_resolve(
            env, "me/teachers/ocr", "me/teachers/plain@v1", "me/teachers/plain", "me/teachers/named#style.safetensors"
        )
        assert lines == [
            f"OK {commit} adapter_model.safetensors peft weights",
            f"OK {older} pytorch_lora_weights.safetensors diffusers weights",
            f"OK {commit} pytorch_lora_weights.safetensors newer weights",
            f"OK {commit} style.safetensors named weights",
        ]
        fetched = [request.path for request in hub.requests if request.method == "GET" and "/resolve/" in request.path]
        assert {path.rsplit("/", 1)[1] for path in fetched} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "pytorch_lora_weights.safetensors",
            "style.safetensors",
        }
        # After the config, the weights are asked for at its commit.
        assert f"/me/teachers/resolve/{commit}/ocr/adapter_model.safetensors" in fetched
        # What was downloaded is found again without the Hub.
        offline = run_resolve(env, "me/teachers/ocr", "me/other", HF_HUB_OFFLINE="1")
        assert offline[0] == lines[0]
        assert re.match("SourceError teacher 'ocr': me/other is not in the local cache and HF_HUB_OFFLINE", offline[1])

    def test_hub_errors(self, hub, tmp_path):
        hub.put("me/teachers", FILES)
        for repo_id in ("me/down", "me/forbidden"):
            hub.put(repo_id, FILES)
        hub.put("me/hidden", FILES, private=True)
        hub.put("me/gated", FILES, gated=True)
        hub.fail(path="me/down", status=500, times=math.inf)
        hub.fail(path="me/forbidden", status=403, times=math.inf)
        expected = {
            "me/nowhere": r"SourceError teacher 'ocr': the repository 'me/nowhere' was not found.*spelling.*login",
            "me/hidden": r"SourceError teacher 'ocr': the repository 'me/hidden' was not found.*private.*auth login",
            "me/gated": r"SourceError teacher 'ocr': .*'me/gated' is gated.*huggingface.co/me/gated .*auth login",
            "me/forbidden": r"SourceError teacher 'ocr': .*refused access \(HTTP 403\).*auth login",
            "me/down": r"SourceError teacher 'ocr': .*HTTP 500.*later",
            "me/teachers/ocr@v9": r"SourceError teacher 'ocr': .*'me/teachers' has no revision 'v9'",
            "me/teachers/genev": r"AbsentError teacher 'ocr': .*no file 'pytorch_lora_weights.safetensors' in "
            r"me/teachers/genev. Folders of the repository.*'named', 'ocr', 'plain'",
            "me/teachers/named": r"AbsentError teacher 'ocr': .*holds 'style.safetensors'.*`weight_name`",
            "me/teachers/old": r"ValueError teacher 'ocr' \(me/teachers/old\): 'adapter_model.bin' is a pickle",
            "me/te..achers": r"SourceError teacher 'ocr': 'me/te..achers' is not a valid Hub repository name",
        }
        hub.add_user("stranger", token="hf_stranger")
        lines = run_resolve(hub.environment(tmp_path / "home", token="hf_stranger"), *expected)
        for line, pattern in zip(lines, expected.values(), strict=True):
            assert re.match(pattern, line), line

    def test_hub_errors_without_a_token(self, hub, tmp_path):
        hub.put("me/hidden", FILES, private=True)
        hub.put("me/gated", FILES, gated=True)
        hidden, gated = run_resolve(hub.environment(tmp_path / "home"), "me/hidden", "me/gated")
        assert re.match(r"SourceError teacher 'ocr': the repository 'me/hidden' was not found.*private.*login", hidden)
        assert re.match(r"SourceError teacher 'ocr': .*'me/gated' is gated.*huggingface.co/me/gated .*login", gated)

    def test_unreachable(self, hub, tmp_path):
        env = hub.environment(tmp_path / "home")
        (line,) = run_resolve(env, "me/teachers", HF_ENDPOINT="http://127.0.0.1:9")
        assert re.match(r"SourceError .*me/teachers is not in the local cache and http://127.0.0.1:9 could not", line)
