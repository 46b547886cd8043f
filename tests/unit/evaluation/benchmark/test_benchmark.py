# SPDX-License-Identifier: Apache-2.0
"""`trl-diffusion-opd eval`: what is drawn and how often, and what people and programs read."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import load_dataset
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from tests.support.benchmark_world import GUIDANCE, LENGTH, PROMPTS, SIZE, STEPS, World
from tests.support.cards import assert_reads_well, example_record
from tests.support.hub_server import ROOT, HubServer, run
from tests.support.tiny import random_lora, save_diffusers_lora
from trl_diffusion_opd.evaluation.benchmark.folder import ResultsFolder
from trl_diffusion_opd.evaluation.benchmark.suites import image_seed, positions
from trl_diffusion_opd.hub.locations import Origin
from trl_diffusion_opd.lora.convert import convert_lora
from trl_diffusion_opd.lora.files import read_lora
from trl_diffusion_opd.publishing.benchmarks import benchmark_scores
from trl_diffusion_opd.publishing.card import render_card
from trl_diffusion_opd.publishing.record import RunRecord


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("benchmark"))


@pytest.fixture(scope="module")
def whole(world):
    """The folder of an evaluation of everything, in one process."""
    world.evaluate("whole", merge=["sum", "mean"], guidance_scale={None: [GUIDANCE], "base": [1.0, 3.0]})
    assert world.calls == [5] * 6
    return world.folder / "whole"


PUSHED_THEN_KILLED = """
import json, os, signal, sys
from pathlib import Path
import PIL.Image
from trl_diffusion_opd import cli

push, evaluation = json.loads(sys.argv[1])
cli.main(push)
save, count = PIL.Image.Image.save, 0

def killed(image, file, **kwargs):
    global count
    count += 1
    if count == 7:
        Path(file).write_bytes(b"half of an image")
        os.kill(os.getpid(), signal.SIGKILL)
    save(image, file, **kwargs)

PIL.Image.Image.save = killed
cli.main(evaluation)
"""


@pytest.fixture(scope="module")
def process(world, whole):
    """A process that pushed a LoRA with its scores, then drew, and was killed while it wrote the seventh image."""
    folder = world.folder / "process"
    student = shutil.copytree(world.loras["student"], folder / "student")
    example_record().save(student)
    push = ["push", student, "--repo_id", "me/student", "--eval", whole]
    words = ["eval", "--model", world.base, "--lora", f"student={world.loras['student']}", "--benchmarks", "words"]
    words += ["--prompts", f"words={world.folder / 'prompts.txt'}", "--rewards", world.reward("brightness")[None][0]]
    words += ["--num_inference_steps", STEPS, "--guidance_scale", GUIDANCE, "--max_sequence_length", LENGTH]
    words += ["--output_dir", folder / "killed", "--batch_size", 2, "--use_cpu"]
    commands = json.dumps([[str(word) for word in command] for command in (push, words)])
    with HubServer(folder / "hub") as hub:
        hub.add_user("me", token="hf_writes")
        done = run(PUSHED_THEN_KILLED, hub.environment(folder / "home", token="hf_writes"), commands)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert re.search("/me/student/commit/[0-9a-f]{40}", done.stdout)
        return student, hub.files("me/student"), folder / "killed"


def pixels(file: Path) -> np.ndarray:
    return np.asarray(PIL.Image.open(file), dtype=np.int16)


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {file.relative_to(folder).as_posix(): pixels(file) for file in sorted(folder.rglob("*.png"))}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Equal but for rounding: one of 256 levels, in less than one of a hundred values."""
    assert one.keys() == other.keys() and one
    difference = np.stack([np.abs(one[name] - other[name]) for name in one])
    return difference.max() <= 1 and (difference > 0).mean() < 0.01


# What is drawn


