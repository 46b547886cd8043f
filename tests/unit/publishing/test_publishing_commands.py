# SPDX-License-Identifier: Apache-2.0
"""What `push`, `card` and `space` do with a folder that is not as it should be."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.cards import example_record
from tests.support.hub_server import run
from tests.support.push_runs import reported
from tests.support.tiny import random_lora, save_diffusers_lora, tiny_pipeline
from trl_diffusion_opd.cli import main
from trl_diffusion_opd.hub.locations import Origin
from trl_diffusion_opd.publishing.record import RunRecord
from trl_diffusion_opd.publishing.space import write_space


LORA = "pytorch_lora_weights.safetensors"
PUSH = """
import json, sys
from tests.support.push_runs import report
from trl_diffusion_opd.publishing.push import push_folder

def push(folder, **arguments):
    try:
        return push_folder(folder, **arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

report([push(*spec[:1], **spec[1]) for spec in json.loads(sys.argv[1])])
"""


def make_run(folder, **changes):
    """The folder of a run whose record is [`example_record`]."""
    save_diffusers_lora(folder, *random_lora(seed=1))
    example_record(gallery=[], grid=None, curves=None, **changes).save(folder)
    return folder


def make_empty(folder, **changes):
    """The same with a LoRA that changes nothing."""
    file = make_run(folder, **changes) / LORA
    tensors = load_file(file)
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    save_file({n: torch.zeros_like(t) if "lora_B" in n else t for n, t in tensors.items()}, file, metadata=header)
    return folder


def test_pushes_say_what_is_wrong(hub, tmp_path):
    hub.add_user("me", token="hf_write")
    damaged = make_run(tmp_path / "damaged", repo_id="me/damaged")
    (damaged / "training_args.json").write_text('{"seed": 1, "lear')
    local = make_run(tmp_path / "local", repo_id="me/local", base=Origin("run/base"))
    empty = make_empty(tmp_path / "empty", repo_id="me/empty")
    (empty / "README.md").write_text("# as it was rendered\n")
    large = make_run(tmp_path / "large", repo_id="me/large")
    hub.fail("POST", "me/large/commit/", status=413, times=math.inf, message="Payload Too Large")
    calls = [[str(folder), {}] for folder in (damaged, empty, large)]
    calls += [[str(local), {"base_model": "them/base@v2"}], [str(local), {"base_model": str(tmp_path)}]]
    env = hub.environment(tmp_path / "home", token="hf_write")
    done = run(PUSH, env, json.dumps(calls), patient=False)
    said = reported(done)

    assert said[0].startswith(f"ValueError: '{damaged}/training_args.json' is damaged: it holds no JSON (")
    assert said[0].endswith("remove it: nothing is rendered from it.") and "\n" not in said[0]
    assert ("model", "me/damaged") not in hub.store.repos, "nothing is created for what cannot be pushed"

    assert "/me/empty/commit/" in said[1] and "LoRA in" in done.stderr and "has no effect" in done.stderr
    assert b"**It has no effect: all its weights are zero**" in hub.files("me/empty")["README.md"]
    assert json.loads(hub.files("me/empty")["run.json"])["has_no_effect"] is True

    assert said[2].startswith("PushError: Cannot push to 'me/large': what was sent is too large for the Hub (HTTP 413")
    assert "to send the same again will not help" in said[2] and "later" not in said[2]
    assert sum("/me/large/commit/" in request.path for request in hub.requests) == 1

    card = hub.files("me/local")["README.md"].decode()
    assert "base_model: them/base\n" in card and 'base = "them/base"\n' in card and 'revision="v2"' in card
    assert said[4].startswith("ValueError: `base_model` must be a repository of the Hub as `owner/name`")


def test_the_card_takes_the_base(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = make_run(tmp_path / "run", base=Origin("run/base"))
    main(["card", str(folder), "--base_model", "them/base"])
    assert capsys.readouterr().out.strip() == str(folder / "README.md")
    assert "base_model: them/base\n" in (folder / "README.md").read_text()
    assert RunRecord.load(folder).base == Origin("them/base", "them/base")
    with pytest.raises(SystemExit) as caught:
        main(["card", str(folder), "--base_model", "them/base/sub"])
    assert caught.value.code == 2
    assert "must be a repository of the Hub as `owner/name`" in capsys.readouterr().err


def test_teachers_of_any_name_stay_in_the_folder_of_the_space(tmp_path):
    base = tmp_path / "base"
    tiny_pipeline().save_pretrained(base)
    student = make_run(tmp_path / "run", base=Origin("run/base"))
    teacher = save_diffusers_lora(tmp_path / "teacher", *random_lora(seed=2))
    before = {path for path in tmp_path.rglob("*") if "demo" not in path.parts}
    tasks = ["../../../esc", "/etc/passwd", "a | b", "ocr"]
    folder = write_space(
        tmp_path / "demo", student, base=base, teachers=dict.fromkeys(tasks, teacher), include_weights=True
    )
    assert {path for path in tmp_path.rglob("*") if "demo" not in path.parts} == before
    demo = json.loads((folder / "demo.json").read_text())
    assert list(demo["teachers"]) == tasks
    for place in demo["teachers"].values():
        path = (folder / place["id"]).resolve()
        assert path.parent == folder.resolve() / "teachers" and (path / LORA).is_file()
    assert len({place["id"] for place in demo["teachers"].values()}) == len(tasks)
    assert "| teacher of a &#124; b |" in (folder / "README.md").read_text()
