# SPDX-License-Identifier: Apache-2.0
import ast
import importlib.metadata
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import SpaceCard
from safetensors import safe_open
from safetensors.torch import save_file

from tests.support.hub_cards import validate_card
from tests.support.hub_server import run
from tests.support.space_app import BASE, PROMPTS, TEACHERS, load_app, make_record, make_student
from trl_diffusion_opd.hub.errors import SourceError
from trl_diffusion_opd.hub.locations import DIFFUSERS_WEIGHT_NAME, Origin
from trl_diffusion_opd.publishing.record import RECORD_FILE
from trl_diffusion_opd.publishing.space import deploy_space, write_space


# Without it nothing can be written: the Space pins its version.
gradio = pytest.importorskip("gradio", reason="needs gradio: pip install -e '.[demo]'")

PROMPT = 'text "HX"'
SIZE = {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 10}


def save_as_peft(lora: Path, folder: Path) -> Path:
    """Saves a LoRA in the format of PEFT."""
    folder.mkdir(parents=True)
    with safe_open(lora / DIFFUSERS_WEIGHT_NAME, "pt") as file:
        tensors = {key.replace("transformer.", "base_model.model.", 1): file.get_tensor(key) for key in file.keys()}
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "/home/somebody/base"})
    )
    return folder


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The app with the LoRA of the teacher for letters as the student, and as a teacher in the format of PEFT."""
    folder = tmp_path_factory.mktemp("space")
    student = make_student(folder / "student")
    teachers = {"ocr": save_as_peft(TEACHERS / "ocr", folder / "peft"), "aesthetic": TEACHERS / "aesthetic"}
    return load_app(write_space(folder / "demo", student, base=BASE, teachers=teachers))


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusion3Pipeline.from_pretrained(BASE, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for task in ("ocr", "aesthetic"):
        pipe.load_lora_weights(TEACHERS / task, weight_name=DIFFUSERS_WEIGHT_NAME, adapter_name=task)
    return pipe


def draw_stock(pipe, lora: str | None = None, strength: float = 1.0, prompt: str = PROMPT, seed: int = 3):
    """What plain diffusers draws."""
    if lora is None:
        pipe.disable_lora()
    else:
        pipe.enable_lora()
        pipe.set_adapters([lora], [strength])
    return np.asarray(pipe(prompt, generator=torch.Generator().manual_seed(seed), **SIZE).images[0])


def generate(
    app, prompt=PROMPT, seed=3, random_seed=False, steps=4, guidance=1.0, strength=1.0, teachers=(), **kwargs
):
    """Calls the app; returns what it shows, images in their own size."""
    seed, note, *pictures = app.generate(
        prompt, seed, random_seed, steps, guidance, strength, list(teachers), **kwargs
    )
    return seed, note, [shrink(picture["value"]) for picture in pictures]


def shrink(picture) -> np.ndarray | None:
    """The pixels of a image that was enlarged 16 times, none of which may have been changed by that."""
    if picture is None:
        return None
    pixels = np.asarray(picture)
    assert pixels.shape == (512, 512, 3)
    small = pixels[::16, ::16]
    assert np.array_equal(small.repeat(16, axis=0).repeat(16, axis=1), pixels)
    return small


def test_written_space_names_all_that_the_app_needs(tmp_path):
    student = make_student(tmp_path / "student")
    folder = write_space(tmp_path / "demo", student, base=BASE, teachers={"ocr": TEACHERS / "ocr"})
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "app.py", "demo.json", "requirements.txt"]
    demo = json.loads((folder / "demo.json").read_text())
    assert demo == {
        "title": "shapes-opd",
        "description": "One LoRA that counts, spells and paints in the world of shapes.",
        "base": {"id": str(BASE)},
        "student": {"id": str(student)},
        "teachers": {"ocr": {"id": str(TEACHERS / "ocr")}},
        "prompts": PROMPTS,
        "defaults": {"num_inference_steps": 10, "guidance_scale": 1.0, "max_sequence_length": 10},
        "guidance": {"argument": "guidance_scale", "offset": 0.0, "info": "Up to 1: none", "fixed": False},
        "limits": {"prompt": 500, "num_inference_steps": 50, "guidance_scale": 10.0, "strength": 1.5},
        "dtype": "float32",
    }
    pins = dict(line.split("==") for line in (folder / "requirements.txt").read_text().split())
    assert {"accelerate", "diffusers", "gradio", "peft", "sentencepiece", "torch", "transformers"} <= pins.keys()
    assert pins == {name: importlib.metadata.version(name).split("+")[0] for name in pins}
    text = (folder / "README.md").read_text()
    assert validate_card(text, "space") == ([], [])
    card = SpaceCard(text).data
    assert (card.sdk, card.sdk_version, card.app_file) == ("gradio", gradio.__version__, "app.py")
    assert card.title == "shapes-opd" and len(card.short_description) <= 60
    assert "suggested_hardware" not in card.to_dict() and "free CPU hardware" in text


def test_app_needs_nothing_of_this_project(tmp_path):
    folder = write_space(tmp_path / "demo", make_student(tmp_path / "student"), base=BASE)
    imported = {"spaces"}  # there on ZeroGPU only
    for node in ast.walk(ast.parse((folder / "app.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    packages = {line.split("==")[0].replace("-", "_") for line in (folder / "requirements.txt").read_text().split()}
    assert imported - sys.stdlib_module_names <= packages | {"spaces", "PIL"}


def test_title_prompts_and_a_large_model(tmp_path):
    record = replace(make_record(), dtype="bfloat16", inference={"num_inference_steps": 60, "guidance_scale": 4.5})
    student = make_student(tmp_path / "student", record)
    folder = write_space(tmp_path / "demo", student, base=BASE, title="Shapes!", prompts={"mine": ["a boat at noon"]})
    demo = json.loads((folder / "demo.json").read_text())
    assert demo["title"] == "Shapes!" and demo["prompts"] == {"mine": ["a boat at noon"]}
    assert demo["teachers"] == {}  # those of the record were local
    assert demo["limits"]["num_inference_steps"] == 60
    text = (folder / "README.md").read_text()
    assert SpaceCard(text).data.suggested_hardware == "a10g-small" and "needs a GPU" in text
    assert validate_card(text, "space") == ([], [])


def test_no_example_is_longer_than_the_limit(tmp_path):
    prompts = {"short": [], "long": ["a boat " * 100]}
    folder = write_space(tmp_path / "demo", make_student(tmp_path / "student"), base=BASE, prompts=prompts)
    assert json.loads((folder / "demo.json").read_text())["limits"]["prompt"] == 700


def test_included_models_name_no_path(tmp_path):
    base = shutil.copytree(BASE, tmp_path / "base")
    for name, key in (("model_index.json", "_name_or_path"), ("tokenizer/tokenizer_config.json", "tokenizer_file")):
        config = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**config, key: "/home/somebody/base"}))
    student = make_student(tmp_path / "student")
    folder = write_space(tmp_path / "demo", student, base=base, include_weights=True)
    assert json.loads((folder / "base/model_index.json").read_text()) == json.loads(
        (BASE / "model_index.json").read_text()
    )
    contents = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert len(contents) > 15 and not any(b"/home/somebody" in content for content in contents)


def test_without_a_record_the_card_tells(tmp_path):
    student = make_student(tmp_path / "student")
    (student / RECORD_FILE).unlink()
    with pytest.raises(ValueError, match="says what it is a LoRA for. Pass it as `base`"):
        write_space(tmp_path / "demo", student)
    (student / "README.md").write_text(f"---\nbase_model: {BASE}\nwidget:\n- text: one red circle\n---\n# Title\n")
    demo = json.loads((write_space(tmp_path / "demo", student) / "demo.json").read_text())
    assert demo["title"] == "student" and demo["base"] == {"id": str(BASE)}
    assert demo["prompts"] == {"examples": ["one red circle"]} and demo["defaults"]["num_inference_steps"] == 40


def test_what_cannot_be_shown_is_refused(tmp_path):
    student = make_student(tmp_path / "student")
    with pytest.raises(ValueError, match="was the local folder 'shapes/base'. Pass where it is as `base`"):
        write_space(tmp_path / "demo", student)
    with pytest.raises(ValueError, match="no 'model_index.json' in .*Pass the folder of a pipeline"):
        write_space(tmp_path / "demo", student, base=BASE / "vae")
    with pytest.raises(SourceError, match="teacher 'ocr': there is no 'pytorch_lora_weights.safetensors'"):
        write_space(tmp_path / "demo", student, base=BASE, teachers={"ocr": BASE})
    with pytest.raises(SourceError, match="student: there is no 'pytorch_lora_weights.safetensors'"):
        write_space(tmp_path / "demo", tmp_path, base=BASE)
    other = shutil.copytree(BASE, tmp_path / "other")
    (other / "model_index.json").write_text('{"_class_name": "KolorsPipeline"}')
    with pytest.raises(ValueError, match="is a 'KolorsPipeline', and the demo is made for a 'Flux2KleinPipeline' or"):
        write_space(tmp_path / "demo", student, base=other)
    with open(other / "vae" / "large.safetensors", "wb") as file:
        file.truncate(201 * 2**20)
    (other / "model_index.json").write_bytes((BASE / "model_index.json").read_bytes())
    with pytest.raises(ValueError, match="the models have 20. MB and 200 MB is the most"):
        write_space(tmp_path / "demo", student, base=other, include_weights=True)
    assert not (tmp_path / "demo").exists()


def test_images_are_those_of_plain_diffusers(app, pipe):
    base, student = draw_stock(pipe), draw_stock(pipe, "ocr")
    seed, note, pictures = generate(app, teachers=["aesthetic", "ocr"])
    assert (seed, note) == (3, "Seed 3, 4 steps, guidance 1, student at strength 1.")
    assert np.array_equal(pictures[0], base)
    assert np.array_equal(pictures[1], student)
    assert np.array_equal(pictures[2], student)  # the teacher in the format of PEFT, scaled right
    assert np.array_equal(pictures[3], draw_stock(pipe, "aesthetic"))
    assert np.abs(base.astype(int) - student).mean() > 2
    half = generate(app, strength=0.5)[2][1]
    assert np.array_equal(half, draw_stock(pipe, "ocr", 0.5))
    assert not np.array_equal(half, student) and not np.array_equal(half, base)
    assert np.array_equal(generate(app, strength=0)[2][1], base)


def test_guidance_and_the_seed_count(app, pipe):
    pictures = generate(app, guidance=3.0)[2]
    pipe.disable_lora()
    expected = pipe(PROMPT, generator=torch.Generator().manual_seed(3), **SIZE | {"guidance_scale": 3.0}).images[0]
    assert np.array_equal(pictures[0], np.asarray(expected))
    assert np.array_equal(generate(app, seed=4)[2][0], draw_stock(pipe, seed=4))
    drawn = {generate(app, steps=1, random_seed=True)[0] for _ in range(3)}
    assert len(drawn) == 3 and all(0 <= seed <= app.MAX_SEED for seed in drawn)


def test_a_call_does_not_disturb_the_next(app, pipe):
    """Whatever was asked before, and even if it broke off, the images are the same."""
    calls = [
        {"strength": 1.5},
        {"prompt": "a boat at sunset", "teachers": ["aesthetic"]},
        {"strength": 0.0},
        {"prompt": "two green circles", "strength": 0.25, "teachers": ["ocr"]},
        {},
    ]
    first = []
    for call in calls:
        app.CACHE.clear()
        first.append(generate(app, **call)[2])
    for call, expected in reversed(list(zip(calls, first, strict=True))):
        app.CACHE.clear()
        with pytest.raises(KeyboardInterrupt):
            generate(app, teachers=["aesthetic"], progress=Progress(stop_after=10))
        for picture, other in zip(generate(app, **call)[2], expected, strict=True):
            assert (picture is None and other is None) or np.array_equal(picture, other)
    assert np.array_equal(first[-1][0], draw_stock(pipe))
    assert np.array_equal(first[-1][1], draw_stock(pipe, "ocr"))


class Progress:
    """Counts the steps instead of showing them."""

    def __init__(self, stop_after: float = float("inf")):
        self.steps, self.stop_after = [], stop_after

    def __call__(self, progress, unit):
        self.steps.append(progress)
        if len(self.steps) >= self.stop_after:
            raise KeyboardInterrupt


def test_nothing_is_drawn_twice(app, monkeypatch):
    app.CACHE.clear()
    progress = Progress()
    generate(app, progress=progress)
    assert progress.steps == [(step, 8) for step in range(1, 9)]
    generate(app, progress=progress)
    generate(app, strength=0, progress=progress)
    assert len(progress.steps) == 8
    generate(app, teachers=["aesthetic"], progress=progress)
    assert progress.steps[8:] == [(step, 4) for step in range(1, 5)]
    generate(app, strength=0.5, progress=progress)  # the base is there
    assert len(progress.steps) == 16
    monkeypatch.setattr(app, "MAX_CACHED", 3)
    generate(app, strength=0.25)
    assert len(app.CACHE) == 3
    generate(app, progress=progress)  # the base was used last and is still there, the student is not
    assert len(progress.steps) == 20


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"prompt": "  "}, "Type a prompt first"),
        ({"prompt": None}, "Type a prompt first"),
        ({"prompt": "a " * 300}, "may have 500 characters and has 599"),
        ({"seed": -1}, "Seed must be a whole number from 0 to 2,147,483,647"),
        ({"seed": 2**31}, "Seed must be a whole number"),
        ({"seed": 1.5}, "Seed must be a whole number"),
        ({"seed": None}, "Seed must be a whole number"),
        ({"steps": 0}, "Steps must be a whole number from 1 to 50"),
        ({"steps": 51}, "Steps must be"),
        ({"steps": "4"}, "Steps must be"),
        ({"guidance": 10.5}, "Guidance must be a number from 0 to 10"),
        ({"guidance": float("nan")}, "Guidance must be"),
        ({"strength": 1.51}, "LoRA strength must be a number from 0 to 1.5"),
        ({"strength": True}, "LoRA strength must be"),
        ({"teachers": ["geneval"]}, "Teachers must be some of: ocr, aesthetic"),
    ],
)
def test_inputs_beyond_the_limits_are_refused(app, inputs, message):
    with pytest.raises(gradio.Error, match=message):
        generate(app, **inputs)


def test_words_that_the_model_does_not_know_are_named(app):
    with pytest.warns(UserWarning, match="has never seen: &lt;b&gt;cat, mars. Try the words of the examples"):
        generate(app, prompt="a <b>cat at mars", steps=1)
    with pytest.warns(UserWarning, match="longer than this model reads"):
        generate(app, prompt="a red circle left of a blue square a red circle", steps=1)


def test_a_base_without_t5(app, monkeypatch):
    monkeypatch.setattr(app.PIPE, "tokenizer_3", None)
    monkeypatch.setattr(app.PIPE, "text_encoder_3", None)
    assert generate(app, steps=1)[2][1].shape == (32, 32, 3)


def test_the_queue_is_limited_and_one_image_is_drawn_at_a_time(app):
    assert app.page._queue.max_size == 16
    functions = {function.api_name: function for function in app.page.fns.values()}
    assert functions["generate"].concurrency_limit == 1


DEPLOY = """
import json, sys
from trl_diffusion_opd.publishing.space import deploy_space

