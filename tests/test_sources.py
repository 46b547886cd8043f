# SPDX-License-Identifier: Apache-2.0
"""Locations of LoRAs, and downloading them with the real Hub client from a loopback server."""

import os
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from trl_diffusion_opd.sources import Source, SourceError, check_not_pickle, parse_source, resolve


COMMIT = "0123456789abcdef0123456789abcdef01234567"

FILES = {
    "me/teachers": {
        "ocr/adapter_config.json": b"{}",
        "ocr/adapter_model.safetensors": b"peft weights",
        "ocr/optimizer.safetensors": b"not needed",
        "plain/pytorch_lora_weights.safetensors": b"diffusers weights",
        "named/style.safetensors": b"named weights",
        "old/adapter_model.bin": b"pickle",
    }
}


class _Hub(BaseHTTPRequestHandler):
    """Answers what `hf_hub_download` and `list_repo_files` ask, for one repository and a few broken ones."""

    def __init__(self, requests, *args):
        self.requests = requests
        super().__init__(*args)

    def log_message(self, *args):
        pass

    def _answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0].strip("/")
        self.requests.append(f"{self.command} {path}")
        repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
        rest = path.removeprefix("api/models/").removeprefix(f"{repo}/")
        broken = {"me/gated": (403, "GatedRepo"), "me/hidden": (401, "RepoNotFound")}
        if repo in broken:
            status, code = broken[repo]
            self._answer(status, X_Error_Code=code)
        elif repo == "me/down":
            self._answer(500)
        elif repo == "me/forbidden":
            self._answer(403)
        elif repo not in FILES:
            self._answer(404, X_Error_Code="RepoNotFound")
        elif path.startswith("api/"):
            names = ",".join(f'{{"type":"file","oid":"0","size":1,"path":"{name}"}}' for name in FILES[repo])
            self._answer(200, f"[{names}]".encode(), Content_Type="application/json")
        else:
            revision, _, name = rest.removeprefix("resolve/").partition("/")
            if revision not in ("main", "v1", COMMIT):
                self._answer(404, X_Error_Code="RevisionNotFound")
            elif name not in FILES[repo]:
                self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            else:
                self._answer(200, FILES[repo][name], ETag=f'"{abs(hash(name)):x}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture
def hub():
    requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Hub, requests))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()


# One process resolves many sources, because importing the client is what takes time. The client waits for 23 s in all
# between its attempts to reach a Hub that does not answer: here it does not wait.
RESOLVE = """
import sys
import time
time.sleep = lambda seconds: None
from trl_diffusion_opd.sources import parse_source, resolve
for text in sys.argv[1:]:
    location, _, weight_name = text.partition("#")
    try:
        resolved = resolve(parse_source(location), weight_name=weight_name or None, owner="teacher 'ocr'")
        print("OK", resolved.commit, resolved.path.name, resolved.path.read_bytes().decode())
    except Exception as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))
"""


def run_resolve(endpoint, cache, *sources, **extra):
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE"))}
    env |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(cache), **extra}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, *sources], env=env, cwd=root, capture_output=True, text=True, timeout=60
    )
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
        endpoint, requests = hub
        lines = run_resolve(
            endpoint, tmp_path, "me/teachers/ocr", "me/teachers/plain@v1", "me/teachers/named#style.safetensors"
        )
        assert lines == [
            f"OK {COMMIT} adapter_model.safetensors peft weights",
            f"OK {COMMIT} pytorch_lora_weights.safetensors diffusers weights",
            f"OK {COMMIT} style.safetensors named weights",
        ]
        fetched = {path.rsplit("/", 1)[1] for path in requests if path.startswith("GET me/teachers/resolve")}
        assert fetched == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "pytorch_lora_weights.safetensors",
            "style.safetensors",
        }
        # After the config, the weights are asked for at its commit.
        assert f"GET me/teachers/resolve/{COMMIT}/ocr/adapter_model.safetensors" in requests
        # What was downloaded is found again without the Hub.
        offline = run_resolve(endpoint, tmp_path, "me/teachers/ocr", "me/other", HF_HUB_OFFLINE="1")
        assert offline[0] == lines[0]
        assert re.match("SourceError teacher 'ocr': me/other is not in the local cache and HF_HUB_OFFLINE", offline[1])

    def test_hub_errors(self, hub, tmp_path):
        endpoint, _ = hub
        expected = {
            "me/nowhere": r"SourceError teacher 'ocr': the repository 'me/nowhere' was not found.*spelling.*login",
            "me/hidden": r"SourceError teacher 'ocr': the repository 'me/hidden' was not found.*private.*auth login",
            "me/gated": r"SourceError teacher 'ocr': .*'me/gated' is gated.*huggingface.co/me/gated .*auth login",
            "me/forbidden": r"SourceError teacher 'ocr': .*refused access \(HTTP 403\).*auth login",
            "me/down": r"SourceError teacher 'ocr': .*HTTP 500.*later",
            "me/teachers/ocr@v9": r"SourceError teacher 'ocr': .*'me/teachers' has no revision 'v9'",
            "me/teachers/genev": r"SourceError teacher 'ocr': .*no file 'pytorch_lora_weights.safetensors' in "
            r"me/teachers/genev. Folders of the repository.*'named', 'ocr', 'plain'",
            "me/teachers/named": r"SourceError teacher 'ocr': .*holds 'style.safetensors'.*`weight_name`",
            "me/teachers/old": r"ValueError teacher 'ocr' \(me/teachers/old\): 'adapter_model.bin' is a pickle",
            "me/te..achers": r"SourceError teacher 'ocr': 'me/te..achers' is not a valid Hub repository name",
        }
        lines = run_resolve(endpoint, tmp_path, *expected)
        for line, pattern in zip(lines, expected.values(), strict=True):
            assert re.match(pattern, line), line

    def test_unreachable(self, tmp_path):
        (line,) = run_resolve("http://127.0.0.1:9", tmp_path, "me/teachers")
        assert re.match(r"SourceError .*me/teachers is not in the local cache and http://127.0.0.1:9 could not", line)
