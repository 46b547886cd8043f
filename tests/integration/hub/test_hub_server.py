# SPDX-License-Identifier: Apache-2.0
"""The unmodified clients against the loopback Hub: what they push comes back, and what goes wrong looks as it does."""

import base64
import hashlib
import json
import math
import urllib.error
import urllib.request

import pytest

from tests.support.hub_server import HubServer, run


def outputs(done) -> dict:
    """Returns what a client printed as its last line."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# `attempt` notes what a call returned, or the name and the message of its error, and the waits it asked for.
ATTEMPTS = """
import hashlib, json, sys, time
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
api = HfApi()
seen = {}
def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
def attempt(name, function):
    time.waits.clear()
    try:
        seen[name] = function()
    except Exception as error:
        seen[name], seen[f"{name} message"] = type(error).__name__, str(error)
    seen[f"{name} waits"] = list(time.waits)
"""

MODEL = """
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, HfFileSystem
folder = Path(sys.argv[1])
seen["created"] = str(api.create_repo("me/x", private=True))
seen["again"] = str(api.create_repo("me/x", private=True, exist_ok=True))
attempt("conflict", lambda: api.create_repo("me/x"))
first = api.upload_folder(repo_id="me/x", folder_path=folder, commit_message="first").oid
seen["unchanged"] = api.upload_folder(repo_id="me/x", folder_path=folder, commit_message="nothing new").oid == first
api.create_branch("me/x", branch="dev")
api.create_tag("me/x", tag="v1")
attempt("same tag", lambda: api.create_tag("me/x", tag="v1"))
copy = CommitOperationCopy("sub/w.safetensors", "copy.safetensors")
add = CommitOperationAdd("notes.txt", b"notes")
second = api.create_commit("me/x", [copy, add], commit_message="second", parent_commit=first).oid
late = CommitOperationAdd("late.txt", b"late")
attempt("stale", lambda: api.create_commit("me/x", [late], commit_message="third", parent_commit=first))
api.delete_folder("sub", "me/x", commit_message="fourth")
api.delete_file("README.md", "me/x", revision="dev", commit_message="on dev")
seen["commits"] = [(commit.commit_id, commit.title) for commit in api.list_repo_commits("me/x")]
seen["files"] = {name: sorted(api.list_repo_files("me/x", revision=name)) for name in ("main", "dev", "v1", second)}
seen["refs"] = {ref.name: ref.target_commit for ref in api.list_repo_refs("me/x").branches}
snapshot = Path(snapshot_download("me/x", revision="v1"))
seen["snapshot"] = {p.relative_to(snapshot).as_posix(): sha256(p) for p in snapshot.rglob("*") if p.is_file()}
seen["downloaded"] = sha256(hf_hub_download("me/x", "copy.safetensors", revision=second[:10]))
seen["sha"] = api.model_info("me/x").sha
info = api.model_info("me/x", revision="v1", files_metadata=True)
seen["info"] = [info.sha, info.private, info.card_data.license, info.tags]
seen["sizes"] = {s.rfilename: [s.size, s.lfs and s.lfs.sha256] for s in info.siblings}
seen["tree"] = [item.path for item in api.list_repo_tree("me/x", "sub", revision="v1")]
attempt("no folder", lambda: list(api.list_repo_tree("me/x", "nowhere", revision="v1")))
seen["paths"] = [item.path for item in api.get_paths_info("me/x", ["sub", "notes.txt", "gone"])]
seen["range"] = HfFileSystem().read_bytes("me/x@v1/sub/w.safetensors", start=3, end=7).hex()
print(json.dumps(seen))
"""


def test_model_repository(hub, tmp_path):
    hub.add_user("me", token="hf_write")
    weights = bytes(range(256)) * 1000
    card = b"---\nlicense: mit\ntags: [lora]\n---\nA card\n"
    (tmp_path / "up" / "sub").mkdir(parents=True)
    (tmp_path / "up" / "README.md").write_bytes(card)
    (tmp_path / "up" / "sub" / "w.safetensors").write_bytes(weights)
    seen = outputs(
        run(ATTEMPTS + MODEL, hub.environment(tmp_path / "home", "hf_write"), tmp_path / "up", patient=False)
    )

    sha256 = hashlib.sha256(weights).hexdigest()
    assert seen["created"] == seen["again"] == f"{hub.endpoint}/me/x"
    assert seen["conflict"] == "HfHubHTTPError" and "409" in seen["conflict message"]
    assert seen["unchanged"] is True
    assert seen["same tag"] == "HfHubHTTPError"
    assert seen["stale"] == "HfHubHTTPError" and "412" in seen["stale message"]
    assert [title for _, title in seen["commits"]] == ["fourth", "second", "first", "initial commit"]
    assert hub.commits("me/x") == [tuple(commit) for commit in seen["commits"]]
    (fourth, _), (second, _), (first, _), _ = seen["commits"]
    start = [".gitattributes", "README.md", "sub/w.safetensors"]
    main = [".gitattributes", "README.md", "copy.safetensors", "notes.txt"]
    dev = [".gitattributes", "sub/w.safetensors"]
    assert seen["files"] == {"main": main, "dev": dev, "v1": start, second: [*main, "sub/w.safetensors"]}
    assert seen["refs"] == {"main": fourth, "dev": hub.commits("me/x", revision="dev")[0][0]}
    assert [title for _, title in hub.commits("me/x", revision="dev")] == ["on dev", "first", "initial commit"]
    attributes = hub.files("me/x")[".gitattributes"]
    assert seen["snapshot"] == {
        ".gitattributes": hashlib.sha256(attributes).hexdigest(),
        "README.md": hashlib.sha256(card).hexdigest(),
        "sub/w.safetensors": sha256,
    }
    assert seen["downloaded"] == sha256
    assert seen["sha"] == fourth
    assert seen["info"] == [first, True, "mit", ["lora"]]
    assert seen["sizes"]["README.md"] == [len(card), None]
    assert seen["sizes"]["sub/w.safetensors"] == [len(weights), sha256]
    assert seen["tree"] == ["sub/w.safetensors"]
    assert seen["no folder"] == "RemoteEntryNotFoundError"
    assert seen["paths"] == ["notes.txt"]
    assert seen["range"] == weights[3:7].hex()
    assert hub.files("me/x", revision="v1") == {
        ".gitattributes": attributes,
        "README.md": card,
        "sub/w.safetensors": weights,
    }
    uploads = [request for request in hub.requests if request.method == "PUT"]
    assert [(request.path, request.status, request.user) for request in uploads] == [(f"/lfs/{sha256}", 200, None)]


def test_folder_is_kept(hub):
    commit = hub.put("me/x", {"a.txt": b"first"}, gated=True)
    hub.put("me/x", {"b.safetensors": b"second"})
    hub.allow("me/x", "friend")
    again = HubServer(hub.folder)
    assert again.files("me/x", revision=commit) == {"a.txt": b"first"}
    assert again.files("me/x") == {"a.txt": b"first", "b.safetensors": b"second"}
    assert vars(again.repo("me/x")) == vars(hub.repo("me/x"))


SPACE = """
folder = Path(sys.argv[1])
attempt("no sdk", lambda: api.create_repo("me/demo", repo_type="space"))
seen["created"] = str(api.create_repo("me/demo", repo_type="space", space_sdk="gradio"))
api.upload_folder(repo_id="me/demo", repo_type="space", folder_path=folder)
info = api.space_info("me/demo")
seen["info"] = [info.id, info.sdk, info.card_data.title, sorted(s.rfilename for s in info.siblings)]
seen["app"] = Path(hf_hub_download("me/demo", "app.py", repo_type="space")).read_text()
(folder / "README.md").write_text("---\\nsdk: gradle\\n---\\n")
attempt("bad card", lambda: api.upload_folder(repo_id="me/demo", repo_type="space", folder_path=folder))
print(json.dumps(seen))
"""


def test_space(hub, tmp_path):
    hub.add_user("me", token="hf_write")
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "README.md").write_text("---\ntitle: Demo\nsdk: gradio\napp_file: app.py\n---\n")
    (tmp_path / "up" / "app.py").write_text("print('demo')")
    seen = outputs(
        run(ATTEMPTS + SPACE, hub.environment(tmp_path / "home", "hf_write"), tmp_path / "up", patient=False)
    )
    assert seen["no sdk"] == "ValueError"
    assert seen["created"] == f"{hub.endpoint}/spaces/me/demo"
    assert seen["info"] == ["me/demo", "gradio", "Demo", [".gitattributes", "README.md", "app.py"]]
    assert seen["app"] == "print('demo')"
    assert seen["bad card"] == "ValueError" and '"sdk" must be one of' in seen["bad card message"]
    assert len(hub.commits("me/demo", "space")) == 2
    with pytest.raises(KeyError):
        hub.repo("me/demo")


def test_commit_checks_the_card(hub):
    """Not only `/api/validate-yaml`, which the client asks before it commits."""
    hub.add_user("me", token="hf_write")
    commit = hub.put("me/x", {"README.md": b"before"})
    card = base64.b64encode(b"---\ntags: lora\n---\n").decode()
    lines = [
        {"key": "header", "value": {"summary": "bad card"}},
        {"key": "file", "value": {"path": "README.md", "content": card, "encoding": "base64"}},
    ]
    request = urllib.request.Request(
        f"{hub.endpoint}/api/models/me/x/commit/main",
        data="\n".join(map(json.dumps, lines)).encode(),
        headers={"Authorization": "Bearer hf_write"},
    )
    with pytest.raises(urllib.error.HTTPError, match="400") as error:
        urllib.request.urlopen(request)
    assert '"tags" must be an array' in error.value.headers["X-Error-Message"]
    assert hub.commits("me/x") == [(commit, "Put files")]


ACCESS = """
me, reader, friend, fine, stranger = "hf_write", "hf_read", "hf_friend", "hf_fine", "hf_stranger"
def get(repo, token, name="a.txt", **kwargs):
    return Path(hf_hub_download(repo, name, token=token, cache_dir=f"{sys.argv[1]}/{token}", **kwargs)).read_text()
