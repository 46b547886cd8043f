# SPDX-License-Identifier: Apache-2.0
"""
A small Hub on loopback, for the unmodified clients: `huggingface_hub`, `diffusers`, `datasets` and `transformers`.

It speaks the Hub's HTTP protocol for models, datasets and spaces as far as these clients use it: users and tokens,
private and gated repositories, commits of regular and LFS files, branches and tags, downloads. It can be told to
misbehave with [`HubServer.fail`].

Outside it: Xet (clients must run with `HF_HUB_DISABLE_XET=1`) and the real Hub's own rules, such as rate limits,
quotas, virus scans and every check of a card that is not in `hub_cards.py`. One answer differs on purpose: where the
real Hub answers 401 for a repository that a stranger without a token may not see, this one adds the error code
`RepoNotFound`, because without it the client recognizes such an answer for `https` addresses only.
"""

import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

from tests.support.hub_handler import Fault, Request, User
from tests.support.hub_routes import Handler
from tests.support.hub_store import Repo, Store, is_lfs


ROOT = Path(__file__).parents[2]

# Put before the code of `run(..., patient=False)`: waits are noted in `time.waits` and cut to 10 ms.
IMPATIENT = """
import time
time.waits, time._sleep = [], time.sleep
time.sleep = lambda seconds: (time.waits.append(seconds), time._sleep(min(seconds, 0.01)))[1]
"""


