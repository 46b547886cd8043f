# SPDX-License-Identifier: Apache-2.0
"""Teachers on another base by its Hub id, with the unmodified clients: what is fetched, and what goes wrong with it."""

import json
import math
import re

import pytest

from tests.integration.hub.test_pull import fetched, files_of
from tests.support.hub_server import run
from tests.support.large import large_pipeline, large_transformer, save_large
from tests.support.push_runs import reported
from tests.support.tiny import tiny_pipeline
from trl_diffusion_opd.lora.fingerprints import weights_sha256


DISTIL = "import sys; from tests.support.large_runs import distil; distil(*sys.argv[1:])"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base, a larger one whose weights are in several files, and LoRAs on it."""
    folder = save_large(tmp_path_factory.mktemp("saved"))
    tiny_pipeline().save_pretrained(folder / "base")
    (folder / "large" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    large_pipeline().transformer.save_pretrained(folder / "large" / "transformer", max_shard_size="40KB")
    assert len(list((folder / "large" / "transformer").glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def commits(hub, saved):
    large = files_of(saved / "large")
    first = hub.put("me/large", {**large, "transformer/diffusion_pytorch_model.fp16.safetensors": b"not needed"})
    hub.repo("me/large").refs["tags/v1"] = first
    hub.put("me/large", {"NEWS.md": b"pushed later"})
    return {
        "me/large": first,
        "me/base": hub.put("me/base", files_of(saved / "base")),
        "me/loras": hub.put(
            "me/loras", {f"large_count/{name}": data for name, data in files_of(saved / "large_count").items()}
        ),
    }


# How the server misbehaves with a base, and what the message says.
FAULTS = {
    "corrupt": (
        {"method": "GET", "kind": "corrupt"},
        r"'diffusion.*-00002-of-.*' of me/corrupt/.* arrived damaged twice",
    ),
    "refused": ({"method": "GET", "status": 403}, r"me/refused/transformer@.* refused access \(HTTP 403\)\. Log in"),
    "pickled": (None, "there is no file 'diffusion_pytorch_model.safetensors' in .*, and only safetensors is loaded"),
    "outside": (None, r"must not have `\.` or `\.\.` among its parts, but is '\.\./\.\./x\.safetensors'"),
}


def put_faulty(hub, saved) -> dict[str, str]:
    """Bases that cannot be had, and what is said of each."""
    large = files_of(saved / "large")
    index = "transformer/diffusion_pytorch_model.safetensors.index.json"
    for name, (fault, _) in FAULTS.items():
        files = dict(large)
        if name == "pickled":
            files = {path: data for path, data in large.items() if "safetensors" not in path}
            files["transformer/diffusion_pytorch_model.bin"] = b"x"
        if name == "outside":
            files[index] = json.dumps({"weight_map": {"a": "../../x.safetensors"}}).encode()
        hub.put(f"me/{name}", files)
        if fault is not None:
            hub.fail(path=rf"me/{name}/.*-00002-of-\d+\.safetensors$", times=math.inf, **fault)
    return {f"me/{name}": rf"\w+Error .*{message}" for name, (_, message) in FAULTS.items()}


def test_a_larger_base_from_the_hub(hub, tmp_path, saved, commits):
    faulty = put_faulty(hub, saved)
    damaged = r"me/large/.*-00002-of-\d+\.safetensors$"
    hub.fail(method="GET", path=damaged, kind="corrupt")  # and is right when it is fetched again
    env = hub.environment(tmp_path / "home")
    results = reported(run(DISTIL, env, tmp_path, *faulty, timeout=240))

    def origin(name):
        repo = "/".join(name.partition("@")[0].split("/")[:2])
        return {"name": name, "repo_id": repo, "commit": commits[repo], "repo_type": "model"}

    assert results["origins"] == {
        "lora": origin("me/loras/large_count"),
        "folder": origin("me/large/transformer@v1"),
        "path": origin("me/large/transformer@v1"),
        "pipeline": origin("me/large@v1"),
        "own": origin("me/base"),
    }
    assert results["bases"] == {**dict.fromkeys(results["origins"]), "lora": origin("me/large@v1")}
    assert results["backbones"] == 1, "loaded once, and the student's own not at all"
    fingerprint = weights_sha256(large_transformer().state_dict())
    assert {results["fingerprints"][task] for task in ("folder", "path", "pipeline")} == {fingerprint}
    weights = {f"transformer/{path.name}" for path in (saved / "large" / "transformer").iterdir()}
    assert fetched(hub, "me/large") == {"model_index.json", "vae/config.json", *weights}
    paths = [r.path for r in hub.requests if r.method == "GET" and "/me/large/resolve" in r.path]
    assert {path.split("/")[4] for path in paths if path.endswith(".safetensors")} == {commits["me/large"]}
    assert sum(bool(re.search(damaged, path)) for path in paths) == 2

    said = results.pop("others")
    for base, message in faulty.items():
        assert re.match(message, said[base]) and "\n" not in said[base], said[base]

    # Once fetched, it is found without the Hub
    hub.requests.clear()
    again = reported(run(DISTIL, {**env, "HF_HUB_OFFLINE": "1"}, tmp_path, timeout=240))
    assert again == {**results, "others": {}}
    assert hub.requests == []
