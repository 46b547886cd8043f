# SPDX-License-Identifier: Apache-2.0
"""Pushing runs to the loopback Hub with the unmodified client."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load as load_safetensors

from tests.support.cards import example_record
from tests.support.hub_server import run
from tests.support.push_runs import reported
from trl_diffusion_opd.lora.files import read_lora
from trl_diffusion_opd.publishing.push import read_run
from trl_diffusion_opd.publishing.record import GalleryImage
from trl_diffusion_opd.utils.serialization import without_paths


TOKEN = "hf_writes_and_is_secret"
LORA, RAW = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_raw.safetensors"
RUN_FILES = {LORA, "README.md", "run.json", "provenance.json", "training_args.json"}


@pytest.fixture
def env(hub, tmp_path):
    hub.add_user("me", token=TOKEN, orgs=["team"])
    hub.add_user("me", token="hf_reads", role="read")
    return hub.environment(tmp_path / "home", token=TOKEN)


def own_commits(hub, repo_id, **kwargs):
    """The commits that hold more than the repository's own first one, oldest first."""
    commits = [(message, hub.files(repo_id, revision=sha)) for sha, message in hub.commits(repo_id, **kwargs)]
    return [(message, files) for message, files in reversed(commits) if set(files) - {".gitattributes"}]


def assert_clean(files, tmp_path):
    """Nothing in a commit names this machine, holds a token, is a pickle, a teacher or a base."""
    for name, content in files.items():
        assert not name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")), name
        assert TOKEN.encode() not in content, name
        assert str(tmp_path).encode() not in content, name
        if name.endswith(".safetensors"):
            assert name.endswith((LORA, RAW)), name
            assert not any("teacher" in key or "default" in key for key in load_safetensors(content)), name


def assert_loads(files, name, tmp_path):
    folder = tmp_path / "look"
    folder.mkdir(exist_ok=True)
    (folder / LORA).write_bytes(files[name])
    assert read_lora(folder).state_dict
    return load_safetensors(files[name])


STRATEGIES = """
import sys
from tests.support.push_runs import push_run, report
results = {}
for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
    results[strategy] = push_run(
        f"{sys.argv[1]}/{strategy}", output_dir=f"{sys.argv[1]}/{strategy}/student", hub_strategy=strategy,
        hub_model_id=f"me/{strategy}", hub_token=sys.argv[2], ema_decay=0.5, ema_update_every=1,
    )
report(results)
"""


@pytest.mark.slow
def test_every_strategy_pushes_a_lora_that_loads_in_each_commit(hub, env, tmp_path):
    done = run(STRATEGIES, env, tmp_path, TOKEN, timeout=300)
    results = reported(done)
    assert TOKEN not in done.stdout + done.stderr
    during = ["Training in progress, step 2", "Training in progress, step 4"]
    expected = {
        "end": {},
        "every_save": {},
        "checkpoint": {2: "last-checkpoint", 4: "last-checkpoint"},
        "all_checkpoints": {2: "checkpoint-2", 4: "checkpoint-4"},
    }
    for strategy, folders in expected.items():
        repo_id = f"me/{strategy}"
        assert results[strategy]["repo"] == repo_id
        assert f"{repo_id}/commit/{hub.commits(repo_id)[0][0]}" in results[strategy]["url"]
        commits = own_commits(hub, repo_id)
        assert [message for message, _ in commits] == [*(during if strategy != "end" else []), "End of training"]
        seen = []
        for message, files in commits:
            assert files.keys() >= RUN_FILES | {RAW}
            assert_clean(files, tmp_path)
            seen.append(assert_loads(files, LORA, tmp_path))
            raw = assert_loads(files, RAW, tmp_path)
            assert any(not torch.equal(raw[key], tensor) for key, tensor in seen[-1].items())
            if target := folders.get(int(message.split()[-1]) if "step" in message else None):
                assert files[f"{target}/{LORA}"] == files[LORA]
                assert files[f"{target}/{RAW}"] == files[RAW]
                state = json.loads(files[f"{target}/trainer_state.json"])
                assert state["global_step"] == int(message.split()[-1])
        for first, second in zip(seen[:-2], seen[1:-1], strict=True):
            assert any(not torch.equal(first[key], tensor) for key, tensor in second.items())  # step 2, then step 4
        last = commits[-1][1]
        assert {"curves.png", "images/step_000004.png"} <= set(last)
        local = read_run(tmp_path / strategy / "student")
        assert {name: last[name] for name in local} == local
        assert json.loads(last["training_args.json"])["output_dir"] == "student"
        assert json.loads(last["training_args.json"])["hub_token"] == "<HUB_TOKEN>"