@dataclass
class HubServer:
    """
    The server, as a context manager.

    ```python
    with HubServer(tmp_path / "hub") as hub:
        hub.add_user("me", token="hf_write")
        hub.put("me/teachers", {"ocr/pytorch_lora_weights.safetensors": weights})
        hub.fail(method="GET", path=r"\\.safetensors$", status=500, times=2)
        done = run("import huggingface_hub; ...", hub.environment(tmp_path / "home", token="hf_write"))
        assert done.returncode == 0, done.stderr
    ```

    Args:
        folder (`Path`):
            Where the repositories are stored. Those that are there already are served.
    """

    folder: Path
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self):
        self.store = Store(self.folder)
        self.tokens: dict[str, User] = {}
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.closing = threading.Event()

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def add_user(
        self,
        name: str,
        token: str,
        role: str = "write",
        orgs: list[str] | dict[str, str] = (),
        scopes: dict[str, list[str]] | None = None,
    ) -> None:
        """
        Adds a token of a user. A user may have several.

        Args:
            name (`str`):
                Name of the user, which is also a namespace.
            token (`str`):
                What the client sends.
            role (`str`, *optional*, defaults to `"write"`):
                Role of the token: `"read"`, `"write"` or `"fineGrained"`.
            orgs (`list[str]` or `dict[str, str]`, *optional*):
                Organizations of the user, with the role in each (`"read"`, `"write"`); a list means `"write"`.
            scopes (`dict[str, list[str]]`, *optional*):
                Permissions of a fine-grained token by namespace, such as `{"me": ["repo.content.read", "repo.write"]}`.
        """
        orgs = orgs if isinstance(orgs, dict) else dict.fromkeys(orgs, "write")
        self.tokens[token] = User(name, role, orgs, scopes or {})

    def fail(
        self,
        method: str | None = None,
        path: str = "",
        status: int = 500,
        times: float = 1,
        headers: dict[str, str] | None = None,
        kind: str = "status",
        delay: float = 1.0,
        message: str = "Internal Error",
    ) -> None:
        """
        Makes the next requests go wrong.

        Args:
            method (`str`, *optional*):
                Only requests of this method.
            path (`str`, *optional*):
                Only requests whose decoded path, without the query, is found by this regular expression.
            status (`int`, *optional*, defaults to `500`):
                Status to answer with `kind="status"`.
            times (`float`, *optional*, defaults to `1`):
                How many matching requests fail, `math.inf` for all.
            headers (`dict[str, str]`, *optional*):
                More headers of that answer, such as `{"Retry-After": "2"}` or `{"X-Error-Code": "GatedRepo"}`.
            kind (`str`, *optional*, defaults to `"status"`):
                `"status"` answers with `status`; `"drop"` cuts the connection after half of the request's body, or where
                it has none after half of the answer's; `"lost"` does what was asked and cuts the connection instead
                of answering; `"slow"` answers rightly after `delay` seconds; `"corrupt"` answers with as many bytes
                as it should, but other ones.
            delay (`float`, *optional*, defaults to `1.0`):
                Seconds for `kind="slow"`.
            message (`str`, *optional*, defaults to `"Internal Error"`):
                Message of the answer with `kind="status"`.
        """
        self.faults.append(Fault(method, path, status, times, headers or {}, kind, delay, message))

    def put(
        self,
        repo_id: str,
        files: dict[str, bytes | Path] | Path,
        repo_type: str = "model",
        private: bool = False,
        gated: bool = False,
        branch: str = "main",
        sdk: str | None = None,
        message: str = "Put files",
    ) -> str:
        """
        Adds files to a repository without HTTP, and makes the repository if it is not there.

        Args:
            repo_id (`str`):
                `owner/name`.
            files (`dict[str, bytes | Path]` or `Path`):
                Contents by path in the repository, or a folder of which every file is taken.
            repo_type (`str`, *optional*, defaults to `"model"`):
                `"model"`, `"dataset"` or `"space"`.
            private, gated, sdk:
                Settings of a new repository.
            branch (`str`, *optional*, defaults to `"main"`):
                Branch of the commit, made at the head of `main` if it is not there.
            message (`str`, *optional*, defaults to `"Put files"`):
                Message of the commit.

        Returns:
            `str`: The hash of the commit.
        """
        if isinstance(files, Path):
            files = {path.relative_to(files).as_posix(): path for path in files.rglob("*") if path.is_file()}
        with self.lock:
            repo = self.store.repos.get((repo_type, repo_id))
            if repo is None:
                repo = self.store.add_repo(Repo(repo_id, repo_type, private, gated, sdk))
            if f"heads/{branch}" not in repo.refs and repo.refs:
                repo.refs[f"heads/{branch}"] = repo.refs["heads/main"]
            head = repo.refs.get(f"heads/{branch}")
            entries = dict(repo.commits[head]["files"]) if head else {}
            for path, content in files.items():
                data = content.read_bytes() if isinstance(content, Path) else content
                entries[path] = self.store.entry(data, is_lfs(path, len(data), data[:512]))
            return self.store.commit(repo, branch, entries, message, author=repo.namespace)

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        """Returns a repository, with its settings, refs and commits. Raises `KeyError` where there is none."""
        return self.store.repos[repo_type, repo_id]

    def allow(self, repo_id: str, user: str, repo_type: str = "model") -> None:
        """Lets a user into a gated or private repository."""
        repo = self.repo(repo_id, repo_type)
        repo.allowed.append(user)
        self.store.save(repo)

    def files(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Returns the files of a repository at a branch, tag or commit."""
        repo = self.repo(repo_id, repo_type)
        entries = repo.commits[repo.resolve(revision)]["files"]
        return {path: self.store.blob(entry["sha256"]).read_bytes() for path, entry in entries.items()}

    def commits(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> list[tuple[str, str]]:
        """Returns the hash and the message of every commit, the newest first."""
        repo = self.repo(repo_id, repo_type)
        return [(commit, repo.commits[commit]["message"]) for commit in repo.history(repo.resolve(revision))]

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """
        Returns the environment of a client process: this endpoint, its own cache at `home`, maybe a token, and one
        thread as in the tests, since more would round differently.
        """
        env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE"))}
        env |= {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
        env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        env["OMP_NUM_THREADS"] = "1"
        return env | ({"HF_TOKEN": token} if token else {})

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method in (None, method) and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


def run(
    code: str, env: dict[str, str], *args: str, patient: bool = True, timeout: float = 120
) -> subprocess.CompletedProcess:
    """
    Runs Python code in a process of its own, from the root of the repository.

    Args:
        code (`str`):
            The code, which finds `args` in `sys.argv[1:]`.
        env (`dict[str, str]`):
            From [`HubServer.environment`].
        patient (`bool`, *optional*, defaults to `True`):
            `False` cuts every `time.sleep` to 10 ms, so that a client's waits between its attempts cost nothing. The
            waits asked for are listed in `time.waits`.
        timeout (`float`, *optional*, defaults to `120`):
            Seconds after which the process is killed.
    """
    command = [sys.executable, "-c", code if patient else IMPATIENT + code, *map(str, args)]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
