# SPDX-License-Identifier: Apache-2.0
"""The model card: what the Hub reads of it, what people read of it, and that it is the truth about a run."""

import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from tests.support.cards import COMMIT, assert_reads_well, example_record, snippet
from tests.support.hub_cards import LICENSES
from tests.support.hub_server import run
from tests.support.runs import PROMPTS, make_trainer, small_lora
from tests.support.sd35_dry_run import dry_run
from tests.support.tiny import tiny_pipeline
from trl_diffusion_opd.data.rounds import TaskBatch
from trl_diffusion_opd.hub.licenses import LICENSE_IDS, License, as_license, read_license
from trl_diffusion_opd.hub.locations import Origin
from trl_diffusion_opd.models.registry import DEFAULT_PIPELINE, family_named
from trl_diffusion_opd.models.sd3 import StableDiffusion3
from trl_diffusion_opd.publishing.card import render_card
from trl_diffusion_opd.publishing.card_sections import duration
from trl_diffusion_opd.publishing.record import GalleryImage, PromptSet, RunRecord
from trl_diffusion_opd.trainers.callbacks import save_gallery
from trl_diffusion_opd.trainers.opd_config import DiffusionOPDConfig
from trl_diffusion_opd.trainers.run_record import changed_settings, lora_settings
from trl_diffusion_opd.utils.figures import enlarge
from trl_diffusion_opd.utils.markdown import enumeration, table


ROOT = Path(__file__).parents[3]
CARDS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/run.json"))
SECRET = "hf_a_secret_token"


def untrained(**changes) -> RunRecord:
    return example_record(rounds=0, seconds=0.0, gallery=[], results={}, grid=None, curves=None, **changes)


# What the Hub reads


def test_front_matter_of_a_run_from_the_hub():
    data = render_card(example_record(), tags="mine", dataset_name=["me/prompts", "me/more"]).data
    assert data.library_name == "diffusers" and data.pipeline_tag == "text-to-image"
    assert data.base_model == "them/base" and data["base_model_relation"] == "adapter"
    assert data.license == "apache-2.0" and data.license_name is None and data.license_link is None
    assert data.datasets == ["me/prompts", "me/held", "me/more"]
    gallery_tags = ["text-to-image", "diffusers", "diffusers-training", "lora", "template:sd-lora"]
    assert data.tags == [*gallery_tags, "trl", "diffusion-opd", "mine"]
    assert data["widget"] == [{"text": 'a "red" cat | dog', "output": {"url": "images/ocr_0.png"}}]


def test_front_matter_names_nothing_that_is_not_on_the_hub():
    local = Origin("run/prompts.txt", repo_type="dataset")
    record = untrained(base=Origin("run/base"), prompts=[PromptSet("ocr", local, 3)], eval_prompts=[])
    keys = yaml.safe_load(str(render_card(record)).split("---")[1]).keys()
    assert keys == {"library_name", "license", "pipeline_tag", "tags"}


@pytest.mark.parametrize("base, expected", [("stabilityai/stable-diffusion-3.5-large", True), ("me/sd3.5", False)])
def test_only_stable_diffusion_35_is_tagged_as_such(base, expected):
    tags = StableDiffusion3().card_tags(base)
    assert ("sd3.5" in tags, "sd3.5-diffusers" in tags) == (expected, expected)
    assert set(tags) <= set(render_card(example_record(tags=[*tags, "trl"])).data.tags)


def test_evaluation_results_survive_the_round_trip(tmp_path):
    render_card(example_record()).save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.model_name == "student"
    found = [
        (r.task_type, r.dataset_type, r.dataset_revision, r.metric_type, r.metric_value) for r in data.eval_results
    ]
    assert found == [
        ("text-to-image", "me/held", COMMIT, "reads+sharp", 0.7),
        ("text-to-image", "me/held", COMMIT, "pretty", 0.45),
    ]
    assert "0.25" not in yaml.safe_dump(data.to_dict()), "the base's score is not this model's"


