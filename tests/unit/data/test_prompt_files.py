# SPDX-License-Identifier: Apache-2.0
"""Prompt files at an address: fetched once, asked for again, and named without what may be secret."""

import hashlib
import http.server
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import pytest

from trl_diffusion_opd.data.prompt_sets import load_prompts


ROOT = Path(__file__).parents[3]


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves `server.files` with an ETag, and tells in `server.answers` what it was asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = web.files.get(self.path.partition("?")[0])
            etag = f'"{hashlib.sha256(content).hexdigest()}"' if content is not None else None
            status = 404 if content is None else 304 if self.headers["If-None-Match"] == etag else 200
            if web.failures and status == 200:
                status = web.failures.pop()
            web.answers.append(status)
            self.send_response(status)
            if etag:
                self.send_header("ETag", etag)
            body = content if status == 200 else b""
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        web.files, web.answers, web.failures = {}, [], []
        web.address = f"http://127.0.0.1:{web.server_port}"
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield web
        web.shutdown()


def test_a_file_is_fetched_again_only_if_it_has_changed(server):
    server.files["/a.txt"] = b"one\n"
    for _ in range(3):
        assert load_prompts(f"{server.address}/a.txt")[0]["prompt"] == ["one"]
    assert server.answers == [200, 304, 304]
    server.files["/a.txt"] = b"two\n"
    assert load_prompts(f"{server.address}/a.txt")[0]["prompt"] == ["two"]
    assert server.answers == [200, 304, 304, 200]


def test_files_of_one_name_at_several_addresses_are_told_apart(server):
    server.files |= {"/a/x.txt": b"one\n", "/b/x.txt": b"two\n"}
    assert [load_prompts(f"{server.address}/{folder}/x.txt")[0]["prompt"] for folder in "ab"] == [["one"], ["two"]]


FETCH = """
import sys
import datasets.config
datasets.config.HF_DATASETS_CACHE = sys.argv[2]
from trl_diffusion_opd.data.prompt_files import _download
print(_download(sys.argv[1], "prompts").read_text())
"""


def test_of_the_processes_of_a_machine_one_downloads(server, tmp_path):
    server.files["/a.txt"] = b"one"
    command = [sys.executable, "-c", FETCH, f"{server.address}/a.txt", str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=120)[0] for process in processes] == ["one\n"] * 3
    assert sorted(server.answers) == [200, 304, 304]


def test_a_failure_that_passes_is_tried_again(server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.files["/a.txt"] = b"one\n"
    server.failures = [503, 502]
    assert load_prompts(f"{server.address}/a.txt")[0]["prompt"] == ["one"]
    assert server.answers == [502, 503, 200]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/broken.jsonl", r"'http://127.0.0.1/broken.jsonl' cannot be read: JSON parse error"),
        ("/a.txt", r"there is no option 'strem'"),
        ("/missing.txt", r"downloading http://127.0.0.1/missing.txt failed: the server answered with HTTP 404. Check"),
        ("/a.zip", r"'http://127.0.0.1/a.zip' cannot be read: the address of a prompt file must end in .txt"),
        ("/a b\n.txt", r"failed: "),
    ],
)
def test_what_may_be_secret_in_an_address_is_never_told(server, path, message):
    server.files |= {"/broken.jsonl": b'{"prompt"', "/a.txt": b"one\n"}
    address = server.address.replace("//", "//me:password@") + path + "?token=hf_hidden"
    options = {"strem": True} if path == "/a.txt" else {}
    with pytest.raises((ValueError, OSError), match=message) as info:
        load_prompts({"path": address, **options})
    told = "".join(traceback.format_exception(info.value))
    assert "hf_hidden" not in told and "password" not in told, told


def test_addresses_of_another_kind_are_told_without_secrets():
    for path in ("ftp://me:password@host/a.txt?token=hf_hidden", "s3://me:password@host/a.zip?token=hf_hidden"):
        with pytest.raises((ValueError, OSError)) as info:
            load_prompts(path)
        assert "hf_hidden" not in str(info.value) and "password" not in str(info.value)
        assert path.partition("me:")[0] + "host/a." in str(info.value)
