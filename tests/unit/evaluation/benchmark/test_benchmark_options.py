# SPDX-License-Identifier: Apache-2.0
"""`trl-diffusion-opd eval`: what is chosen, by default and by its options, and how bad ones are told."""

import dataclasses
import json
import re

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from tests.support.benchmark_world import LENGTH, SIZE, World
from tests.support.space_app import TEACHERS
from trl_diffusion_opd import cli
from trl_diffusion_opd.evaluation.benchmark.arguments import EvaluationArguments
from trl_diffusion_opd.evaluation.benchmark.drawing import EntrySampler
from trl_diffusion_opd.evaluation.benchmark.entries import choose_entries
from trl_diffusion_opd.evaluation.benchmark.folder import ResultsFolder
from trl_diffusion_opd.evaluation.benchmark.suites import choose_benchmarks, load_rows
from trl_diffusion_opd.models.loading import check_pipeline
from trl_diffusion_opd.rewards.geneval_prompts import geneval_prompts


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("benchmark"))


def test_benchmarks():
    geneval, drawbench = choose_benchmarks(["geneval", "drawbench"], {"geneval": "generated"}, {"drawbench": ["ocr"]})
    assert geneval.rewards == ("geneval",) and drawbench.rewards == ("ocr",)
    assert drawbench.source.endswith("/NVlabs/DiffusionNFT/main/dataset/drawbench/test.txt")
    rows, origin = load_rows(geneval)
    assert len(rows) == 2212 and len({row["prompt"] for row in rows}) == 553 and origin.name == "GenEval's rules"
    first = geneval_prompts()[0]
    assert [row["prompt"] for row in rows[:5]] == [first["prompt"]] * 4 + [geneval_prompts()[1]["prompt"]]
    assert json.loads(rows[0]["metadata"]) == {"tag": "single_object", "include": first["include"]}


def test_rows_of_the_table():
    rows = choose_entries(["a", "b"], {None: [2.0], "base": [1.0, 4.5], "b": [1.0]}, merge=["mean", "sum"])
    assert [(row.name, row.guidance_scale, row.loras, row.weight) for row in rows] == [
        ("base, guidance 1", 1.0, (), 1.0),
        ("base, guidance 4.5", 4.5, (), 1.0),
        ("a", 2.0, ("a",), 1.0),
        ("b", 1.0, ("b",), 1.0),
        ("merge_mean", 2.0, ("a", "b"), 0.5),
        ("merge_sum", 2.0, ("a", "b"), 1.0),
    ]
    assert [row.guidance_scale for row in choose_entries(["a"], {"a": [1.0]}, default_scale=4.5)] == [4.5, 1.0]
    rows = choose_entries(["a", "b", "c"], {None: [1.0, 1.0]}, base=False, merge=["sum=a,c", "mean"])
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
        (
            "--model {base} --benchmarks words",
            "There is no benchmark 'words'. The benchmarks are geneval, geneval2, ocr, drawb",
        ),
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
        ("--model {base} --merge sum", "`--merge` merges LoRAs and needs two or more of them"),
        ("--model {base} --merge soup", "`--merge` takes sum, mean, ties, dare, or several of them, but not 'soup'"),
        ("--model {base} --lora merge_ties={here}/x", "A LoRA cannot be called 'merge_ties'"),
        (
            "--model {base} --lora a={txt} b={txt} --merge sum=a,c",
            "`--merge sum=a,c` names 'c', but the LoRAs are a, b",
        ),
        ("--model {base} --lora a={txt} b={txt} --merge sum=a", "`--merge` merges LoRAs and needs two or more of"),
        ("--model {base} --lora a={txt} b={txt} --merge sum sum=a,b", "`--merge` has 'sum' twice"),
        ("--model {base} --no_base", "There is nothing to evaluate. Pass `--lora`, or leave out `--no_base`"),
        ("--model {base} --guidance_scale x=1", "`--guidance_scale` names 'x', but the models are base."),
        ("--model {base} --guidance_scale high", "`--guidance_scale high` must be finite numbers, or NAME=NUMBER"),
        ("--model {base} --reward_options ocr.x", "`--reward_options ocr.x` must be REWARD.OPTION=VALUE"),
        ("--model {base} --reward_options ocr.x=[", "`--reward_options ocr.x=[`: '[' is no value in YAML"),
        ("--model {base} --benchmarks index", "A benchmark cannot be called 'index'"),
        ("--model {base} --benchmarks ../up", "A benchmark cannot be called '../up'"),
        ("--model {base} {ocr} --reward_options hpsv2.dtype=x", "names 'hpsv2', but the rewards are ocr."),
        ("--model {base} {ocr} --reward_options ocr.x=1", "`--reward_options` of 'ocr': "),
        ("--model {base} --num_images 0", "`num_images` must be at least 1, but is 0"),
        ("--model {base} --num_inference_steps 0", "`num_inference_steps` must be at least 1, but is 0"),
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


def test_help_has_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    fields = dataclasses.fields(EvaluationArguments)
    assert len(fields) == 18
    for field in fields:
        assert f" --{field.name} " in text and field.metadata["help"].split(".")[0] in text, field.name
    for name, default in {
        "seed": 42,
        "batch_size": 8,
        "output_dir": "evaluation",
    }.items():
        assert re.search(rf" --{name} [^()]*\(default: {re.escape(str(default))}\)", text), name
    assert "--lora [NAME=]SOURCE" in text and "--no_base" in text and "--config RECIPE" in text
    assert "accelerate launch -m trl_diffusion_opd eval" in text


def test_a_large_base_draws_512_pixels_by_default(world, tmp_path):
    pipe = StableDiffusion3Pipeline.from_pretrained(world.base)
    large = type(pipe.transformer).from_config(
        {**pipe.transformer.config, "sample_size": 512, "pos_embed_max_size": 128}
    )
    pipe.register_modules(transformer=large)
    pipe.save_pretrained(tmp_path / "large")
    options = {"num_inference_steps": 1, "device": torch.device("cpu"), "dtype": torch.float32}
    for model, resolution in ((world.base, SIZE), (tmp_path / "large", 512)):
        sampler = EntrySampler(
            model, *check_pipeline(model), {}, resolution=None, max_sequence_length=LENGTH, **options
        )
        assert (sampler.resolution, sampler.sampler.latent_shape) == (
            resolution,
            (4, resolution // 2, resolution // 2),
        )