@pytest.mark.parametrize("step, expected", [(300, {"ocr": 0.5}), (250, {})])
def test_an_evaluation_counts_if_it_was_of_these_weights(step, expected):
    evaluation = {"step": step, "eval_reward/ocr": 0.5, "eval_kl/ocr": 1e-4, "eval_kl/scene": 2e-3}
    card = render_card(example_record(results={}, evaluation=evaluation))
    results = getattr(card.data, "eval_results", None) or []
    assert {r.metric_type: r.metric_value for r in results} == ({"reads+sharp": 0.5} if expected else {})
    assert ("| **this LoRA** | **0.500** |" in card.text) == bool(expected)
    assert "| scene | 2.00e-03 | 64 (40) |" in card.text and f"after {step} optimizer steps" in card.text
    assert ("| ocr | 1.00e-04 |" in card.text) != bool(expected)
    assert_reads_well(str(card))


def test_without_evaluation_there_are_no_scores():
    card = render_card(example_record(results={}, grid=None))
    assert "model-index" not in str(card) and "## How good it is" not in card.text
    assert "**How good:** not measured" in card.text and "Nothing was evaluated" in card.text
    assert_reads_well(str(card))


def test_scores_that_are_not_numbers_are_left_out():
    results = {"student": {"ocr": float("nan"), "scene": 0.5}}
    card = render_card(example_record(results=results))
    assert [r.metric_type for r in card.data.eval_results] == ["pretty"]
    assert "| **this LoRA** | **–** | **0.500** |" in card.text


# What people read


def test_the_table_compares_base_teachers_merge_and_this_lora():
    text = render_card(example_record()).text
    rows = [
        "|  | ocr | scene |",
        "| --- | --- | --- |",
        "| base | 0.250 | 0.500 |",
        "| teacher ocr | 0.750 | 0.400 |",
        "| teacher scene | 0.100 | 0.500 |",
        "| plain sum of the teachers' LoRAs | 0.300 | 0.300 |",
        "| **this LoRA** | **0.700** | **0.450** |",
        "| share of the teacher's gain | 90 % | – |",  # the teacher of scenes is no better than the base
        "| reward | `reads` + `sharp` | `pretty` |",
        "| images (prompts) | 64 (40) | 64 (40) |",
        "",
        "- `reads`: 1 if it can be read.",
    ]
    assert "\n".join(rows) in text
    assert "- **How good:** 90 % of the teacher's gain over the base on ocr; see" in text


def test_the_body_tells_origins_with_their_commits_time_and_hardware():
    text = render_card(example_record()).text
    page = "https://huggingface.co"
    assert f"[a/teachers/ocr@v1]({page}/a/teachers/tree/{COMMIT}) at `0123456`" in text
    assert f"[b/full]({page}/b/full/tree/{COMMIT}) at `0123456`, a full model | 1 |" in text
    assert f"1,200, [me/prompts]({page}/datasets/me/prompts/tree/{COMMIT}) at `0123456`" in text
    assert (
        "300 optimizer steps of 72 images, in bfloat16. This took 2 h 5 min on 8 x NVIDIA H100, "
        "with at most 42 GB of memory in a process."
    ) in text
    assert "![" in text and "](images/step_000300.png)" in text and "](curves.png)" in text
    assert (
        "@article{a_method}" in text and "@software{vonwerra2020trl" in text and "@software{trl_diffusion_opd" in text
    )


