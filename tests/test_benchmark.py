# SPDX-License-Identifier: Apache-2.0
"""`trl-diffusion-opd eval`: what is drawn, how often, what is made of the scores, and what people and programs read."""

import json
import math
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

from trl_diffusion_opd import cli
from trl_diffusion_opd.benchmark import suites
from trl_diffusion_opd.benchmark.average import average, paper_table
from trl_diffusion_opd.benchmark.card import benchmark_scores
from trl_diffusion_opd.benchmark.contestants import choose_contestants
from trl_diffusion_opd.benchmark.drawing import Painter
from trl_diffusion_opd.benchmark.folder import ResultsFolder
from trl_diffusion_opd.benchmark.report import write_report
from trl_diffusion_opd.benchmark.run import evaluate
from trl_diffusion_opd.benchmark.suites import choose_benchmarks, load_rows, picture_seed, positions
from trl_diffusion_opd.card import render_card
from trl_diffusion_opd.convert import convert_lora
from trl_diffusion_opd.loading import check_pipeline
from trl_diffusion_opd.lora_files import read_lora
from trl_diffusion_opd.record import RunRecord
from trl_diffusion_opd.rewards.geneval_prompts import geneval_prompts

from .hub_server import ROOT, HubServer, run
from .space_app import BASE, TEACHERS
from .test_card import assert_reads_well, example_record
from .test_geneval import save_tiny_models
from .tiny import random_lora, save_diffusers_lora, save_peft_lora, tiny_pipeline


PROMPTS = ["a red circle", "two blue squares", "a boat & a <b>house</b>", "a tree at night", "a cat"]
REWARDS = """
from pathlib import Path

def brightness(images, prompts, **columns):
    with open(Path(__file__).with_name("calls"), "a") as file:
        file.write(f"{len(images)} ")
    return images.mean((1, 2, 3)).tolist()

def picky(images, prompts, **columns):
    return [None if "boat" in prompt else 0.25 for prompt in prompts]

def broken(images, prompts, **columns):
    raise RuntimeError("no judge today")
"""
STEPS, GUIDANCE, LENGTH, SIZE = 3, 2.0, 16, 16


class World:
    """A tiny base, two LoRAs in the two formats, prompts, and rewards that count their calls."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.base = folder / "base"
        with torch.random.fork_rng(devices=[]):
            tiny_pipeline().save_pretrained(self.base)
        save_diffusers_lora(folder / "student", *random_lora(seed=1, scale=0.3))
        save_peft_lora(folder / "other", *random_lora(rank=2, alpha=3, seed=2, scale=0.3))
        (folder / "prompts.txt").write_text("\n".join(PROMPTS))
        (folder / "rewards.py").write_text(REWARDS)
        self.loras = {"student": folder / "student", "other": folder / "other"}

    def reward(self, *names: str) -> dict:
        return {None: [f"{self.folder / 'rewards.py'}:{name}" for name in names]}

    def evaluate(self, name: str, **changes) -> dict:
        arguments = {
            "loras": self.loras,
            "benchmarks": ["words"],
            "prompts": {"words": str(self.folder / "prompts.txt")},
            "rewards": self.reward("brightness"),
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
            "max_sequence_length": LENGTH,
            "use_cpu": True,
            "output_dir": self.folder / name,
        }
        return evaluate(changes.pop("model", self.base), **{**arguments, **changes})

    @property
    def calls(self) -> list[int]:
        """Numbers of pictures that `brightness` was given since it was last asked."""
        file = self.folder / "calls"
        found = [int(word) for word in file.read_text().split()] if file.is_file() else []
        file.unlink(missing_ok=True)
        return found


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
        Path(file).write_bytes(b"half of a picture")
        os.kill(os.getpid(), signal.SIGKILL)
    save(image, file, **kwargs)

PIL.Image.Image.save = killed
cli.main(evaluation)
"""


@pytest.fixture(scope="module")
def process(world, whole):
    """A process that pushed a LoRA with its scores, then drew, and was killed while it wrote the seventh picture."""
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