for student, repo_id, options in json.loads(sys.argv[1]):
    try:
        print(deploy_space(student, repo_id, **options))
    except (OSError, ValueError) as error:
        print(type(error).__name__, " ".join(str(error).split()))
"""

OPEN = """
import sys
from pathlib import Path
import numpy as np
from huggingface_hub import snapshot_download
from tests.support.space_app import load_app

for index, repo_id in enumerate(sys.argv[2:]):
    app = load_app(Path(snapshot_download(repo_id, repo_type="space", local_dir=f"{sys.argv[1]}/{index}")))
    print(app.links())
    if app.PROBLEM is None:
        shown = app.generate('text "HX"', 3, False, 4, 1.0, 1.0, list(app.TEACHERS))[2:]
        np.save(f"{sys.argv[1]}/{index}.npy", [np.asarray(image["value"]) for image in shown])
"""


def deploy(hub, home: Path, token: str | None, *calls) -> list[str]:
    done = run(DEPLOY, hub.environment(home, token=token), json.dumps(calls))
    assert done.returncode == 0, done.stderr
    assert "hf_" not in done.stdout
    return done.stdout.splitlines()


@pytest.mark.slow
def test_spaces_on_the_hub(hub, tmp_path, pipe):
    hub.add_user("me", token="hf_write", role="write")
    hub.add_user("me", token="hf_read", role="read")
    hub.add_user("you", token="hf_you", role="write")
    local = make_student(tmp_path / "local")
    base_commit = hub.put("me/base", BASE)
    hub.put("stability/base", BASE, gated=True)
    teacher_commit = hub.put("me/teachers", save_as_peft(TEACHERS / "ocr", tmp_path / "peft/letters").parent)
    record = make_record("me/student")
    record.base = Origin("me/base", "me/base", base_commit)
    record.teachers[1].origin = Origin("me/teachers/letters@main", "me/teachers", teacher_commit)
    pushed = make_student(tmp_path / "pushed", record)
    student_commit = hub.put("me/student", pushed, private=True)
    record.base, record.teachers = Origin("stability/base", "stability/base", "0" * 40), []
    hub.put("me/gated", make_student(tmp_path / "gated", record))
    hub.put("me/empty", {"README.md": b"---\nbase_model: me/base\n---\n"})

    # Who may not write is told before anything else
    calls = [[str(pushed), "me/demo", {"token": token}] for token in (None, "hf_read", "hf_you")]
    said = deploy(hub, tmp_path / "a", None, *calls)
    assert "there is no token" in said[0]
    assert "can only read" in said[1]
    assert "not a member of 'me'" in said[2]

    weights = {"base": str(BASE), "include_weights": True, "teachers": {"ocr": str(tmp_path / "peft/letters")}}
    said = deploy(
        hub,
        tmp_path / "b",
        "hf_write",
        [str(local), "me/demo", {"base": "me/base"}],
        ["me/student", "me/demo", {"base": str(BASE)}],
        ["me/student", "me/demo", {"include_weights": True}],
        ["me/nowhere", "me/demo", {}],
        ["me/empty", "me/demo", {}],
        ["me/student", "me/demo", {"teachers": {"ocr": "me/teachers/numbers"}}],
        [str(pushed), "demo", {"private": True}],
        ["me/gated", "me/closed", {}],
        [str(local), "me/complete", weights],
    )
    assert "was not pushed to the Hub. Push it first (`trl-diffusion-opd push" in said[0]
    assert "this machine only: base. Push it" in said[1]
    assert "nothing to include" in said[2]
    assert said[3].startswith("SourceError student: the repository 'me/nowhere' was not found")
    assert "no 'pytorch_lora_weights.safetensors' in me/empty" in said[4]
    addresses = [f"{hub.endpoint}/spaces/me/{name}" for name in ("demo", "closed", "complete")]
    assert said[5].startswith("SourceError teacher 'ocr': there is no")
    assert said[6:] == addresses

    # One commit, all that is needed, pinned; the machine and the token are not named
    assert [message for _, message in hub.commits("me/demo", "space")][0] == "Demo of shapes-opd"
    assert hub.repo("me/demo", "space").private and not hub.repo("me/complete", "space").private
    assert hub.repo("me/demo", "space").sdk == "gradio"
    files = hub.files("me/demo", "space")
    demo = json.loads(files["demo.json"])
    assert demo["base"] == {"id": "me/base", "revision": base_commit}
    assert demo["student"] == {"id": "me/student", "revision": student_commit}
    assert demo["teachers"] == {"ocr": {"id": "me/teachers", "subfolder": "letters", "revision": teacher_commit}}
    card = SpaceCard(files["README.md"].decode()).data
    assert card.models == ["me/base", "me/student", "me/teachers"]
    assert "secret `HF_TOKEN`" in files["README.md"].decode()
    complete = hub.files("me/complete", "space")
    expected = {f"base/{path.relative_to(BASE).as_posix()}" for path in BASE.rglob("*.*") if path.suffix != ".md"}
    expected |= {f"teachers/ocr/adapter_{name}" for name in ("config.json", "model.safetensors")}
    expected |= {f"student/{DIFFUSERS_WEIGHT_NAME}", "app.py", "demo.json", "README.md", "requirements.txt"}
    assert complete.keys() - {".gitattributes"} == expected
    for content in (*files.values(), *complete.values()):
        for secret in ("hf_write", str(tmp_path), str(BASE), "/home/somebody"):
            assert secret.encode() not in content

    # They run: with the Hub's models, with their own, and with a license that was not accepted
    environment = hub.environment(tmp_path / "c", token="hf_write")
    done = run(OPEN, environment, tmp_path / "open", "me/demo", "me/complete", "me/closed")
    assert done.returncode == 0, done.stderr
    links = [f"[{name}](https://huggingface.co/{name})" for name in ("me/base", "me/student", "me/teachers")]
    lines = done.stdout.splitlines()
    assert lines[0] == f"Base {links[0]}, student {links[1]}, teacher of ocr {links[2]}"
    assert lines[1] == ""  # its models are its own
    for index in range(2):
        pictures = [shrink(picture) for picture in np.load(tmp_path / f"open/{index}.npy")]
        assert np.array_equal(pictures[0], draw_stock(pipe))
        assert np.array_equal(pictures[1], draw_stock(pipe, "ocr"))
        assert np.array_equal(pictures[2], pictures[1])
    assert not (tmp_path / "open/2.npy").exists()
    assert (
        "The model stability/base is gated. Accept its license at https://huggingface.co/stability/base" in done.stdout
    )
    assert "secret HF_TOKEN" in done.stdout


def test_deploying_needs_no_network_to_refuse_a_name(tmp_path):
    with pytest.raises(OSError, match="Cannot push to 'a/b/c': the name must be"):
        deploy_space(make_student(tmp_path / "student"), "a/b/c")