@pytest.mark.parametrize(
    "changes, expected, absent",
    [
        ({}, ["<Gallery />"], ["Not trained", "Unfinished", "moving average", "solver"]),
        ({"rounds": 120}, ["> **Unfinished.** These are the weights after 120 of the 300 planned"], ["Not trained"]),
        ({"planned_rounds": 0}, [], ["Unfinished"]),
        ({"settings": {"ema_decay": 0.9}}, ["moving average", "(decay 0.9)", "lora_weights_raw.safetensors"], []),
        ({"settings": {"solver": "dpm2"}}, ["solver `dpm2` at noise level 0", "Nobody picked"], ["This draws"]),
        ({"settings": {"solver": "cps", "eval_noise_level": 0.7}}, ["solver `cps` at noise level 0.7"], []),
        ({"base_license": License()}, ["**License:** not known", "so none is stated for this LoRA"], []),
        (
            {"base_license": License("other", "x-1.0", "https://x.y")},
            ["[x-1.0](https://x.y)", "accept its license"],
            [],
        ),
        ({"base_license": License("other", "x-1.0")}, ["holds for it too: x-1.0."], ["[x-1.0]"]),
        (
            {"results": {"student": {"ocr": 0.5}}},
            ["none of which it was trained on, with the same noise"],
            ["share of"],
        ),
        (
            {"gallery": [GalleryImage("a", "images/a.png", round=250)]},
            ["show the weights after 250 opt"],
            ["This draws"],
        ),
        ({"gallery": []}, ["'a sign',", "manual_seed(0)"], ["<Gallery />", "Nobody picked"]),
        ({"grid": None, "curves": None}, [], ["!["]),
        ({"repo_id": None}, ['lora = "./student"'], []),
        ({"base": Origin("run/base")}, ['base = "./run/base"', "(not on the Hub)"], ["base_model"]),
        ({"base": Origin("a/b@v2", "a/b")}, ['base = "a/b"\n', 'from_pretrained(base, revision="v2", dtype='], []),
        ({"dtype": "float32"}, ["dtype=torch.float32"], ["bfloat16"]),
        ({"revision": "try"}, ['pipe.load_lora_weights(lora, revision="try", weight_name='], []),
        (
            {"hardware": {"device": "H200", "num_processes": 1, "peak_memory_gb": 127.46}},
            ["on H200, with at most 127 GB of memory."],
            [],
        ),
        (
            {"gallery": [], "prompts": [PromptSet("ocr", Origin("a.txt"), 1, examples=["字" * 150])]},
            [f"**Prompts like:** `{'字' * 99}…` (ocr)"],
            [],
        ),
        (
            {"teachers": [], "results": {}, "paper": {}, "versions": {"trl-diffusion-opd": "1"}},
            [],
            ["| teacher", "imitates", "TRL"],
        ),
    ],
)
def test_the_card_follows_the_record(changes, expected, absent):
    card = str(render_card(example_record(**changes)))
    assert [part for part in expected if part not in card] == []
    assert [part for part in absent if part in card] == []
    assert_reads_well(card)


def test_a_card_before_training_says_so_and_claims_nothing():
    card = str(render_card(untrained(hardware={"num_processes": 8})))
    assert "> **Not trained yet.**" in card and "Once it is trained:" in card
    assert "Planned are 300 optimizer steps of 72 images on 8 processes, in bfloat16." in card
    assert "took" not in card and "How good it is" not in card and "model-index" not in card
    assert_reads_well(card)


def test_prompts_of_the_training_in_the_evaluation_are_told():
    sets = [PromptSet("ocr", Origin("me/held", "me/held", None, "dataset"), 40, 64, 3)]
    record = example_record(eval_prompts=sets, results={"student": {"ocr": 0.5}})
    text = render_card(record).text
    assert "3 of the 40 evaluation prompts of ocr were trained on too." in text
    assert "none of which" not in text and "Few different prompts" not in text
    assert "No reward was measured on scene." in text