def write(repo, token):
    return api.upload_file(path_or_fileobj=token.encode(), path_in_repo="new.txt", repo_id=repo, token=token).commit_message
for token in (me, reader, fine):
    user = api.whoami(token=token)
    seen[f"whoami {token}"] = [user["name"], user["auth"]["accessToken"]["role"], [o["name"] for o in user["orgs"]]]
attempt("whoami bad", lambda: api.whoami(token="hf_bad"))
attempt("info bad", lambda: api.model_info("org/open", token="hf_bad"))
attempt("get bad", lambda: get("org/open", "hf_bad"))
for repo in ("org/open", "org/private", "org/gated", "org/nowhere"):
    for token in (me, stranger, friend, False):
        attempt(f"get {repo} {token}", lambda: get(repo, token))
        attempt(f"check {repo} {token}", lambda: api.auth_check(repo, token=token))
        attempt(f"info {repo} {token}", lambda: api.model_info(repo, token=token).id)
        attempt(f"write {repo} {token}", lambda: api.auth_check(repo, token=token, write=True))
attempt("revision", lambda: get("org/open", False, revision="v9"))
attempt("entry", lambda: get("org/open", False, "b.txt"))
for token in (me, reader, stranger, fine):
    attempt(f"commit {token}", lambda: write("org/open", token))
    attempt(f"create {token}", lambda: str(api.create_repo(f"org/by-{token}", token=token)))
