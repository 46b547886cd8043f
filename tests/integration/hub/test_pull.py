# SPDX-License-Identifier: Apache-2.0
"""Bases, teachers and prompts by their Hub ids, with the unmodified clients; and all that can go wrong with them."""

import hashlib
import io
import json
import math
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.hub_server import run
from tests.support.push_runs import reported
from tests.support.tiny import random_lora, save_diffusers_lora, save_peft_lora, tiny_pipeline


CARD = b"""---
license: mit
configs:
- config_name: counts
  data_files:
  - {split: train, path: counts/train-*}
  - {split: test, path: counts/test-*}
  - {split: spare, path: counts/spare-*}
- config_name: other
  data_files: other/*.parquet
---
"""
COUNTS = ["a red circle", "two blue squares", "three green circles", "one red square", "two yellow circles"]
ROWS = [{"prompt": f"a boat at {number}", "number": number} for number in range(12)]
ATTEMPTS = "import sys; from tests.support.pull_runs import attempts, report; report(attempts(sys.argv[1:]))"


def parquet(rows):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


SPLITS = {
    "counts/train-0.parquet": parquet([{"caption": text} for text in COUNTS]),
    "counts/test-0.parquet": parquet([{"caption": text} for text in COUNTS[:2]]),
}
UNUSED = {
    "counts/spare-0.parquet": parquet([{"caption": text} for text in COUNTS[2:]]),
    "other/a.parquet": parquet([{"caption": "x"}]),
}


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fetched(hub, repo):
    """The files of a repository that were downloaded, whole or in part."""
    found = [re.search(rf"/{repo}/resolve/[^/]+/(.+)", r.path) for r in hub.requests if r.method == "GET"]
    return {match[1] for match in found if match}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The files of a pipeline."""
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline().save_pretrained(folder)
    return files_of(folder)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """The files of two teachers, in the formats of diffusers and PEFT."""
    folder = tmp_path_factory.mktemp("teachers")
    save_diffusers_lora(folder / "count", *random_lora(seed=1))
    save_peft_lora(folder / "deep" / "scene", *random_lora(rank=2, alpha=3, seed=2))
    return files_of(folder)


def clutter(base):
    """What the repository of a real pipeline has as well: other precisions and formats, and checkpoints in one file."""
    other = {"sd3.5_medium.safetensors": b"large", "text_encoders/t5xxl.safetensors": b"large", "demo.jpg": b"\xff"}
    for name in base:
        if name.endswith(".safetensors"):
            other[name.replace(".safetensors", ".fp16.safetensors")] = b"large"
            other[name.replace(".safetensors", ".bin").replace("/model.", "/pytorch_model.")] = b"pickle"
    return other


def test_a_run_from_hub_ids_alone(hub, tmp_path, base, teachers):
    commits = {
        "base": hub.put("me/base", {**base, **clutter(base), "README.md": b"---\nlicense: mit\n---\n"}),
        "scene": hub.put("me/teachers", {**teachers, "count/optimizer.safetensors": b"not needed"}),
    }
    hub.repo("me/base").refs["tags/v1"] = commits["base"]
    hub.repo("me/teachers").refs["tags/v1"] = commits["scene"]
    hub.put("me/base", {"NEWS.md": b"pushed later"})
    commits["count"] = hub.put("me/teachers", {"NEWS.md": b"pushed later"})
    commits["prompts"] = hub.put("me/prompts", {"README.md": CARD, **SPLITS, **UNUSED}, repo_type="dataset")
    shards = {"train-0.jsonl": jsonl(ROWS[:8]), "train-1.jsonl": jsonl(ROWS[8:]), "images.zip": b"large"}
    commits["stream"] = hub.put("me/stream", shards, repo_type="dataset")

    env = hub.environment(tmp_path / "home")
    done = run("import sys; from tests.support.pull_runs import train; train(sys.argv[1])", env, tmp_path, timeout=300)
    results = reported(done)

    def origin(name, repo_id, commit, repo_type="model"):
        return {"name": name, "repo_id": repo_id, "commit": commits[commit], "repo_type": repo_type}

    prompts = {
        "count": origin("me/prompts", "me/prompts", "prompts", "dataset"),
        "scene": origin("me/stream", "me/stream", "stream", "dataset"),
    }
    expected = {
        "base": origin("me/base@v1", "me/base", "base"),
        "teachers": {
            "count": origin("me/teachers/count", "me/teachers", "count"),
            "scene": origin("me/teachers/deep/scene@v1", "me/teachers", "scene"),
        },
        "prompts": prompts,
        "eval_prompts": prompts,
    }
    assert results["origins"] == expected
    assert results["of_cached_dataset"] == prompts["count"]

    # Only what is needed is fetched, and all of it at the recorded commit.
    of_base = fetched(hub, "me/base") - {"README.md"}
    assert of_base <= set(base) and {base[name] for name in of_base} == set(base.values()), "equal files come once"
    assert fetched(hub, "me/teachers") == {
        "count/pytorch_lora_weights.safetensors",
        "deep/scene/adapter_config.json",
        "deep/scene/adapter_model.safetensors",
    }
    assert fetched(hub, "datasets/me/prompts") == {"README.md", *SPLITS}
    assert fetched(hub, "datasets/me/stream") == {"train-0.jsonl"}, "of a stream, only as much as is used"
    weights = {r.path for r in hub.requests if r.method == "GET" and "/me/base/resolve" in r.path}
    assert {path.split("/")[4] for path in weights if path.endswith(".safetensors")} == {commits["base"]}

    # The rounds walk through the stream as it comes, and through the set in another order.
    assert results["rows"]["scene"] == ROWS[:8]
    drawn = [row["prompt"] for row in results["rows"]["count"]]
    assert sorted(drawn[:5]) == sorted(COUNTS) and drawn[:5] != COUNTS
    assert results["num_prompts"] == {"count": 5, "scene": None}
    evaluations = [entry for entry in results["log"] if "eval_kl/scene" in entry]
    assert len(evaluations) == 2 and all("eval_kl/count" in entry for entry in evaluations)
    assert len(results["same"]) == 8 and all(results["same"].values()), "resuming with a stream changes no bit"
    checkpoint = tmp_path / "first" / "out" / "checkpoint-4"
    for text in ((checkpoint / "run.json").read_text(), (checkpoint.parent / "README.md").read_text()):
        assert not set(commits.values()) - set(re.findall("[0-9a-f]{40}", text))

    # Once fetched, it is found without the Hub, but for what was streamed.
    hub.requests.clear()
    absent = ["teacher|me/teachers/elsewhere", "base|me/other", "prompts|me/other", "stream|me/stream"]
    done = run(
        "import sys; from tests.support.pull_runs import rebuild; rebuild(sys.argv[1])",
        {**env, "HF_HUB_OFFLINE": "1"},
        tmp_path,
        *absent,
        patient=False,
    )
    results = reported(done)
    assert hub.requests == []
    prompts["scene"] = prompts["count"]
    assert results["origins"] == expected
    for result in results["absent"]:
        name = result["item"].partition("|")[2]
        assert f"{name} is not in the local cache and HF_HUB_OFFLINE is set. Unset it" in result["outcome"]


# What goes wrong, by how the server is told to misbehave, and what the message says. `{page}` is the repository's.
FAULTS = {
    "token": (
        {"status": 401, "message": "Invalid credentials in Authorization header"},
        r"HTTP 401.*does not know the token.*hf auth login.*HF_TOKEN",
    ),
    "forbidden": ({"status": 403}, r"HTTP 403.*hf auth login.*{page}"),
    "conflict": ({"status": 409}, r"the Hub answered with HTTP 409\. Try again later"),
    "limited": (
        {"status": 429, "headers": {"Retry-After": "7"}},
        r"HTTP 429, too many requests\. Try again in 7 seconds; .*hf auth login",
    ),
    "broken": ({"status": 500}, r"the Hub answered with HTTP 500\. Try again later"),
    "dropped": ({"kind": "drop"}, r"the connection to http://127.0.0.1:\d+ broke off\. Check the connection"),
    "slow": ({"kind": "slow", "delay": 0.15}, r"did not answer in time\..*HF_HUB_DOWNLOAD_TIMEOUT"),
}
OWNERS = {"teacher": r"teacher 'ocr' \(me/[^ ]*\): ", "base": "model: ", "prompts": r"`train_dataset\['ocr'\]`: "}
OWNERS["stream"] = OWNERS["prompts"]
NO_FILES = {
    "teacher": "no file 'pytorch_lora_weights.safetensors' in me/empty-teacher. Folders",
    "base": "no file 'model_index.json' in me/empty-base. Check the spelling",
    "prompts": "me/empty-prompts.*(No .supported. data files|doesn't contain any data files)",
    "stream": "me/empty-stream.*(No .supported. data files|doesn't contain any data files)",
}
WEIGHTS = {
    "teacher": "pytorch_lora_weights.safetensors",
    "base": "transformer/diffusion_pytorch_model.safetensors",
    "prompts": "train.parquet",
}


def put(hub, kind, name, base, teachers, **settings):
    """Puts a repository of a kind; returns its id and the page that messages name."""
    if kind in ("prompts", "stream"):
        hub.put(f"me/{name}", {"train.parquet": parquet(ROWS)}, repo_type="dataset", **settings)
        return f"me/{name}", f"https://huggingface.co/datasets/me/{name}"
    files = base if kind == "base" else {WEIGHTS["teacher"]: teachers["count/pytorch_lora_weights.safetensors"]}
    hub.put(f"me/{name}", files, **settings)
    return f"me/{name}", f"https://huggingface.co/me/{name}"


def test_every_failure_names_the_repository_and_the_remedy(hub, tmp_path, base, teachers):
    hub.add_user("stranger", token="hf_stranger")
    expected = {}
    for kind, owner in OWNERS.items():
        for fault, (settings, message) in FAULTS.items():
            for part in ("", "-weights")[
                : 1 + (kind in WEIGHTS)
            ]:  # all of the repository fails, or its large files do
                repo, page = put(hub, kind, f"{fault}-{kind}{part}", base, teachers)
                path = rf"{repo}/resolve/.*{re.escape(WEIGHTS[kind])}$" if part else rf"{repo}(/|$)"
                hub.fail(method="GET" if part else None, path=path, times=math.inf, **settings)
                expected[f"{kind}|{repo}"] = rf"SourceError {owner}.*{repo} .*{message.replace('{page}', page)}"
        repo, page = put(hub, kind, f"gated-{kind}", base, teachers, gated=True)
        expected[f"{kind}|{repo}"] = rf"SourceError {owner}.*'{repo}' is gated\. Accept.* {page} .*auth login"
        repo, _ = put(hub, kind, f"hidden-{kind}", base, teachers, private=True)
        for absent in (repo, f"me/misspelt-{kind}"):
            expected[f"{kind}|{absent}"] = rf"SourceError {owner}.*'{absent}' was not found.*spelling.*auth login"
        repo, page = put(hub, kind, f"here-{kind}", base, teachers)
        expected[f"{kind}|{repo}@v9"] = rf"SourceError {owner}.*'{repo}' has no revision 'v9'.*{page}/commits"
        hub.put(f"me/empty-{kind}", {"a.xyz": b"x"}, repo_type="model" if kind in ("teacher", "base") else "dataset")
        expected[f"{kind}|me/empty-{kind}"] = rf"(Source|Absent)Error {owner}.*{NO_FILES[kind]}"
    for kind, name in WEIGHTS.items():
        repo, _ = put(hub, kind, f"corrupt-{kind}", base, teachers)
        hub.fail(method="GET", path=rf"{repo}/.*{re.escape(name)}$", times=math.inf, kind="corrupt")
        expected[f"{kind}|{repo}"] = (
            rf"SourceError {OWNERS[kind]}'{name.split('/')[-1]}' of {repo} arrived damaged twice"
        )
    # A teacher that cannot be had is found out before the weights of the base are fetched.
    commit = hub.put("me/base", base)
    hub.repo("me/base").refs["tags/v1"] = commit
    hub.put("me/prompts", {"README.md": CARD, **SPLITS, **UNUSED}, repo_type="dataset")
    hub.put("me/stream", {"train-0.jsonl": jsonl(ROWS)}, repo_type="dataset")
    expected["trainer|me/gated-teacher"] = r"SourceError teacher 'count' \(me/gated-teacher\): .*is gated"

    done = run(
        "from huggingface_hub import constants\n"
        "constants.HF_HUB_DOWNLOAD_TIMEOUT = constants.HF_HUB_ETAG_TIMEOUT = 0.05\n" + ATTEMPTS,
        hub.environment(tmp_path / "home", token="hf_stranger"),
        *expected,
        patient=False,
        timeout=300,
    )
    results = reported(done)
    assert "hf_stranger" not in done.stdout + done.stderr
    assert {result["item"] for result in results} == set(expected)
    for result in results:
        assert re.match(expected[result["item"]], result["outcome"]), result
    assert fetched(hub, "me/base") == {"model_index.json", "transformer/config.json"}
    kept = [path.parent for path in (tmp_path / "home").rglob("blobs/*") if path.stat().st_size > 3000]
    assert not [folder for folder in kept if "corrupt-teacher" in str(folder)], "what arrived damaged is thrown away"


# Failures that pass: what the server does wrong once, where, and how long we wait for it.
PASSING = {
    "500": ({"status": 500}, 1),
    "502": ({"status": 502, "times": 2}, 3),
    "429": ({"status": 429, "headers": {"Retry-After": "7"}}, 7),
    "drop": ({"kind": "drop"}, 1),
    "corrupt": ({"kind": "corrupt"}, 0),
}


def test_what_may_pass_is_tried_again(hub, tmp_path, base, teachers):
    expected = {}
    for kind in WEIGHTS:
        for name, (settings, waited) in PASSING.items():
            repo, _ = put(hub, kind, f"weights-{name}-{kind}", base, teachers)
            hub.fail(method="GET", path=rf"{repo}/resolve/.*{re.escape(WEIGHTS[kind])}$", **settings)
            expected[f"{kind}|{repo}"] = waited
    for kind in ("base", "prompts", "stream"):
        for name in ("500", "429", "drop"):
            settings, waited = PASSING[name]
            repo, _ = put(hub, kind, f"api-{name}-{kind}", base, teachers)
            hub.fail(method="GET", path=rf"^/api/.*{repo}/", **settings)
            expected[f"{kind}|{repo}"] = waited
    shards = {"train-0.jsonl": jsonl(ROWS[:8]), "train-1.jsonl": jsonl(ROWS[8:])}
    for name in ("500", "drop"):
        hub.put(f"me/shards-{name}", shards, repo_type="dataset")
        hub.fail(method="GET", path=rf"me/shards-{name}/resolve/.*train-1", **PASSING[name][0])
        expected[f"stream|me/shards-{name}"] = 1
    hub.put("me/shards-gone", shards, repo_type="dataset")
    hub.fail(method="GET", path="me/shards-gone/resolve/.*train-1", status=500, times=math.inf)
    results = reported(
        run(ATTEMPTS, hub.environment(tmp_path / "home"), *expected, "stream|me/shards-gone", patient=False)
    )

    gone = results.pop()["outcome"]
    assert re.match(
        r"SourceError `train_dataset\['ocr'\]` \(me/shards-gone\): row 8 of the stream could not be read, also after some "
        r"attempts: the Hub answered with HTTP 500\. .*checkpoint is intact: resume",
        gone,
    ), gone
    sha256 = hashlib.sha256(teachers["count/pytorch_lora_weights.safetensors"]).hexdigest()
    outcomes = {
        "teacher": f"OK {sha256}",
        "base": "OK StableDiffusion3Pipeline",
        "prompts": f"OK {json.dumps(ROWS[:10])}",
        "stream": f"OK {json.dumps(ROWS[:10])}",
    }
    assert len(results) == len(expected)
    for result in results:
        assert result["outcome"] == outcomes[result["item"].partition("|")[0]], result
        waits = [wait for wait in result["waits"] if wait >= 1]  # shorter ones are threads looking at each other
        assert expected[result["item"]] <= sum(waits) <= expected[result["item"]] + 1, result


def test_a_hub_that_cannot_be_reached(hub, tmp_path):
    env = {**hub.environment(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    items = [f"{kind}|me/{kind}" for kind in OWNERS]
    for result in reported(run(ATTEMPTS, env, *items, patient=False)):
        kind, _, repo = result["item"].partition("|")
        message = (
            rf"SourceError {OWNERS[kind]}{repo} is not in the local cache and http://127.0.0.1:9 could not be reached"
        )
        assert re.match(message, result["outcome"]), result
        assert sum(result["waits"]) < 40, result