def test_small_formats():
    assert [duration(s) for s in (0.4, 59.4, 185, 7625)] == ["0 s", "59 s", "3 min 5 s", "2 h 7 min"]
    assert [enumeration("abc"[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
    assert table(["a"], [["x|y\nz"]]) == "| a |\n| --- |\n| x&#124;y z |"
    tiny = PIL.Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    large = enlarge(tiny)
    assert large.size == (256, 256) and np.array_equal(np.asarray(large)[::64, ::64], np.asarray(tiny))
    assert enlarge(PIL.Image.new("RGB", (300, 512))).size == (300, 512)


# Licenses

HUB_BASE, LOCAL_BASE = Origin("them/base@v1", "them/base", COMMIT), Origin("run/My base")


@pytest.mark.parametrize(
    "data, origin, expected",
    [
        ({"license": "apache-2.0"}, HUB_BASE, License("apache-2.0")),
        ({"license": ["openrail++"]}, HUB_BASE, License("openrail++")),
        ({"license": "cc-by-nc-4.0", "license_name": "x"}, LOCAL_BASE, License("cc-by-nc-4.0")),
        (
            {"license": "other", "license_name": "stabilityai-ai-community", "license_link": "LICENSE.md"},
            HUB_BASE,
            License("other", "stabilityai-ai-community", "https://huggingface.co/them/base/blob/main/LICENSE.md"),
        ),
        (
            {"license": "other", "license_name": "x", "license_link": "https://x.y/z"},
            HUB_BASE,
            License("other", "x", "https://x.y/z"),
        ),
        ({"license": "other", "license_name": "x", "license_link": "LICENSE"}, LOCAL_BASE, License("other", "x")),
        (
            {"license": "home-made-1.0"},
            HUB_BASE,
            License("other", "home-made-1.0", "https://huggingface.co/them/base"),
        ),
        ({"license": "other"}, LOCAL_BASE, License("other", "license-of-my-base")),
        ({"license": ["mit", "gpl"]}, LOCAL_BASE, License("other", "mit and gpl")),
        ({"license": "unknown"}, HUB_BASE, License()),
        ({"tags": ["x"]}, HUB_BASE, License()),
    ],
)
def test_licenses_hold_in_another_repository(data, origin, expected):
    assert as_license(data, origin) == expected


def test_the_list_of_licenses_is_the_hubs():
    assert LICENSE_IDS == LICENSES - {"other", "unknown"}


def test_the_license_of_a_local_base_is_in_its_card(tmp_path, caplog):
    origin = Origin.local(tmp_path)
    assert read_license(origin, tmp_path) == License()
    assert read_license(origin) == License()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    assert read_license(origin, tmp_path) == License("mit")
    assert not caplog.records
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\n")
    assert read_license(origin, tmp_path) == License()
    assert "the model card will state none" in caplog.text


STATED_LICENSES = """
import sys, json
from dataclasses import asdict
from trl_diffusion_opd.hub.licenses import read_license
from trl_diffusion_opd.hub.locations import Origin
print("RESULT", json.dumps([asdict(read_license(Origin(name, name))) for name in sys.argv[1:]]))
"""
VALIDATE = """
import sys
from huggingface_hub import ModelCard
for path in sys.argv[1:]:
    try:
        ModelCard.load(path).validate()
    except ValueError as error:
        print("REFUSED", path, error)
"""


def test_the_license_of_a_base_on_the_hub_takes_one_file(hub, tmp_path):
    front = "---\nlicense: other\nlicense_name: their-terms\nlicense_link: LICENSE.md\n---\n"
    hub.put("them/base", {"README.md": front.encode(), "model_index.json": b"{}"})
    hub.put("them/bare", {"model_index.json": b"{}"})
    done = run(STATED_LICENSES, hub.environment(tmp_path / "home"), "them/base", "them/bare", "them/nowhere")
    assert done.returncode == 0, done.stderr
    link = "https://huggingface.co/them/base/blob/main/LICENSE.md"
    found = [License(**row) for row in json.loads(done.stdout.partition("RESULT")[2])]
    assert found == [License("other", "their-terms", link), License(), License()]
    assert done.stderr.count("The license of the base is not known") == 2
    got = [request for request in hub.requests if request.method == "GET" and "resolve" in request.path]
    assert len([request for request in got if "them/base" in request.path]) == 1


def test_the_hub_takes_the_cards(hub, tmp_path):
    cards = {
        "full": example_record(),
        "untrained": untrained(),
        "local": example_record(base=Origin("run/base"), base_license=License("other", "license-of-base")),
    }
    paths = [*(folder / "README.md" for folder in CARDS), *(tmp_path / f"{name}.md" for name in [*cards, "broken"])]
    for name, record in cards.items():
        render_card(record).save(tmp_path / f"{name}.md")
    render_card(example_record(base_license=License("home-made"))).save(tmp_path / "broken.md")
    done = run(VALIDATE, hub.environment(tmp_path / "home"), *paths)
    assert done.returncode == 0, done.stderr
    refused = [line for line in done.stdout.splitlines() if line.startswith("REFUSED")]
    assert len(refused) == 1 and "broken.md" in refused[0], refused


# A real run


def bright(images, prompts, **columns):
    """Mean brightness."""
    return [float(image.mean()) for image in images]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny base and a finished run on disk, and its trainer."""
    folder = tmp_path_factory.mktemp("card")
    tiny_pipeline().save_pretrained(folder / "base")
    (folder / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    trainer = trained(folder)
    trainer.save_model()
    return folder, trainer


def trained(folder, resume=None, **settings):
    torch.set_num_threads(1)
    trainer = make_trainer(
        folder,
        pipeline=str(folder / "base"),
        **{
            "output_dir": str(folder / "student"),
            "max_steps": 4,
            "learning_rate": 0.1,
            "save_strategy": "steps",
            "save_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "num_grid_prompts": 3,
            "save_curves": True,
            "hub_token": SECRET,
            "model_init_kwargs": {"token": SECRET, "cache_dir": str(folder / "cache")},
            "lr_scheduler_type": "constant_with_warmup",
            "task_weights": {"count": 2},
            **settings,
        },
        eval_dataset=PROMPTS,
        reward_funcs={"count": bright},
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_record_of_a_run_is_true(finished):
    folder, trainer = finished
    record = RunRecord.load(folder / "student")
    assert record == trainer.make_record()
    assert (record.name, record.repo_id, record.base.name) == ("student", None, f"{folder.name}/base")
    assert record.base_license == License("mit")
    assert [teacher.sha256 for teacher in record.teachers] == [t.fingerprint for t in trainer.loaded_teachers.values()]
    assert (record.rounds, record.planned_rounds, record.images_per_round) == (4, 4, 6)
    assert record.inference["height"] == 16 and record.dtype == "float32"
    assert record.settings["task_weights"] == {"count": 2} and record.settings["learning_rate"] == 0.1
    assert record.settings["lora_target_modules"] == ["attn.to_q", "attn.to_v"] and record.settings["lora_r"] == 4
    assert not {"output_dir", "hub_token", "bf16", "do_eval", "use_cpu", "logging_steps"} & set(record.settings)
    assert [prompts.num_seen for prompts in record.eval_prompts] == [5, 3]
    assert record.evaluation["step"] == 4 and set(record.reward_names) == {"count"}
    assert record.reward_docs == {"bright": "Mean brightness."}
    assert 0 < record.seconds < 300 and record.hardware["num_processes"] == 1
    assert "thread" in record.hardware["device"] and record.hardware["peak_memory_gb"] > 0.1
    for file in (record.grid, record.curves, *(image.file for image in record.gallery)):
        assert (folder / "student" / file).is_file(), file
    text = (folder / "student" / "run.json").read_text() + (folder / "student" / "README.md").read_text()
    assert SECRET not in text and str(folder.parent) not in text and "cache_dir" not in text
    assert_reads_well((folder / "student" / "README.md").read_text())


def test_the_gallery_has_the_students_images(finished):
    folder, trainer = finished
    gallery = trainer.make_record().gallery
    assert [image.file for image in gallery] == [f"images/{t}_{i}.png" for t in ("count", "scene") for i in (0, 1)]
    assert all(image.prompt in PROMPTS[image.task] and image.round == 4 for image in gallery)
    pictures = [np.asarray(PIL.Image.open(folder / "student" / image.file)) for image in gallery]
    assert all(picture.shape == (256, 256, 3) for picture in pictures)
    assert all(np.array_equal(p, np.kron(p[::16, ::16], np.ones((16, 16, 1), np.uint8))) for p in pictures)
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_no_image_of_the_gallery_replaces_another(tmp_path):
    """Tasks are file names as far as they can be."""
    (tmp_path / "images").mkdir()
    tasks = ["a b", "a_b", "数", "字"]
    batches = [TaskBatch(task, [], [f"{task} {i}" for i in range(3)], [0, 1, 2], [0, 1, 2]) for task in tasks]
    gallery = save_gallery(batches, [torch.full((3, 256, 256), i / 12) for i in range(12)], tmp_path, 5)
    assert [image.prompt for image in gallery] == [f"{task} {i}" for task in tasks for i in (0, 1)]
    shown = [PIL.Image.open(tmp_path / image.file).getpixel((0, 0))[0] for image in gallery]
    assert shown == [round(255 * i / 12) for i in range(12) if i % 3 < 2]


def test_the_loading_snippet_draws_the_first_image_of_the_gallery(finished, tmp_path, monkeypatch):
    """It is executed as it stands, and must draw what a base with the LoRA added by hand draws."""
    folder, trainer = finished
    card = ModelCard.load(folder / "student" / "README.md")
    (tmp_path / folder.name).mkdir()
    (tmp_path / folder.name / "base").symlink_to(folder / "base")
    (tmp_path / "student").symlink_to(folder / "student")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet(card.text), "snippet", "exec"), {})
    drawn = np.asarray(PIL.Image.open("image.png")).astype(int)

    image = trainer.make_record().gallery[0]
    gallery = np.asarray(PIL.Image.open(folder / "student" / image.file))[::16, ::16]
    assert np.abs(drawn - gallery).max() <= 1

    pipe = StableDiffusion3Pipeline.from_pretrained(folder / "base", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        inference = trainer.make_record().inference
        generator = torch.Generator().manual_seed(image.seed)
        return np.asarray(pipe(image.prompt, generator=generator, **inference).images[0]).astype(int)

    assert np.abs(drawn - draw()).max() > 8, "the LoRA does something"
    lora = load_file(folder / "student" / "pytorch_lora_weights.safetensors")
    modules = dict(pipe.transformer.named_modules())
    for name in [name for name in lora if name.endswith("lora_A.weight")]:
        update = 8 / 4 * lora[name.replace("lora_A", "lora_B")] @ lora[name]
        modules[name.removeprefix("transformer.").removesuffix(".lora_A.weight")].weight.data += update
    assert np.abs(drawn - draw()).max() <= 1


def test_cards_in_the_middle_of_a_run_and_after_its_resumption(finished, tmp_path):
    folder, trainer = finished
    record = RunRecord.load(folder / "student" / "checkpoint-2")
    assert (record.rounds, record.planned_rounds, record.evaluation["step"]) == (2, 4, 2)
    assert 0 < record.seconds < trainer.outcome.seconds
    card = str(render_card(record))
    assert "> **Unfinished.** These are the weights after 2 of the 4 planned optimizer steps." in card
    assert_reads_well(card)
    record.drop_missing(folder / "student" / "checkpoint-2")
    assert record.gallery == [] and record.grid is None and record.curves is None

    copytree(folder / "student" / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "images").mkdir()
    copy(folder / "student" / "images" / "count_0.png", tmp_path / "images")
    saved = RunRecord.load(tmp_path / "checkpoint-2")
    replace(saved, seconds=1000.0).save(tmp_path / "checkpoint-2")
    resumed = trained(folder, tmp_path / "checkpoint-2", output_dir=str(tmp_path), num_grid_prompts=0, eval_steps=9)
    record = resumed.make_record()
    assert 1000 < record.seconds < 1300 and record.rounds == 4
    assert [image.file for image in record.gallery] == ["images/count_0.png"], "what is there still"
    assert record.gallery[0].round == 2 and record.grid is None


def test_before_training_the_record_plans_and_afterwards_a_comparison_is_of_these_weights(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=PROMPTS, reward_funcs={"count": bright}, max_steps=2)
    record = trainer.make_record()
    assert (record.rounds, record.planned_rounds, record.seconds) == (0, 2, 0.0)
    assert "Not trained yet" in render_card(record).text
    results = trainer.compare()
    assert trainer.make_record().results == results
    trainer.train()
    assert trainer.make_record().results == {}


def test_jobs_of_the_hub_are_tagged(finished, monkeypatch):
    assert "hf_jobs" not in finished[1].make_record().tags
    monkeypatch.setenv("JOB_ID", "123")
    assert "hf_jobs" in finished[1].make_record().tags


def test_settings_leave_out_defaults_machines_and_secrets(tmp_path):
    common = {"output_dir": str(tmp_path), "use_cpu": True}
    defaults = family_named(DEFAULT_PIPELINE).defaults(dict)
    assert changed_settings(DiffusionOPDConfig(**common), defaults) == {}
    config = DiffusionOPDConfig(
        **common,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": 5},
        model_init_kwargs={"token": SECRET, "cache_dir": "models", "variant": "fp16", "weights": "/home/me/w"},
        resume_from_checkpoint="x/checkpoint-2",
        hub_token=SECRET,
        seed=7,
    )
    assert changed_settings(config, defaults) == {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 5},
        "model_init_kwargs": {"variant": "fp16"},
        "seed": 7,
    }
    assert lora_settings(small_lora(use_rslora=True)) == {
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_modules": ["attn.to_q", "attn.to_v"],
        "lora_use_rslora": True,
    }


# What is shipped


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_shipped_cards_are_those_of_their_records(folder):
    record = RunRecord.load(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text == str(render_card(record))
    assert_reads_well(text)
    for file in re.findall(r"\]\(((?:images/|curves)[^)]*)\)|url: (images/\S+)", text):
        assert (folder / "".join(file)).is_file(), file


def test_render_tells_a_stale_card(tmp_path):
    assert {folder.name for folder in CARDS} >= {"shapes_student", "shapes_teacher_ocr", "sd35_medium_dry_run"}
    copytree(ROOT / "model_cards", tmp_path / "cards")
    command = [sys.executable, str(tmp_path / "cards" / "render.py")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    readme = tmp_path / "cards" / "shapes_student" / "README.md"
    readme.write_text(readme.read_text() + "x")
    done = subprocess.run([*command, "--check"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "error: not as rendered: shapes_student." in done.stderr
    assert subprocess.run(command, env=env, capture_output=True, timeout=60).returncode == 0
    assert readme.read_text() == (ROOT / "model_cards" / "shapes_student" / "README.md").read_text()


def test_the_card_of_the_dry_run_is_that_of_the_recipe(hub, tmp_path):
    shipped = asdict(RunRecord.load(ROOT / "model_cards" / "sd35_medium_dry_run"))
    made = asdict(dry_run(hub, tmp_path))
    for key in ("versions", "date"):
        shipped.pop(key), made.pop(key)
    assert made == shipped


def test_the_base_of_the_shapes_world_has_its_card(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from shapes.build_base import CARD

    base = ROOT / "examples" / "shapes" / "base"
    assert (base / "README.md").read_text() == CARD
    assert read_license(Origin.local(base), base) == License("apache-2.0")


def test_an_installed_wheel_renders_the_same_card(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, tmp_path)
    for name in ("trl_diffusion_opd",):
        copytree(ROOT / name, tmp_path / name, ignore=ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        tmp_path,
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = """
import sys
import trl_diffusion_opd.publishing.card as card
from trl_diffusion_opd.publishing.record import RunRecord
assert card.__file__.startswith(sys.argv[2]), card.__file__
assert not {"torch", "diffusers", "trl"} & set(sys.modules), "rendering a card needs no training library"
print(card.render_card(RunRecord.load(sys.argv[1])), end="")
"""
    folder = ROOT / "model_cards" / "sd35_medium_dry_run"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "installed")]
    done = subprocess.run(command, env=env, cwd=tmp_path / "installed", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (folder / "README.md").read_text(encoding="utf-8")