attempt("create nobody", lambda: str(api.create_repo("org/by-nobody", token=False)))
attempt("create exists", lambda: str(api.create_repo("org/open", token=stranger, exist_ok=True)))
print(json.dumps(seen))
"""


def test_access(hub, tmp_path):
    hub.add_user("me", token="hf_write", orgs=["org"])
    hub.add_user("me", token="hf_read", role="read", orgs=["org"])
    hub.add_user("me", token="hf_fine", role="fineGrained", orgs=["org"], scopes={"org": ["repo.write"]})
    hub.add_user("friend", token="hf_friend")
    hub.add_user("stranger", token="hf_stranger")
    hub.put("org/open", {"a.txt": b"open"})
    hub.put("org/private", {"a.txt": b"private"}, private=True)
    hub.put("org/gated", {"a.txt": b"gated"}, gated=True)
    hub.allow("org/private", "friend")
    hub.allow("org/gated", "friend")
    seen = outputs(run(ATTEMPTS + ACCESS, hub.environment(tmp_path / "home"), tmp_path / "caches", patient=False))

    assert seen["whoami hf_write"] == ["me", "write", ["org"]]
    assert seen["whoami hf_read"] == ["me", "read", ["org"]]
    assert seen["whoami hf_fine"] == ["me", "fineGrained", ["org"]]
    assert seen["whoami bad"] == seen["info bad"] == seen["get bad"] == "HfHubHTTPError"
    assert "Invalid credentials in Authorization header" in seen["info bad message"]

    missing, gated, forbidden = "RepositoryNotFoundError", "GatedRepoError", "HfHubHTTPError"
    for token, allowed in {"hf_write": True, "hf_friend": True, "hf_stranger": False, "False": False}.items():
        writes = {"hf_write": None, "False": missing}.get(token, forbidden)
        expected = {
            "org/open": ["open", None, "org/open", writes],
            "org/private": ["private", None, "org/private", writes] if allowed else [missing] * 4,
            "org/gated": ["gated", None, "org/gated", writes] if allowed else [gated, gated, "org/gated", gated],
            "org/nowhere": [missing] * 4,
        }
        for repo, values in expected.items():
            assert [seen[f"{what} {repo} {token}"] for what in ("get", "check", "info", "write")] == values, token
    assert "huggingface.co/org/gated" in seen["get org/gated hf_stranger message"]
    assert seen["revision"] == "RevisionNotFoundError"
    assert seen["entry"] == "RemoteEntryNotFoundError"

    for token in ("hf_write", "hf_fine"):
        assert seen[f"commit {token}"] == "Upload new.txt with huggingface_hub"
        assert seen[f"create {token}"] == f"{hub.endpoint}/org/by-{token}"
    for token in ("hf_read", "hf_stranger"):
        assert seen[f"commit {token}"] == seen[f"create {token}"] == forbidden
        assert 'rights to create a model under the namespace "org"' in seen[f"create {token} message"]
    assert seen["create nobody"] == forbidden and "401" in seen["create nobody message"]
    assert seen["create exists"] == f"{hub.endpoint}/org/open"
    assert [
        user for method, path, status, user in hub.requests if path.endswith("/commit/main") and status == 200
    ] == [
        "me",
        "me",
    ]


FAULTS = """
def get(name):
    return sha256(hf_hub_download(f"me/{name}", "w.safetensors"))