def test_pictures_are_those_of_diffusers_with_the_same_noise(world, whole, tmp_path):
    pipe = StableDiffusion3Pipeline.from_pretrained(world.base)
    pipe.set_progress_bar_config(disable=True)
    for name, folder in world.loras.items():
        lora = folder if name == "student" else convert_lora(folder, tmp_path / name).parent
        pipe.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors", adapter_name=name)
    seeds = [picture_seed(42, "words", position) for position in range(5)]
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


def test_pictures_do_not_depend_on_batch_order_and_company(world, whole):
    world.evaluate("alone", loras={"student": world.loras["student"]}, base=False, batch_size=2)
    world.evaluate("alone", loras={"other": world.loras["other"]}, base=False, batch_size=3, merge=[])
    alone = pictures(world.folder / "alone")
    assert (
        world.calls == [5, 5]
        and len(alone) == 10
        and same(alone, {name: p for name, p in pictures(whole).items() if name in alone})
    )


def test_fewer_pictures_are_spread_and_more_have_other_noise(world, whole):
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
    assert done.stdout.count("| base, guidance 1 |") == 2, "one of the processes reports, in two tables"
    (out / "x").rename(out / "other")
    assert same(pictures(out), pictures(whole))
    shares = [sum(len(file.read_text().split("\n")) - 1 for file in out.rglob(f"*.{i}.jsonl")) for i in (0, 1)]
    assert sorted(shares) == [15, 15] and sum(world.calls) == 30
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
    save = ResultsFolder.save_picture
    monkeypatch.setattr(ResultsFolder, "save_picture", lambda *args: (saved.append(args[2:]), save(*args)))
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

    # A new reward scores the old pictures, and a new model joins the table.
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