def test_images_are_those_of_diffusers_with_the_same_noise(world, whole, tmp_path):
    pipe = StableDiffusion3Pipeline.from_pretrained(world.base)
    pipe.set_progress_bar_config(disable=True)
    for name, folder in world.loras.items():
        lora = folder if name == "student" else convert_lora(folder, tmp_path / name).parent
        pipe.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors", adapter_name=name)
    seeds = [image_seed(42, "words", position) for position in range(5)]
    noise = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    drawn = {}
    for model, adapters, guidance, weight in (
        ("base, guidance 1", [], 1.0, 1.0),
        ("base, guidance 3", [], 3.0, 1.0),
        ("student", ["student"], GUIDANCE, 1.0),
        ("other", ["other"], GUIDANCE, 1.0),
        ("merge_sum", ["student", "other"], GUIDANCE, 1.0),
        ("merge_mean", ["student", "other"], GUIDANCE, 0.5),
    ):
        pipe.enable_lora() if adapters else pipe.disable_lora()
        if adapters:
            pipe.set_adapters(adapters, [weight] * len(adapters))
        size = {"height": SIZE, "width": SIZE, "max_sequence_length": LENGTH, "num_inference_steps": STEPS}
        images = pipe(PROMPTS, guidance_scale=guidance, latents=torch.stack(noise), output_type="pt", **size).images
        for position, image in enumerate(images):
            drawn[f"{model}/words/{position + 1:05d}.png"] = (image * 255).round().permute(1, 2, 0).numpy()
    assert same(drawn, pictures(whole))
    assert len({array.tobytes() for array in drawn.values()}) == 30, "models, prompts and noise differ"


def test_images_do_not_depend_on_batch_order_and_company(world, whole):
    world.evaluate("alone", loras={"student": world.loras["student"]}, base=False, batch_size=2)
    world.evaluate("alone", loras={"other": world.loras["other"]}, base=False, batch_size=3, merge=[])
    alone = pictures(world.folder / "alone")
    assert (
        world.calls == [5, 5]
        and len(alone) == 10
        and same(alone, {name: p for name, p in pictures(whole).items() if name in alone})
    )