def upload(name):
    data = f"{name} data".encode() * 1000
    return api.upload_file(path_or_fileobj=data, path_in_repo="new.safetensors", repo_id=f"me/{name}").oid
faults = json.loads(sys.argv[1])
for name in faults["get"]:
    attempt(name, lambda: get(name))
for name in faults["info"]:
    attempt(name, lambda: api.model_info(f"me/{name}").sha)
for name in faults["upload"]:
    attempt(name, lambda: upload(name))
attempt("create", lambda: str(api.create_repo("me/new")))
print(json.dumps(seen))
"""


def new_oid(name):
    return hashlib.sha256(f"{name} data".encode() * 1000).hexdigest()


def test_faults(hub, tmp_path):
    """Which faults the client overcomes by itself, and after which waits, and which error it raises for others."""
    hub.add_user("me", token="hf_write")
    busy = {"status": 429, "headers": {"Retry-After": "3"}, "message": "Too many requests"}
    # name: (method, path, fault, what the client gives, its waits in seconds)
    get = {
        "get-429": ("GET", "resolve", {**busy, "times": 2}, None, [4, 4]),
        "get-500": ("GET", "resolve", {"status": 500}, "HfHubHTTPError", []),
        "get-404": (
            "GET",
            "resolve",
            {"status": 404, "headers": {"X-Error-Code": "EntryNotFound"}},
            "RemoteEntry",
            [],
        ),
        "get-gated": (
            "GET",
            "resolve",
            {"status": 403, "headers": {"X-Error-Code": "GatedRepo"}},
            "GatedRepoError",
            [],
        ),
        "get-dropped": ("GET", "resolve", {"kind": "drop", "times": 2}, None, [1, 1]),
        "get-always-dropped": ("GET", "resolve", {"kind": "drop", "times": math.inf}, "RemoteProtocolError", [1] * 5),
        "get-slow": ("GET", "resolve", {"kind": "slow", "delay": 1.3}, None, [1]),
        "get-corrupt": ("GET", "resolve", {"kind": "corrupt"}, "corrupt", []),
        # The first request for a file is tried once, and then again and again where the file is not in the cache.
        "head-429": ("HEAD", "resolve", {**busy, "times": 2}, None, [4]),
        "head-500": ("HEAD", "resolve", {"status": 500, "times": 2}, None, [1]),
        "head-down": (
            "HEAD",
            "resolve",
            {"status": 500, "times": math.inf},
            "LocalEntryNotFoundError",
            [1, 2, 4, 8, 8],
        ),
        "head-401": ("HEAD", "resolve", {"status": 401, "message": "Invalid credentials"}, "HfHubHTTPError", []),
        "head-dropped": ("HEAD", "resolve", {"kind": "drop"}, "RemoteProtocolError", []),
    }
    info = {
        "info-429": ("GET", "api", busy, "HfHubHTTPError", []),
        "info-500": ("GET", "api", {"status": 500}, "HfHubHTTPError", []),
        "info-dropped": ("GET", "api", {"kind": "drop"}, "RemoteProtocolError", []),
    }
    upload = {
        "pre-429": ("POST", "preupload", busy, None, [4]),
        "pre-500": ("POST", "preupload", {"status": 500}, None, [1]),
        "pre-403": ("POST", "preupload", {"status": 403}, "HfHubHTTPError", []),
        "put-500": ("PUT", None, {"status": 500}, None, [1]),
        "put-dropped": ("PUT", None, {"kind": "drop", "times": 2}, None, [1, 2]),
        "verify-500": ("POST", "verify", {"status": 500}, None, [1]),
        "commit-429": ("POST", "commit/", busy, "HfHubHTTPError", []),
        "commit-500": ("POST", "commit/", {"status": 500}, "HfHubHTTPError", []),
        "commit-409": ("POST", "commit/", {"status": 409}, "HfHubHTTPError", []),
        "commit-dropped": ("POST", "commit/", {"kind": "drop"}, "RemoteProtocolError", []),
        "commit-lost": ("POST", "commit/", {"kind": "lost"}, "RemoteProtocolError", []),
    }
    weights = {}
    for name, (method, path, fault, _, _) in {**get, **info, **upload}.items():
        weights[name] = name.encode() * 1000
        hub.put(f"me/{name}", {"w.safetensors": weights[name]})
        where = (
            f"me/{name}[/.].*{path}" if name in get or path in ("preupload", "verify", "commit/") else f"me/{name}$"
        )
        hub.fail(method, new_oid(name) if method == "PUT" else where, **fault)
    hub.fail(
        "POST", "repos/create", status=409, message="Cannot create repo: another conflicting operation is in progress"
    )
    env = hub.environment(tmp_path / "home", "hf_write") | {"HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    names = json.dumps({"get": list(get), "info": list(info), "upload": list(upload)})
    seen = outputs(run(ATTEMPTS + FAULTS, env, names, patient=False))

    for name, (_, _, _, expected, waits) in {**get, **info, **upload}.items():
        sha256 = hashlib.sha256(weights[name]).hexdigest()
        if expected is None:
            assert seen[name] == (sha256 if name in get else hub.commits(f"me/{name}")[0][0]), name
        elif expected == "corrupt":
            # The client compares the size only.
            assert seen[name] == hashlib.sha256(bytes(255 - byte for byte in weights[name])).hexdigest()
        else:
            assert seen[name].startswith(expected), (name, seen[f"{name} message"])
        assert seen[f"{name} waits"] == waits, name
    assert seen["create"] == f"{hub.endpoint}/me/new"

    for name, (_, _, _, expected, _) in upload.items():
        pushed = expected is None or name == "commit-lost"
        assert hub.files(f"me/{name}").get("new.safetensors") == (f"{name} data".encode() * 1000 if pushed else None)
    dropped = [request.path for request in hub.requests if request.status == 0]
    assert len(dropped) == 2 + 6 + 1 + 1 + 2 + 1 + 1
    assert "Invalid credentials" in seen["head-401 message"]


def test_resume(hub, tmp_path):
    """A download that breaks off is resumed from the last 10 MB that are complete."""
    hub.put("me/big", {"w.bin": bytes(24 * 2**20)})
    hub.fail("GET", "resolve", kind="drop")
    code = ATTEMPTS + "print(json.dumps(sha256(hf_hub_download('me/big', 'w.bin'))))"
    assert (
        outputs(run(code, hub.environment(tmp_path), patient=False)) == hashlib.sha256(bytes(24 * 2**20)).hexdigest()
    )
    downloads = [request.status for request in hub.requests if request.method == "GET"]
    assert downloads == [0, 206]


LIBRARIES = """
import json, sys
from pathlib import Path
import torch
from datasets import Dataset, load_dataset
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import HfApi
from transformers import CLIPTextModelWithProjection
from tests.support.tiny import random_lora, save_diffusers_lora, tiny_pipeline

