# SPDX-License-Identifier: Apache-2.0
"""One connection to `hub_server.py`: reading, answering, going wrong on demand, and who may see and write what."""

import json
import re
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import NamedTuple
from urllib.parse import parse_qs, unquote

from tests.support.hub_store import Repo


ROUTES = []


def route(methods: str, pattern: str):
    """Registers a method of `Handler`. It gets the named groups of the pattern, but `type` and `repo`, decoded."""

    def register(function):
        ROUTES.append((methods.split(), re.compile(pattern), function))
        return function

    return register


class Request(NamedTuple):
    """One request as it was answered. `status` is 0 where the connection was dropped."""

    method: str
    path: str
    status: int
    user: str | None


@dataclass
class User:
    """A token and whose it is. `orgs` maps an organization to the role in it, `scopes` a namespace to permissions."""

    name: str
    role: str
    orgs: dict[str, str]
    scopes: dict[str, list[str]]

    def can_write(self, namespace: str) -> bool:
        if self.role == "fineGrained":
            return "repo.write" in self.scopes.get(namespace, [])
        return self.role == "write" and (namespace == self.name or self.orgs.get(namespace) in ("write", "admin"))

    def belongs_to(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.orgs


@dataclass
class Fault:
    """What to do wrong, see [`HubServer.fail`]."""

    method: str | None
    path: str
    status: int
    times: float
    headers: dict[str, str]
    kind: str
    delay: float
    message: str


class HubError(Exception):
    """Answered as JSON and with the headers that the client reads."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.body = {"error": message}
        self.headers = {
            "X-Error-Message": message.encode("ascii", "replace").decode(),
            **({"X-Error-Code": code} if code else {}),
            **(headers or {}),
        }


class Dropped(Exception):
    """The connection was cut on purpose."""


class BaseHandler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, hub, *args):
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *args):
        pass

    def handle_request(self):
        raw_path, _, query = self.path.partition("?")
        self.url, self.query = unquote(raw_path), parse_qs(query)
        self.form = {}
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user = self.hub.tokens.get(self.token)
        self.fault = self.hub.take_fault(self.command, self.url)
        kind = self.fault and self.fault.kind
        try:
            self.body = self.read_body(half=kind == "drop")
            if kind == "slow":
                self.hub.closing.wait(self.fault.delay)
            if kind == "status":
                raise HubError(self.fault.status, self.fault.message, headers=self.fault.headers)
            if self.token and self.user is None:
                raise HubError(401, "Invalid credentials in Authorization header")
            for methods, pattern, function in ROUTES:
                if self.command in methods and (match := pattern.fullmatch(raw_path)):
                    with self.hub.lock:
                        answer = self.call(function, match)
                    break
            else:
                raise HubError(404, "Sorry, we can't find the page you are looking for.")
            self.reply(*answer) if isinstance(answer, tuple) else self.reply(200, answer)
        except HubError as error:
            self.reply(error.status, error.body, error.headers)
        except Dropped:
            self.hub.requests.append(Request(self.command, self.url, 0, self.user and self.user.name))
            self.close_connection = True
        except (BrokenPipeError, ConnectionResetError):  # the client went away
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def call(self, function, match: re.Match):
        groups = {name: value and unquote(value) for name, value in match.groupdict().items()}
        if "repo" in groups:
            repo_type = (groups.pop("type") or "models").removesuffix("s")
            return function(self, self.find(repo_type, groups.pop("repo")), **groups)
        return function(self, **groups)

    def read_body(self, half: bool) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
                if half:
                    raise Dropped
            self.rfile.readline()
            return body
        size = int(self.headers.get("Content-Length", 0))
        if half and size:
            self.rfile.read(size // 2)
            raise Dropped
        return self.rfile.read(size)

    def reply(self, status: int, body: bytes | dict | list, headers: dict[str, str] | None = None):
        headers = dict(headers or {})
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json; charset=utf-8"
        kind = self.fault and self.fault.kind
        drop = kind == "drop"
        if kind == "lost" or (drop and self.command == "HEAD"):
            raise Dropped
        if kind == "corrupt":
            body = bytes(255 - byte for byte in body)
        user = self.user and self.user.name
        self.hub.requests.append(Request(self.command, self.url, 0 if drop else status, user))
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if drop else body)
        if drop:
            self.close_connection = True

    # Who asks, and what may be seen

    def can_read(self, repo: Repo) -> bool:
        return self.user is not None and (self.user.belongs_to(repo.namespace) or self.user.name in repo.allowed)

    def find(self, repo_type: str, repo_id: str) -> Repo:
        repo = self.hub.store.repos.get((repo_type, repo_id))
        if repo is None or (repo.private and not self.can_read(repo)):
            if self.user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def check_gate(self, repo: Repo):
        if repo.gated and not self.can_read(repo):
            start = f"Access to {repo.repo_type} {repo.repo_id} is restricted"
            if self.user is None:
                raise HubError(
                    401, f"{start}. You must have access to it and be authenticated to access it.", "GatedRepo"
                )
            where = f"https://huggingface.co/{repo.url_path}"
            raise HubError(
                403, f"{start} and you are not in the authorized list. Visit {where} to ask for access.", "GatedRepo"
            )

    def check_write(self, namespace: str, message: str = "Authorization error."):
        if self.user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if not self.user.can_write(namespace):
            raise HubError(403, message)

    def commit_of(self, repo: Repo, revision: str) -> str:
        try:
            return repo.resolve(revision)
        except KeyError:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound") from None