def test_fewer_images_are_spread_and_more_have_other_noise(world, whole):
    assert positions(84, 3) == [0, 28, 56] and positions(5, 7) == list(range(7)) and positions(5, 5) == list(range(5))
    world.evaluate("more", loras={}, num_images=7, guidance_scale={"base": [1.0]})
    more, few = pictures(world.folder / "more"), pictures(whole)
    for position in range(5):
        name = f"words/{position + 1:05d}.png"
        assert same({name: more[f"base/{name}"]}, {name: few[f"base, guidance 1/{name}"]})
    assert (more["base/words/00006.png"] != more["base/words/00001.png"]).any()
    rows = [json.loads(line) for line in (world.folder / "more" / "metadata.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [*PROMPTS, *PROMPTS[:2]] and len({row["seed"] for row in rows}) == 7
    assert world.calls == [7]


@pytest.mark.slow
def test_two_processes_do_what_one_does(world, whole):
    out = world.folder / "two"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--main_process_port", "0"]
    launch += [
        "--config_file",
        str(ROOT / "examples" / "accelerate_configs" / "cpu_2.yaml"),
        "-m",
        "trl_diffusion_opd",
    ]
    command = [*launch, "eval", "--model", world.base, "--lora", world.loras["student"], f"x={world.loras['other']}"]
    command += ["--benchmarks", "words", "--prompts", f"words={world.folder / 'prompts.txt'}", "--use-cpu"]
    command += ["--merge", "sum", "mean"]
    command += ["--rewards", world.reward("brightness")[None][0], "--num-inference-steps", STEPS, "--batch-size", 2]
    command += ["--guidance-scale", GUIDANCE, "base=1", "base=3", "--max-sequence-length", LENGTH, "--output_dir", out]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| base, guidance 1 |") == 3, "one of the processes reports, in three tables"
    (out / "x").rename(out / "other")
    assert same(pictures(out), pictures(whole))
    for name in ("brightness", "statistics"):
        files = [list(out.rglob(f"{name}.{process}.jsonl")) for process in (0, 1)]
        assert [sum(len(file.read_text().split("\n")) - 1 for file in own) for own in files] == [15, 15]
    assert sum(world.calls) == 30
    one, two = (json.loads((folder / "summary.json").read_text())["results"] for folder in (whole, out))
    for a, b in zip(one, two, strict=True):
        assert b["mean"] == pytest.approx(a["mean"], abs=2e-3) and b["num_scored"] == 5


# Going on


def test_a_killed_run_goes_on_without_doing_anything_twice(world, process, monkeypatch):
    *_, out = process
    evaluate_again = partial(world.evaluate, "process/killed", loras={"student": world.loras["student"]})
    there = {file: file.stat().st_mtime_ns for file in out.rglob("*.png")}
    assert len(there) == 6 and len(list(out.rglob("*.part"))) == 1 and world.calls == []

    saved = []
    save = ResultsFolder.save_image
    monkeypatch.setattr(ResultsFolder, "save_image", lambda *args: (saved.append(args[2:]), save(*args)))
    evaluate_again()
    assert len(saved) == 4 and all(file.stat().st_mtime_ns == time for file, time in there.items())
    assert world.calls == [5, 5] and not list(out.rglob("*.part"))
    first = pictures(out)

    # Nothing is left to do, and then only what was taken away; a line that was cut off counts as taken away.
    saved.clear()
    evaluate_again()
    assert saved == [] and world.calls == []
    summary = (out / "summary.json").read_text()
    (out / "base" / "words" / "00002.png").unlink()
    scores = out / "student" / "words" / "brightness.0.jsonl"
    scores.write_text(scores.read_text()[:-5])
    evaluate_again()
    assert saved == [("base", "words", 1)] and world.calls == [1]
    assert same(pictures(out), first) and (out / "summary.json").read_text() == summary
    lines = scores.read_text().split("\n")
    assert len(lines) == 7 and json.loads(lines[-1])["image"] == "00005.png"

    # A new reward scores the old images, and a new model joins the table.
    evaluate_again(rewards=world.reward("brightness", "picky"))
    summary = evaluate_again(loras={"other": world.loras["other"]}, base=False)
    assert {picture[0] for picture in saved[1:]} == {"other"} and world.calls == [5]
    assert list(summary["settings"]["models"]) == ["base", "student", "other"]
    assert [row["num_scored"] for row in summary["results"] if row["reward"] == "picky"] == [4, 4, 0]


def test_other_settings_are_refused(world, whole, tmp_path):
    copy = world.folder / "copy"
    shutil.copytree(whole, copy)
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    changed = tmp_path / "student"
    shutil.copytree(world.loras["student"], changed)
    file = changed / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, file)
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    guidance = {None: [GUIDANCE], "base": [1.0, 3.0]}
    other = tmp_path / "prompts.txt"
    other.write_text("\n".join([*PROMPTS[:4], "a dog"]))
    for changes, message in (
        ({"num_inference_steps": 4}, "num_inference_steps was 3 and is 4 now"),
        ({"seed": 7}, "seed was 42 and is 7 now"),
        ({"dtype": "bfloat16"}, "dtype was float32 and is bfloat16 now"),
        ({"resolution": 8}, "resolution was 16 and is 8 now"),
        ({"guidance_scale": 1.0}, "models: student: guidance_scale was 2.0 and is 1.0 now"),
        ({"num_images": 3}, "benchmarks: words: num_images was 5 and is 3 now"),
        ({"loras": {**world.loras, "student": changed}}, r"models: student: weights was [0-9a-f]{8} and is"),
        ({"prompts": {"words": str(other)}}, r"benchmarks: words: prompts was [0-9a-f]{8} and is"),
    ):
        with pytest.raises(ValueError, match=f"in '.*copy' were made with other settings: {message}"):
            world.evaluate("copy", **{"guidance_scale": guidance, "merge": ["sum"], **changes})
    assert {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()} == before
    # A base that was moved is the same, one that was changed is not.
    world.evaluate("copy", model=base, guidance_scale=guidance, merge=["sum"])
    (base / "scheduler" / "scheduler_config.json").write_text("{}")
    with pytest.raises(ValueError, match="other settings: base: weights was"):
        world.evaluate("copy", model=base, guidance_scale=guidance, merge=["sum"])
    assert world.calls == []


def test_prompts_of_an_address_are_fetched_once(world, tmp_path):
    (tmp_path / "test.txt").write_text("a cat\na dog\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/test.txt"
    arguments = {"loras": {}, "prompts": {"words": address}}
    world.evaluate("fetched", **arguments)
    server.shutdown()
    server.server_close()
    summary = world.evaluate("fetched", **arguments)
    assert summary["settings"]["benchmarks"]["words"]["source"] == address and world.calls == [2]
    with pytest.raises(OSError, match="downloading .* failed"):
        world.evaluate("fetched", **{**arguments, "prompts": {"words": address.replace("test", "train")}})


def test_processes_that_would_not_find_each_other_are_refused(world, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but on a CPU .* only with `use_cpu`"):
        world.evaluate("lonely", use_cpu=False)


# What people and programs read


class Page(HTMLParser):
    def __init__(self, file: Path):
        super().__init__()
        self.images, self.links, self.text = [], [], []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "a":
            self.links.append(dict(attrs)["href"])

    def handle_data(self, data):
        self.text.append(data)


def test_pages(world, whole):
    index, page = Page(whole / "index.html"), Page(whole / "words.html")
    assert index.links == ["words.html"] and page.links == ["index.html"]
    assert "base, guidance 3" in index.text and "brightness" in index.text and not index.images
    assert len(page.images) == 30
    for image in page.images:
        assert (whole / unquote(image["src"])).is_file() and image["loading"] == "lazy" and image["width"] == "16"
    models = ["base, guidance 1", "base, guidance 3", "student", "other", "merge_sum", "merge_mean"]
    assert [image["alt"] for image in page.images[12:18]] == [f"{model}: {PROMPTS[2]}" for model in models]
    assert f"{PROMPTS[2]} " in page.text and "<b>house" not in (whole / "words.html").read_text()
    row = json.loads((whole / "summary.json").read_text())["results"][0]
    scores = [json.loads(line) for line in (whole / "metadata.jsonl").read_text().splitlines()]
    mean = sum(row["brightness"] for row in scores if row["model"] == models[0]) / 5
    assert row["mean"] == pytest.approx(mean) and f" brightness {scores[0]['brightness']:.3g}" in page.text
    text = "".join(file.read_text() for file in whole.glob("*.*"))
    assert str(world.folder) not in text and not re.search(r"(src|href)=\"(/|http|file)", text)


def test_the_folder_is_a_dataset(whole, tmp_path):
    images = load_dataset("imagefolder", data_dir=str(whole), split="train", cache_dir=str(tmp_path))
    rows = load_dataset("json", data_files=str(whole / "metadata.jsonl"), split="train", cache_dir=str(tmp_path))
    assert rows.column_names == [
        *("file_name", "model", "benchmark", "prompt", "seed", "guidance_scale"),
        "brightness",
        *("image_brightness", "image_contrast", "image_saturation", "image_sharpness", "image_diversity"),
    ]
    assert len(images) == len(rows) == 30 and images.column_names == ["image", *rows.column_names[1:]]
    by_seed = {(row["model"], row["seed"]): row for row in rows}
    for row in images:
        pixels = np.asarray(row["image"], dtype=np.float64) / 255
        own = by_seed[row["model"], row["seed"]]
        assert row["prompt"] == own["prompt"] and row["brightness"] == pytest.approx(pixels.mean(), abs=1e-4)


def test_scores_go_on_the_card(world, whole, process, tmp_path):
    folder, files, _ = process
    card, record = files["README.md"].decode(), RunRecord.load(folder)
    assert render_card(record).content == card
    assert_reads_well(card)
    (score,) = record.benchmarks
    summary = json.loads((whole / "summary.json").read_text())
    values = {row["model"]: row["value"] for row in summary["results"]}
    assert (
        score.value == values["student"]
        and score.num_images == 5
        and list(score.base.values())
        == [
            values["base, guidance 1"],
            values["base, guidance 3"],
        ]
    )
    base = " | ".join(f"{value:.3f}" for value in score.base.values())
    assert "| benchmark | score | base, guidance 1 | base, guidance 3 | **this LoRA** | images | prompts |" in card
    assert f"| words | brightness | {base} | **{score.value:.3f}** | 5 |" in card
    assert "On benchmarks, with 3 steps at 16 px, guidance 2:" in card
    # Five images of prompts on this machine are nothing to compare models by.
    results = render_card(record).data.eval_results
    assert {result.dataset_type for result in results} == {"me/held"} and len(results) == 2
    public = replace(score, origin=Origin("me/words", "me/words", repo_type="dataset"), num_images=30)
    results = render_card(replace(record, benchmarks=[public])).data.eval_results
    assert [
        (result.dataset_name, result.metric_value) for result in results if result.metric_name == "brightness"
    ] == [("words", round(score.value, 4))]
    assert len(results) == 3 and record.benchmark_settings["guidance_scale"] == GUIDANCE

    alone = render_card(replace(record, results={}, evaluation={}, grid=None)).content
    assert "- **How good:** scores on benchmarks; see" in alone and "Nothing was evaluated" not in alone
    assert "The scores are those of automatic reward functions" in alone and "| words | brightness |" in alone

    rows, _ = benchmark_scores(whole, read_lora(world.loras["other"]))
    assert rows[0].value == values["other"]
    with pytest.raises(
        ValueError, match="None of the models in .* has the weights of this LoRA: base, guidance 1, base"
    ):
        benchmark_scores(whole, read_lora(save_diffusers_lora(tmp_path / "new", *random_lora(seed=9))))
    with pytest.raises(
        ValueError, match="There are no results in .*Pass the `--output_dir` of `trl-diffusion-opd eval`"
    ):
        benchmark_scores(tmp_path, read_lora(folder))