folder, seen = Path(sys.argv[1]), {}

first = Dataset.from_dict({"prompt": ["a cat", "a dog"]}).push_to_hub("me/prompts").oid
Dataset.from_dict({"prompt": ["a bird"]}).push_to_hub("me/prompts")
seen["newest"] = load_dataset("me/prompts", split="train")["prompt"][:]
seen["first"] = load_dataset("me/prompts", split="train", revision=first)["prompt"][:]
seen["streamed"] = [row["prompt"] for row in load_dataset("me/prompts", split="train", streaming=True, revision=first)]

pipe = tiny_pipeline()
pipe.push_to_hub("me/base")
again = StableDiffusion3Pipeline.from_pretrained("me/base")
for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
    pushed, loaded = getattr(pipe, name).state_dict(), getattr(again, name).state_dict()
    assert pushed.keys() == loaded.keys() and len(pushed) > 0
    seen[name] = all(torch.equal(loaded[key], tensor) for key, tensor in pushed.items())
clip = CLIPTextModelWithProjection.from_pretrained("me/base", subfolder="text_encoder")
seen["transformers"] = all(torch.equal(a, b) for a, b in zip(clip.parameters(), pipe.text_encoder.parameters(), strict=True))

config, lora = random_lora(pipe.transformer)
save_diffusers_lora(folder, config, lora)
HfApi().create_repo("me/lora")
HfApi().upload_folder(repo_id="me/lora", folder_path=folder)
HfApi().upload_folder(repo_id="me/lora", folder_path=folder, path_in_repo="ocr")
again.load_lora_weights("me/lora", adapter_name="root")
# Without `weight_name`, diffusers 0.42 would look for `ocr/ocr/pytorch_lora_weights.safetensors`.
again.load_lora_weights(
    "me/lora", subfolder="ocr", weight_name="pytorch_lora_weights.safetensors", adapter_name="folder"
)
loaded = dict(again.transformer.named_parameters())
for adapter in ("root", "folder"):
    seen[adapter] = all(
        torch.equal(tensor, loaded[name.replace(".weight", f".{adapter}.weight")]) for name, tensor in lora.items()
    )
print(json.dumps(seen))
"""


def test_libraries(hub, tmp_path):
    """`datasets`, `diffusers` and `transformers` read back what they pushed."""
    hub.add_user("me", token="hf_write")
    seen = outputs(run(LIBRARIES, hub.environment(tmp_path / "home", "hf_write"), tmp_path / "lora"))
    assert seen.pop("newest") == ["a bird"]
    assert seen.pop("first") == seen.pop("streamed") == ["a cat", "a dog"]
    names = (
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "transformers",
        "root",
        "folder",
    )
    assert seen == dict.fromkeys(names, True)
    assert set(hub.files("me/lora")) == {
        ".gitattributes",
        "pytorch_lora_weights.safetensors",
        "ocr/pytorch_lora_weights.safetensors",
    }
