# SPDX-License-Identifier: Apache-2.0
"""Nothing waits for the Hub longer than `LONGEST_WAIT`, and every wait is told; with the real client."""

import json
import math

import pytest

from tests.support.hub_server import run
from trl_diffusion_opd.hub import waiting


CLIENT = """
import json, sys, time
from trl_diffusion_opd.hub.download import resolve
from trl_diffusion_opd.hub.upload import create_repo, push_files

def get(repo):
    return resolve(f"{repo}/ocr", owner="teacher 'ocr'").path.read_bytes().decode()

def put(repo):
    return push_files({"w.safetensors": b"weights of " + repo.encode()}, create_repo(repo), "Upload").oid

results = {}
for spec in sys.argv[1:]:
    time.waits.clear()
    print(f"== {spec}", file=sys.stderr, flush=True)
    try:
        outcome = {"get": get, "put": put}[spec.split()[0]](spec.split()[1])
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    results[spec] = [outcome, [wait for wait in time.waits if wait >= 1]]
print("RESULTS" + json.dumps(results))
"""
HOUR = {"Retry-After": "3600"}
WINDOW = {"ratelimit": '"api";r=0;t=900'}


@pytest.mark.parametrize("verbosity", ["warning", "error"])  # the latter is that of the command line
def test_a_server_that_asks_for_an_hour_is_not_waited_for(hub, tmp_path, verbosity):
    hub.add_user("me", token="hf_write")
    faults = {  # what is asked, of which requests, how many of them are refused, the headers of the refusal
        "get me/head": ("HEAD", "/me/head/resolve/", math.inf, HOUR),
        "get me/body": ("GET", "/me/body/resolve/.*safetensors", math.inf, HOUR),
        "get me/window": ("HEAD", "/me/window/resolve/", math.inf, WINDOW),
        "put me/pre": ("POST", "/me/pre/preupload/", math.inf, HOUR),
        "put me/commit": ("POST", "/me/commit/commit/", math.inf, HOUR),
        "get me/short": ("GET", "/me/short/resolve/.*safetensors", 1, {"Retry-After": "9"}),
        "put me/little": ("POST", "/me/little/preupload/", 1, {"ratelimit": '"api";r=0;t=55'}),
        "get me/other": ("GET", "/me/other/resolve/.*safetensors", 1, {"ratelimit": '"api";r=7;t=900'}),
        "put me/later": ("POST", "/me/later/commit/", 1, {"Retry-After": "61"}),
    }
    for spec, (method, path, times, headers) in faults.items():
        if spec.startswith("get"):
            hub.put(spec.split()[1], {"ocr/pytorch_lora_weights.safetensors": b"weights"})
        hub.fail(method, path, status=429, times=times, headers=headers, message="Too many requests")
    env = hub.environment(tmp_path / "home", token="hf_write") | {"HF_HUB_VERBOSITY": verbosity}
    done = run(CLIENT, env, *faults, patient=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.partition("RESULTS")[2])
    told = dict(part.split("\n", 1) for part in done.stderr.split("== ")[1:])

    for spec in ("get me/head", "get me/body", "put me/pre", "put me/commit"):
        outcome, waits = results[spec]
        assert waits == [], spec
        kind = "SourceError: teacher 'ocr': " if spec.startswith("get") else "PushError: Cannot push to "
        assert outcome.startswith(kind) and "HTTP 429" in outcome and "Try again in 3600 seconds" in outcome, outcome
    assert "Try again in 900 seconds" in results["get me/window"][0] and results["get me/window"][1] == []

    # What is asked for within the limit is waited for, and told.
    # The client waits a second more than it is asked to.
    lines = {
        "get me/short": (10, "Waiting 10.0s" if verbosity == "warning" else "The Hub asks to wait 9 s (HTTP 429)"),
        "put me/little": (56, "Waiting 56.0s" if verbosity == "warning" else "The Hub asks to wait 55 s (HTTP 429)"),
        "put me/later": (61, "Pushing to 'me/later' failed (HTTP 429). Trying again in 61 s."),
    }
    for spec, (wait, line) in lines.items():
        outcome, waits = results[spec]
        assert "Error" not in outcome and waits == [wait], (spec, outcome, waits)
        assert told[spec].count(line) == 1, told[spec]
    assert results["get me/other"][1] == [1], "the limit is not what it was refused for"


OWN_CLIENT = """
import sys
from huggingface_hub import set_client_factory
from huggingface_hub.utils._http import default_client_factory, get_session
from trl_diffusion_opd.hub.waiting import limit_waits

def own():
    client = default_client_factory()
    client.headers["X-Mine"] = "yes"
    return client

limit_waits()
set_client_factory(own)
limit_waits()
limit_waits()
session = get_session()
print(session.headers["X-Mine"], [hook.__name__ for hook in session.event_hooks["response"]], get_session() is session)
"""


def test_the_client_that_was_asked_for_stays(hub, tmp_path):
    done = run(OWN_CLIENT, hub.environment(tmp_path))
    assert done.stdout.split("\n")[0] == "yes ['_check_wait'] True", done.stderr


@pytest.mark.parametrize("fails, expected", [(0, []), (2, [1, 2]), (3, [1, 2, 4])])
def test_waits_between_attempts_are_told(caplog, fails, expected):
    waits, errors = [], [ConnectionResetError("gone")] * fails

    def call():
        if errors:
            raise errors.pop()
        return "done"

    assert waiting.retried(call, "Looking", may_pass=lambda error: True, sleep=waits.append) == "done"
    assert waits == expected
    lines = [f"Looking failed (ConnectionResetError). Trying again in {wait} s." for wait in expected]
    assert [record.getMessage() for record in caplog.records] == lines


def test_after_the_last_attempt_the_error_is_raised():
    waits = []

    def call():
        raise ConnectionResetError(f"attempt {len(waits)}")

    with pytest.raises(ConnectionResetError, match="attempt 2"):
        waiting.retried(call, may_pass=lambda error: True, waits=(5, 20), sleep=waits.append)
    assert waits == [5, 20]
    with pytest.raises(ConnectionResetError, match="attempt 2"):
        waiting.retried(call, may_pass=lambda error: False, sleep=waits.append)
    assert waits == [5, 20]


def test_errors_that_cause_each_other_are_looked_through_once():
    first, second = ConnectionResetError("first"), RuntimeError("second")
    first.__context__, second.__cause__ = second, first
    assert list(waiting.chain(first)) == [first, second] and waiting.seconds_asked(first) == 0