FAILURES = """
import sys
import time
from tests.support.push_runs import push_run, report

results = {}
for repo_id, strategy in (spec.split(":") for spec in sys.argv[2:]):
    time.waits.clear()
    folder = f"{sys.argv[1]}/{repo_id.replace('/', '-')}"
    result = push_run(folder, hub_model_id=repo_id, hub_strategy=strategy, num_grid_prompts=0)
    results[repo_id] = {**result, "waits": [wait for wait in time.waits if wait in (5, 20)]}
report(results)
"""
PUSH = """
import sys
from tests.support.push_runs import report
from trl_diffusion_opd.publishing.push import push_folder

def push(folder, *repo_id):
    try:
        return push_folder(folder, *repo_id)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

report([push(*spec.split(" ")) for spec in sys.argv[1:]])
"""


@pytest.mark.slow
def test_pushes_that_fail(hub, env, tmp_path):
    """Most of it in one process, because importing the libraries is what takes time."""
    hub.fail("POST", r"me/conflict/commit/", status=409, times=1)
    hub.fail("POST", r"me/limited/commit/", status=429, headers={"Retry-After": "1"}, times=2)
    hub.fail("POST", r"me/broken/preupload/", status=500, times=7)  # more than the client tries by itself
    hub.fail("POST", r"me/dropped/commit/", kind="drop", times=1)
    hub.fail("POST", r"me/lost/commit/", kind="lost", times=1)  # the commit is made, the answer is not heard
    hub.fail("POST", r"me/forbidden/commit/", status=403, times=math.inf, message="No, thanks")
    hub.fail("POST", r"me/passing/commit/", status=403, times=1)
    hub.fail("POST", r"team/student/commit/", status=503, times=math.inf)
    at_the_end = ("me/conflict", "me/limited", "me/broken", "me/dropped", "me/lost", "me/forbidden", "team/student")
    runs = [*(f"{repo_id}:end" for repo_id in at_the_end), "me/passing:every_save"]
    done = run(FAILURES, env, tmp_path, *runs, patient=False, timeout=300)
    results = reported(done)

    # What may pass is tried again.
    expected = {"conflict": [5], "limited": [5, 20], "broken": [5], "dropped": [5], "lost": [5]}
    for repo_id, waits in ((f"me/{name}", waits) for name, waits in expected.items()):
        assert "raised" not in results[repo_id], results[repo_id]
        assert results[repo_id]["waits"] == waits, repo_id
        ((_, files),) = own_commits(hub, repo_id)
        assert files[LORA] == (tmp_path / repo_id.replace("/", "-") / "out" / LORA).read_bytes()

    # What is forbidden is not.
    result = results["me/forbidden"]
    assert result["raised"] == "PushError" and "the account may not write there (HTTP 403" in result["message"]
    assert result["waits"] == []
    assert sum("me/forbidden/commit/" in request.path for request in hub.requests) == 1

    # A push on the way that fails is no reason to stop.
    assert "raised" not in results["me/passing"] and "Training goes on" in done.stderr
    during = [message for message, _ in own_commits(hub, "me/passing")]
    assert during == ["Training in progress, step 4", "End of training"]

    # One at the end that fails loses nothing, and says what to do.
    result, out = results["team/student"], tmp_path / "team-student" / "out"
    assert result["raised"] == "PushError" and result["waits"] == [5, 20]
    assert "Cannot push to 'team/student': the Hub answered with HTTP 503" in result["message"]
    assert f"trl-diffusion-opd push {out} --repo_id team/student" in result["message"]
    assert not own_commits(hub, "team/student")

    # Which works from the folder alone, also to another name, for which the card is rendered anew.
    hub.faults.clear()
    broken = tmp_path / "broken"
    shutil.copytree(out, broken)
    (broken / LORA).write_bytes(b"broken")
    first, second, third = reported(run(PUSH, env, out, f"{out} team/renamed", broken))
    assert "team/student/commit/" in first and "team/renamed/commit/" in second
    assert third.startswith("ValueError: ") and "is not a readable safetensors file" in third
    ((message, files),) = own_commits(hub, "team/student")
    assert message == "Upload the LoRA" and files.keys() >= RUN_FILES | {"curves.png"}
    assert files[LORA] == (out / LORA).read_bytes()
    assert_clean(files, tmp_path)
    card = hub.files("team/renamed")["README.md"].decode()
    assert "team/renamed" in card and "team/student" not in card


@pytest.mark.slow
def test_a_connection_dropped_in_the_middle_of_an_upload(hub, env, tmp_path):
    # Of each of two files the client drops six attempts, then raises something that is no error of HTTP.
    hub.fail("PUT", kind="drop", times=3 * 12 + 12)
    results = reported(run(FAILURES, env, tmp_path, "me/never:end", "me/student:end", patient=False))
    result = results["me/never"]
    assert result["raised"] == "PushError" and result["waits"] == [5, 20]
    assert "could not be reached (RemoteProtocolError)" in result["message"]
    assert "trl-diffusion-opd push" in result["message"] and not own_commits(hub, "me/never")
    assert "raised" not in results["me/student"] and results["me/student"]["waits"] == [5]
    assert all(fault.times == 0 for fault in hub.faults)
    ((_, files),) = own_commits(hub, "me/student")
    assert files[LORA] == (tmp_path / "me-student" / "out" / LORA).read_bytes()