def test_a_reward_whose_file_has_changed_is_another_one(world, tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(REWARDS)
    arguments = {"loras": {}, "rewards": {None: [f"{file}:picky"]}}
    summary = world.evaluate("judged", **arguments)
    file.write_text(REWARDS.replace("0.25", "0.5"))
    with pytest.raises(
        ValueError, match=r"benchmarks: words: functions: picky was [0-9a-f]{8} and is [0-9a-f]{8} now"
    ):
        world.evaluate("judged", **arguments)
    file.write_text(REWARDS)
    assert world.evaluate("judged", **arguments) == summary


def test_what_could_not_be_scored_is_scored_later(world, tmp_path):
    """A judge that answers once and then fails for a while; its first score is kept."""
    (tmp_path / "rewards.py").write_text(
        "from pathlib import Path\n"
        "def judge(images, prompts, **columns):\n"
        "    up = Path(__file__).with_name('up').exists()\n"
        "    with open(Path(__file__).with_name('asked'), 'a') as file:\n"
        "        file.write(''.join(f'{prompt}\\n' for prompt in prompts))\n"
        "    values = [1.0, float('-inf'), None, float('nan'), float('inf')]\n"
        "    return [0.5] * len(prompts) if up else values\n"
    )
    arguments = {"loras": {}, "rewards": {None: [f"{tmp_path / 'rewards.py'}:judge"]}}
    (result,) = world.evaluate("later", **arguments)["results"]
    assert (result["mean"], result["num_scored"], result["num_failed"]) == (1.0, 1, 4)
    assert "Infinity" not in (world.folder / "later" / "metadata.jsonl").read_text()
    (tmp_path / "up").touch()
    (result,) = world.evaluate("later", **arguments)["results"]
    assert (result["mean"], result["num_scored"], result["num_failed"]) == (0.6, 5, 0)
    world.evaluate("later", **arguments)
    assert (tmp_path / "asked").read_text().splitlines() == [*PROMPTS, *PROMPTS[1:]]


def test_metadata_that_is_not_genevals(world, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a cat", "metadata": "{\\"id\\": 3}"}\n')
    prompts = {"mine": str(tmp_path / "mine.jsonl")}
    summary = world.evaluate("metadata", loras={}, benchmarks=["mine"], prompts=prompts)
    assert summary["results"][0]["num_scored"] == 1 and world.calls == [1]


def test_one_reward_of_several_benchmarks_has_a_column_for_each(world):
    for name in ("one", "two"):
        (world.folder / f"{name}.txt").write_text(f"a {name}\n")
    prompts = {name: str(world.folder / f"{name}.txt") for name in ("one", "two")}
    rewards = world.reward("brightness")
    choice = {"loras": {}, "benchmarks": ["one", "two"], "prompts": prompts, "rewards": rewards}
    world.evaluate("columns", **choice)
    table = (world.folder / "columns" / "table.md").read_text()
    assert "## one\n\n| model | brightness |" in table and "## two\n\n| model | brightness |" in table
    world.evaluate("shape_columns", model=BASE, num_images=2, max_sequence_length=10, **{
        **choice, "benchmarks": ["shapes"], "prompts": None,
    })  # fmt: skip
    table = (world.folder / "shape_columns" / "table.md").read_text()
    assert "| model | geneval: brightness | ocr: brightness | aesthetic: brightness |" in table
    assert "geneval: brightness 2 (" in table and world.calls == [1, 1, 2, 2, 2]


def test_a_large_base_draws_512_pixels_by_default(world, tmp_path):
    pipe = StableDiffusion3Pipeline.from_pretrained(world.base)
    large = type(pipe.transformer).from_config(
        {**pipe.transformer.config, "sample_size": 512, "pos_embed_max_size": 128}
    )
    pipe.register_modules(transformer=large)
    pipe.save_pretrained(tmp_path / "large")
    options = {"num_inference_steps": 1, "device": torch.device("cpu"), "dtype": torch.float32}
    for model, resolution in ((world.base, SIZE), (tmp_path / "large", 512)):
        painter = Painter(model, check_pipeline(model), {}, resolution=None, max_sequence_length=LENGTH, **options)
        assert (painter.resolution, painter.latent_shape) == (resolution, (4, resolution // 2, resolution // 2))


def test_processes_that_would_not_find_each_other_are_refused(world, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but on a CPU .* only with `use_cpu`"):
        world.evaluate("lonely", use_cpu=False)


# Scores


def test_failed_scores_are_counted_and_a_judge_that_fails_does_not_stop_the_others(world):
    with pytest.raises(
        ValueError, match=r"broken: no judge today \(All else is in '.*failures'. The same command goes"
    ):
        world.evaluate("failures", loras={}, rewards=world.reward("broken", "picky", "brightness"))
    summary = json.loads((world.folder / "failures" / "summary.json").read_text())
    results = {row["reward"]: row for row in summary["results"]}
    assert results["picky"] == {
        "model": "base",
        "benchmark": "words",
        "reward": "picky",
        "built_in": False,
        "mean": 0.25,
        "value": 0.25,
        "standard_error": 0.0,
        "num_images": 5,
        "num_scored": 4,
        "num_failed": 1,
    }
    assert (results["broken"]["mean"], results["broken"]["num_scored"], results["broken"]["num_failed"]) == (
        None,
        0,
        0,
    )
    assert results["brightness"]["num_scored"] == 5 and world.calls == [5]
    lines = (world.folder / "failures" / "base" / "words" / "picky.0.jsonl").read_text().split("\n")[1:]
    assert lines[2] == '{"image": "00003.png", "score": null}' and lines[3] == '{"image": "00004.png", "score": 0.25}'
    table = (world.folder / "failures" / "table.md").read_text()
    assert "| base | – | 0.250 | 0." in table
    assert "Scoring failed: picky on 1 of 5 pictures of base (words)." in table
    assert "Not scored yet: broken on 5 of 5 pictures of base (words)." in table


def test_built_in_rewards_on_real_pictures(world, tmp_path):
    """OCR with its real model, and GenEval's strict judgement by a detector that sees dogs everywhere."""
    save_tiny_models(tmp_path)
    (tmp_path / "ocr.txt").write_text('a sign that reads "hello"\na sign without words\n')
    demands = [("dog", "single_object"), ("cat", "single_object"), ("dog", "colors")]
    rows = [
        {"tag": tag, "include": [{"class": name, "count": 1}], "prompt": f"a photo of a {name}"}
        for name, tag in demands
    ]
    (tmp_path / "geneval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"model_name_or_path": str(tmp_path / "detector"), "clip_name_or_path": str(tmp_path / "clip")}
    summary = world.evaluate(
        "built_in",
        loras={},
        benchmarks=["geneval", "ocr"],
        prompts={name: str(next(tmp_path.glob(f"{name}.*"))) for name in ("geneval", "ocr")},
        rewards=None,
        reward_options={"geneval": {**options, "shortest_edge": 64}},
    )
    geneval, ocr = summary["results"]
    assert geneval["geneval"] == {
        "single_object": 0.5,
        "colors": 1.0,
        "score": 0.75,
        "accuracy": pytest.approx(2 / 3),
        "num_failed": 0,
    }
    assert (ocr["mean"], ocr["num_scored"], ocr["num_failed"]) == (0.0, 1, 1)
    assert summary["table"] == {"base": {"GenEval": pytest.approx(2 / 3), "OCR": 0.0}}
    assert summary["average"] == {"base": None}
    described = summary["settings"]["benchmarks"]["geneval"]["rewards"]["geneval"]
    assert described.startswith("geneval (clip_name_or_path=") and described.endswith("shortest_edge=64, strict=True)")
    table = (world.folder / "built_in" / "table.md").read_text()
    assert "| model | GenEval | OCR |" in table and "| base | 0.667 | 0.000 |" in table and "Average" not in table
    assert "| base | 0.500 | – | – | 1.000 | – | – | 0.750 | 0.667 |" in table


def test_shapes(world):
    summary = world.evaluate(
        "shapes",
        model=BASE,
        loras={"aesthetic": TEACHERS / "aesthetic"},
        benchmarks=["shapes"],
        prompts=None,
        rewards=None,
        num_images=8,
        num_inference_steps=6,
        guidance_scale=1.0,
        max_sequence_length=10,
    )
    rows = {(row["model"], row["benchmark"]): row for row in summary["results"]}
    assert rows["aesthetic", "shapes_aesthetic"]["mean"] > rows["base", "shapes_aesthetic"]["mean"] + 0.3
    assert rows["aesthetic", "shapes_ocr"]["mean"] < rows["base", "shapes_ocr"]["mean"] - 0.3
    assert summary["settings"]["resolution"] == 32 and all(row["num_scored"] == 8 for row in rows.values())
    table = (world.folder / "shapes" / "table.md").read_text()
    assert table.startswith("## Shapes\n\n| model | geneval | ocr | aesthetic |\n")
    # The paper's columns are of other judges.
    assert summary["table"] == {"base": {}, "aesthetic": {}}


# Table 1


def synthetic_results(folder: Path, scores: dict[str, dict[str, float]]) -> ResultsFolder:
    """A folder as an evaluation of the paper's benchmarks leaves it, with one picture each."""
    results = ResultsFolder(folder)
    columns = dict(
        zip(paper_table().columns, ("geneval", "ocr", *suites.BENCHMARKS["drawbench"].rewards), strict=True)
    )
    factors = {"PickScore": 26.0, "UnifiedReward": 5.0}
    benchmarks = {}
    for name in ("geneval", "ocr", "drawbench"):
        rewards = {reward: reward for reward in suites.BENCHMARKS[name].rewards}
        about = {"title": suites.BENCHMARKS[name].title, "num_images": 1, "num_prompts": 1, "rewards": rewards}
        benchmarks[name] = {**about, "origin": {"name": "here", "repo_type": "dataset"}, "prompts": "0" * 64}
        results.save_prompts(name, [{"prompt": "a\u2028b", "tag": "colors", "include": []}])
    models = {name: {"guidance_scale": 4.5, "weights": [], "origins": []} for name in scores}
    drawn = {"num_inference_steps": 40, "resolution": 512, "dtype": "bfloat16", "seed": 42}
    base = {"origin": {"name": "them/base"}, "weights": "ab" * 20}
    results.save_settings({"base": base, **drawn, "models": models, "benchmarks": benchmarks})
    for model, row in scores.items():
        for name in benchmarks:
            results.save_picture(torch.zeros(3, 4, 4), model, name, 0)
        for column, value in row.items():
            name = columns[column]
            benchmark = name if name in benchmarks else "drawbench"
            results.add_scores(model, benchmark, name, 0, {0: value / factors.get(column, 1.0)})
    return results


def test_average_of_the_paper_rows_by_its_rule():
    expected = ".507 .672 .673 .000 .566 .500 .619 .857 .821 .731 .934 .984".split()
    reference = paper_table()
    assert [f"{average(row):.3f}"[1:] for row in reference.rows.values()] == expected
    published = [.390, .601, .599, 0, .484, .473, .550, .698, .763, .715, .851, .929]  # fmt: skip
    assert list(reference.published.values()) == published and "2605.15055" in reference.source
    assert list(reference.rows)[3:5] == ["SD3.5-M (w/o CFG)", "SD3.5-M + CFG"]
    best = reference.rows["DiffusionOPD"]
    assert average({**best, "GenEval": 2.4}) == pytest.approx(average(best) + (2.4 - 0.96) / 0.72 / 8), "not clipped"
    assert average({name: value for name, value in best.items() if name != "OCR"}) is None
    assert average({**best, "more": 1.0}) == average(best)


def test_table_in_the_scale_and_the_order_of_the_paper(tmp_path):
    rows = paper_table().rows
    full, part = rows["DiffusionOPD"], {"PickScore": 22.5, "OCR": 0.5}
    summary = write_report(synthetic_results(tmp_path, {"student": full, "base": part}))
    assert summary["table"]["student"] == pytest.approx(full) and summary["average"]["base"] is None
    lines = (tmp_path / "table.md").read_text().split("\n")
    columns = "GenEval | OCR | PickScore | ClipScore | HPSv2.1 | Aesthetic | ImageReward | UnifiedReward"
    assert lines[0] == "## The paper's Table 1" and lines[2] == f"| model | {columns} | Average |"
    assert lines[4] == "| student | 0.960 | 0.940 | 23.990 | 0.297 | 0.342 | 6.150 | 1.500 | 3.500 | 0.984 |"
    assert lines[5] == "| base | – | 0.500 | 22.500 | – | – | – | – | – | – |"
    text = "\n".join(lines)
    assert "GenEval 1; OCR 1; PickScore 1;" in text
    assert "Not scored yet: geneval on 1 of 1 pictures of base (geneval); clipscore on 1 of 1" in text
    assert f"| model | {columns} | Average, by its rule | Average, as printed |" in text
    assert "| Aes Teacher | 0.49 | 0.59 | 24.02 | 0.295 | 0.346 | 6.22 | 1.498 | 3.48 | 0.857 | 0.698 |" in text
    assert "40 steps of the first-order ODE, 512 px, bfloat16, seed 42; base them/base." in text
    assert summary["reference"]["average"]["Cascade NFT"] == pytest.approx(0.934, abs=5e-4)


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
    assert "| benchmark | score | base, guidance 1 | base, guidance 3 | **this LoRA** | pictures | prompts |" in card
    assert f"| words | brightness | {base} | **{score.value:.3f}** | 5 |" in card
    assert "On benchmarks, with 3 steps at 16 px, guidance 2:" in card
    results = render_card(record).data.eval_results
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


# What is chosen


def test_benchmarks():
    geneval, drawbench = choose_benchmarks(["geneval", "drawbench"], {"geneval": "generated"}, {"drawbench": ["ocr"]})
    assert geneval.rewards == ("geneval",) and drawbench.rewards == ("ocr",)
    assert drawbench.source.endswith("/NVlabs/DiffusionNFT/main/dataset/drawbench/test.txt")
    rows, origin = load_rows(geneval)
    assert len(rows) == 2212 and len({row["prompt"] for row in rows}) == 553 and origin.name == "GenEval's rules"
    first = geneval_prompts()[0]
    assert [row["prompt"] for row in rows[:5]] == [first["prompt"]] * 4 + [geneval_prompts()[1]["prompt"]]
    assert json.loads(rows[0]["metadata"]) == {"tag": "single_object", "include": first["include"]}
    assert [each.name for each in choose_benchmarks(["shapes"])] == [
        *("shapes_geneval", "shapes_ocr", "shapes_aesthetic"),
    ]


def test_shapes_need_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(suites, "__file__", str(tmp_path / "trl_diffusion_opd" / "benchmark" / "suites.py"))
    with pytest.raises(ValueError, match="'shapes' is part of the repository, not of the installed package"):
        choose_benchmarks(["shapes"])


def test_rows_of_the_table():
    rows = choose_contestants(["a", "b"], {None: [2.0], "base": [1.0, 4.5], "b": [1.0]}, merge=["mean", "sum"])
    assert [(row.name, row.guidance_scale, row.loras, row.weight) for row in rows] == [
        ("base, guidance 1", 1.0, (), 1.0),
        ("base, guidance 4.5", 4.5, (), 1.0),
        ("a", 2.0, ("a",), 1.0),
        ("b", 1.0, ("b",), 1.0),
        ("merge_mean", 2.0, ("a", "b"), 0.5),
        ("merge_sum", 2.0, ("a", "b"), 1.0),
    ]
    assert [row.guidance_scale for row in choose_contestants(["a"], {"a": [1.0]})] == [4.5, 1.0]
    rows = choose_contestants(["a", "b", "c"], {None: [1.0, 1.0]}, base=False, merge=["sum=a,c", "mean"])
    assert [(row.name, row.loras, row.weight) for row in rows[3:]] == [
        ("merge_sum", ("a", "c"), 1.0),
        ("merge_mean", ("a", "b", "c"), pytest.approx(1 / 3)),
    ]


def test_an_option_that_comes_twice_is_one_longer_option(world):
    (world.folder / "two.txt").write_text("a dog\n")
    words = ["--lora", f"a={world.loras['student']}", "--lora", f"b={world.loras['other']}", "--benchmarks", "one"]
    words += ["--benchmarks", "two", "--merge", "sum", "--merge", "mean=a,b", "--guidance_scale", "1", "--use_cpu"]
    words += ["--guidance_scale", "base=2", "--rewards", *world.reward("brightness")[None], "--num_images", "1"]
    for name in ("one", "two"):
        words += ["--prompts", f"{name}={world.folder / 'two.txt'}"]
    cli.main(["eval", "--model", str(world.base), "--output_dir", str(world.folder / "twice"), *map(str, words)])
    settings = ResultsFolder(world.folder / "twice").load_settings()
    assert list(settings["models"]) == ["base", "a", "b", "merge_sum", "merge_mean"]
    assert list(settings["benchmarks"]) == ["one", "two"] and settings["models"]["base"]["guidance_scale"] == 2
    assert sum(world.calls) == 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the following arguments are required: --model. See `trl-diffusion-opd eval --help`"),
        ("--model {base} --benchmarks words", "There is no benchmark 'words'. The benchmarks are geneval, ocr, drawb"),
        ("--model {base} --benchmarks ocr --prompts drawbench=x", "`--prompts` names 'drawbench', which is not among"),
        ("--model {base} --benchmarks ocr --prompts x.txt", "`--prompts x.txt` does not say of what"),
        ("--model {base} --prompts ocr=a ocr=b", "`--prompts` has two sources for 'ocr'. Keep one of them."),
        (
            "--model {base} --prompts ocr=generated",
            "Only the prompts of geneval can be 'generated', not those of 'ocr'",
        ),
        (
            "--model {base} --benchmarks ocr --prompts ocr={here}/no.txt",
            "the prompt file '{here}/no.txt' does not exist",
        ),
        (
            "--model {base} --benchmarks ocr --rewards ocr=orc",
            "There is no reward 'orc'. The built-in ones are geneval",
        ),
        (
            "--model {base} --benchmarks geneval --prompts geneval={txt}",
            "`geneval` of task 'geneval' needs the column",
        ),
        ("--model {base} --lora a={here}/x b={here}/x --merge mean", "the local path '{here}/x' does not exist"),
        ("--model {base} --lora {here}/x other/x", "Two LoRAs are called 'x'. Name them as `--lora one={here}/x two="),
        ("--model {base} --lora base={here}/x", "A LoRA cannot be called 'base'"),
        ("--model {base} --lora a/b={here}/x", "A LoRA cannot be called 'a/b'"),
        ("--model {base} --merge sum", "`--merge` adds LoRAs up and needs two or more of them"),
        ("--model {base} --merge ties", "`--merge` is one of sum, mean, or both, but not 'ties'"),
        (
            "--model {base} --lora a={txt} b={txt} --merge sum=a,c",
            "`--merge sum=a,c` names 'c', but the LoRAs are a, b",
        ),
        ("--model {base} --lora a={txt} b={txt} --merge sum=a", "`--merge` adds LoRAs up and needs two or more of"),
        ("--model {base} --lora a={txt} b={txt} --merge sum sum=a,b", "`--merge` has 'sum' twice"),
        ("--model {base} --no_base", "There is nothing to evaluate. Pass `--lora`, or leave out `--no_base`"),
        ("--model {base} --guidance_scale x=1", "`--guidance_scale` names 'x', but the models are base."),
        ("--model {base} --guidance_scale high", "`--guidance_scale high` must be numbers, or NAME=NUMBER"),
        ("--model {base} --reward_options ocr.x", "`--reward_options ocr.x` must be REWARD.OPTION=VALUE"),
        ("--model {base} --reward_options ocr.x=[", "`--reward_options ocr.x=[`: '[' is no value in YAML"),
        ("--model {base} --benchmarks index", "A benchmark cannot be called 'index'"),
        ("--model {base} --benchmarks ../up", "A benchmark cannot be called '../up'"),
        ("--model {base} {ocr} --reward_options hpsv2.dtype=x", "names 'hpsv2', but the rewards are ocr."),
        ("--model {base} {ocr} --reward_options ocr.x=1", "`--reward_options` of 'ocr': "),
        ("--model {base} --num_images 0", "`--num_images` must be at least 1, but is 0"),
        ("--model {base} --num_inference_steps 0", "`--num_inference_steps` must be at least 1 and"),
        (
            "--model {base} {ocr} --resolution 17",
            "`height` must be a multiple of 4 (VAE factor x patch size), but is 17",
        ),
        ("--model {base} {ocr} --lora {shapes}", "was trained for another base model"),
        ("--model {here}/none {ocr}", "there is no folder '{here}/none'"),
    ],
)
def test_bad_input_is_told_in_one_line(world, capsys, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("HF_HUB_VERBOSITY", "error")
    txt = world.folder / "prompts.txt"
    known = {"base": world.base, "here": world.folder, "txt": txt, "shapes": TEACHERS / "ocr"}
    known["ocr"] = f"--benchmarks ocr --prompts ocr={txt}"
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["eval", *words.format(**known).split()] + (["--use_cpu"] if words else []))
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit_info.value.code == 2 and error.startswith("error: ") and message.format(**known) in error, error
    assert not (tmp_path / "evaluation").exists()


def test_help_and_defaults_agree(capsys):
    import inspect

    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    parameters = inspect.signature(evaluate).parameters
    for name in set(parameters) - {"model", "loras", "base"}:
        assert f"--{name} " in text or f"--{name}]" in text, name
    for name in ("num_inference_steps", "guidance_scale", "max_sequence_length", "seed", "batch_size", "output_dir"):
        default = f"{parameters[name].default}"
        assert re.search(rf"--{name} .*?by default (\./)?{re.escape(default)}\b", text), name
    assert "accelerate launch -m trl_diffusion_opd eval" in text and math.isclose(
        parameters["guidance_scale"].default, 4.5
    )
