# SPDX-License-Identifier: Apache-2.0
"""The whole way over the loopback Hub: base, teachers and prompts up, a student trained from their ids, its Space."""

import ast
import io
import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import yaml
from huggingface_hub import ModelCard

from tests.support.hub_server import ROOT, run


TOKEN = "hf_writes_and_is_secret"

UPLOAD = """
import sys
from pathlib import Path
from datasets import Dataset
from huggingface_hub import HfApi
from tests.support.runs import PROMPTS, make_teachers
from tests.support.tiny import tiny_pipeline

folder, api = Path(sys.argv[1]), HfApi()
tiny_pipeline().push_to_hub("me/base")
make_teachers(folder / "teachers", scale=0.3)
api.create_repo("me/teachers")
api.upload_folder(repo_id="me/teachers", folder_path=folder / "teachers", path_in_repo="v1")
for task, prompts in PROMPTS.items():
    Dataset.from_dict({"caption": prompts}).push_to_hub("me/prompts", task)
"""

RECIPE = {
    "model_name_or_path": "me/base",
    "teachers": {
        "count": "me/teachers/v1/count@main",
        "scene": {"name_or_path": "me/teachers", "subfolder": "v1/scene", "guidance_scale": 1.0},
    },
    "datasets": {
        "count": {"path": "me/prompts", "name": "count", "column": "caption"},
        "scene": {"path": "me/prompts", "name": "scene", "column": "caption", "streaming": True},
    },
    "lora_r": 4,
    "lora_alpha": 8,
    "hub_strategy": "every_save",
    "hub_always_push": True,
    "per_device_train_batch_size": 2,
    "max_steps": 4,
    "save_steps": 2,
    "num_inference_steps": 4,
    "guidance_scale": 2.0,
    "max_sequence_length": 16,
    "learning_rate": 0.01,
    "num_grid_prompts": 1,
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}

# What somebody does who found the student on the Hub: diffusers alone, nothing of ours.
LOAD = """
import json, sys
import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline

record = json.load(open(sys.argv[1]))
pipe = StableDiffusion3Pipeline.from_pretrained("me/base", torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
def draw(image):
    generator = torch.Generator().manual_seed(image["seed"])
    image = pipe(image["prompt"], generator=generator, output_type="np", **record["inference"]).images[0]
    return image
base = [draw(image) for image in record["gallery"]]
pipe.load_lora_weights("me/student")
student = [draw(image) for image in record["gallery"]]
assert not any(name.startswith(("trl", "peft_")) for name in sys.modules), "not a clean process"
np.savez(sys.argv[2], base=base, student=student)
"""

OPEN_SPACE = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download("me/demo", repo_type="space"))
"""


def script(arguments, env):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_from_hub_teachers_to_a_hub_student_and_its_space(hub, tmp_path):
    hub.add_user("me", token=TOKEN)
    env = hub.environment(tmp_path / "home", token=TOKEN)
    done = run(UPLOAD, env, tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "output_dir": str(tmp_path / "run")}))
    fresh = hub.environment(tmp_path / "other-home", token=TOKEN)
    push = ["--push_to_hub", "--hub_model_id", "me/student"]
    done = script([ROOT / "examples" / "train_opd.py", "--config", recipe, *push], fresh)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr

    # What is on the Hub names the commits that it was made from.
    files = hub.files("me/student")
    assert f"pushed   {hub.endpoint}/me/student/commit/{hub.commits('me/student')[0][0]}" in done.stdout
    record = json.loads(files["run.json"])
    heads = {repo: hub.commits(repo, kind)[0][0] for repo, kind in (("me/base", "model"), ("me/teachers", "model"))}
    heads["me/prompts"] = hub.commits("me/prompts", "dataset")[0][0]
    assert record["base"]["commit"] == heads["me/base"]
    assert [teacher["origin"]["commit"] for teacher in record["teachers"]] == [heads["me/teachers"]] * 2
    assert [prompts["origin"]["commit"] for prompts in record["prompts"]] == [heads["me/prompts"]] * 2
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "me/base" and card.data.base_model_relation == "adapter"
    assert card.data.datasets == ["me/prompts"]
    assert all(commit in card.text for commit in heads.values())
    for image in card.data.widget:
        assert image["output"]["url"] in files
    for sha, _ in hub.commits("me/student"):
        assert not any(name.endswith((".bin", ".pt", ".pth")) for name in hub.files("me/student", revision=sha))

    # Anyone gets the images of the gallery.
    (tmp_path / "run.json").write_bytes(files["run.json"])
    clean = hub.environment(tmp_path / "clean-home")
    done = run(LOAD, clean, tmp_path / "run.json", tmp_path / "images.npz", timeout=300)
    assert done.returncode == 0, done.stderr
    images = np.load(tmp_path / "images.npz")
    assert len(record["gallery"]) == 2
    for image, base, student in zip(record["gallery"], images["base"], images["student"], strict=True):
        shown = PIL.Image.open(io.BytesIO(files[image["file"]]))
        factor = shown.width // student.shape[1]
        shown = np.asarray(shown)[::factor, ::factor] / 255
        assert np.abs(shown - student).max() < 0.6 / 255 + 1e-4
        assert np.abs(shown - base).max() > 0.02

    # The Space
    done = script(["-m", "trl_diffusion_opd", "space", "me/student", "--repo_id", "me/demo"], fresh)
    assert done.returncode == 0, done.stderr
    assert "spaces/me/demo" in done.stdout
    space = hub.files("me/demo", "space")
    front = ModelCard(space["README.md"].decode()).data.to_dict()
    assert front["sdk"] == "gradio" and front["app_file"] == "app.py" and "me/student" in front["models"]
    ast.parse(space["app.py"].decode())
    assert all("==" in line for line in space["requirements.txt"].decode().split())
    demo = json.loads(space["demo.json"])
    assert "me/base" in json.dumps(demo) and "me/student" in json.dumps(demo)
    done = run(OPEN_SPACE, clean)
    assert done.returncode == 0, done.stderr