CHECKS = """
import sys
from pathlib import Path
from huggingface_hub import constants
from tests.support.push_runs import report
from tests.support.runs import PROMPTS, make_config, make_trainer
from trl_diffusion_opd import DiffusionOPDTrainer
results = {}
def check(name, repo_id, **settings):
    try:
        # Were the destination not looked at first, the missing base would be what is complained of.
        args = make_config(Path(sys.argv[1]), push_to_hub=True, hub_model_id=repo_id, **settings)
        DiffusionOPDTrainer("no/such-base", {"count": "no/teacher", "scene": "no/teacher"}, args, PROMPTS)
    except Exception as error:
        results[name] = [type(error).__name__, str(error)]
check("unknown", "me/student", hub_token="hf_wrong")
check("reads", "me/student", hub_token="hf_reads")
check("stranger", "they/student")
check("forbidden", "they/open")
check("name", "me/a student!")
check("path", "me/too/deep")
check("passes", "me/student")
report(results)
"""
NO_TOKEN = """
from trl_diffusion_opd.hub.upload import check_push
check_push("me/student")
"""


def test_the_destination_is_checked_before_anything_is_loaded(hub, env, tmp_path):
    hub.put("they/open", {"README.md": b"# theirs"})
    results = reported(run(CHECKS, env, tmp_path))
    expected = {
        "unknown": r"Cannot push to 'me/student': the Hub does not know the token",
        "reads": "can only read. Create one that can write",
        "stranger": "'me' is not a member of 'they'. Choose a name under 'me/...' or 'team/...'",
        "forbidden": "Cannot push to 'they/open': the account may not write there (HTTP 403",
        "name": "Cannot push to 'me/a student!': the name must be `owner/name` or `name`.",
        "path": "Cannot push to 'me/too/deep': the name must be",
    }
    for name, message in expected.items():
        kind, text = results[name]
        assert kind == "PushError" and message in text, (name, text)
        assert "hf_" not in text or name == "unknown"
        assert "hf_wrong" not in text
    kind, text = results["passes"]
    assert kind == "SourceError" and "no/such-base" in text
    assert not any(request.method == "POST" for request in hub.requests)  # checking writes nothing

    for extra, message in [
        ({"HF_TOKEN": ""}, "there is no token. Log in with `hf auth login`"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 could not be reached"),
    ]:
        last_line = run(NO_TOKEN, {**env, **extra}).stderr.splitlines()[-1]
        assert last_line.startswith("trl_diffusion_opd.hub.upload.PushError: Cannot push to 'me/student':")
        assert message in last_line


DESTINATIONS = """
import sys
from pathlib import Path
from tests.support.push_runs import push_run, report
folder = sys.argv[1]
quick = {"num_grid_prompts": 0, "max_steps": 1, "save_strategy": "no"}
report([
    push_run(folder, output_dir=folder + "/named-like-this", hub_private_repo=True, hub_revision="try", **quick),
    push_run(folder, output_dir=folder + "/late", push_to_hub=False, **quick),
])
"""


def test_name_privacy_and_branch_of_the_repository(hub, env, tmp_path):
    first, second = reported(run(DESTINATIONS, env, tmp_path))
    assert first["repo"] == "me/named-like-this" and hub.repo("me/named-like-this").private
    assert LORA in hub.files("me/named-like-this", revision="try")
    assert LORA not in hub.files("me/named-like-this")
    card = hub.files("me/named-like-this", revision="try")["README.md"].decode()
    assert f'pipe.load_lora_weights(lora, revision="try", weight_name="{LORA}")' in card
    assert second["repo"] == "me/late" and not hub.repo("me/late").private  # `push_to_hub()` without the setting
    assert LORA in hub.files("me/late")


def test_prompts_that_look_like_paths_stay_as_they_are(tmp_path):
    record = example_record(gallery=[GalleryImage("/imagine a cat/dog", "images/a.png")])
    record.prompts[0].examples = ["~ dreamy ~"]
    record.save(tmp_path)
    assert read_run(tmp_path) == {"run.json": (tmp_path / "run.json").read_bytes()}


def test_paths_of_this_machine_are_left_out():
    content = {"output_dir": "/home/me/run", "nested": [{"cache_dir": "~/x/cache"}], "model": "owner/base", "n": 1}
    assert without_paths({**content, "run_name": "~nobody"}) == {
        "run_name": "~nobody",
        "output_dir": "run",
        "nested": [{"cache_dir": "cache"}],
        "model": "owner/base",
        "n": 1,
    }
