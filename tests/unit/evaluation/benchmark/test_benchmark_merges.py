# SPDX-License-Identifier: Apache-2.0
"""`trl-diffusion-opd eval --merge`: TIES and DARE are rows as the others, and what cannot be merged is told."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from tests.support.benchmark_world import GUIDANCE, LENGTH, PROMPTS, SIZE, STEPS, World
from tests.support.space_app import TEACHERS
from tests.support.tiny import random_lora, save_diffusers_lora
from trl_diffusion_opd import cli
from trl_diffusion_opd.evaluation.benchmark import settings
from trl_diffusion_opd.evaluation.benchmark.entries import choose_entries
from trl_diffusion_opd.evaluation.benchmark.suites import image_seed
from trl_diffusion_opd.lora.merging import merge_updates


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("merges"))


@pytest.fixture(scope="module")
def merged(world):
    """The folder of an evaluation of TIES at two guidance scales, and of DARE."""
    scales = {None: [GUIDANCE], "merge_ties": [GUIDANCE, 1.5]}
    world.evaluate("merged", base=False, merge=["ties", "dare=other,student"], guidance_scale=scales)
    assert world.calls == [5] * 5
    return world.folder / "merged"


def pictures(folder):
    return np.stack(
        [np.asarray(PIL.Image.open(file), dtype=np.int16) for file in sorted((folder / "words").glob("*.png"))]
    )


def same(one, other):
    """Equal but for rounding."""
    difference = np.abs(one - other)
    return difference.max() <= 1 and (difference > 0).mean() < 0.01


def ties(updates):
    """The fifth of each update with the largest entries; of the two at a place the larger, or the mean if they agree."""
    one, other = (np.where(np.abs(u) >= np.sort(np.abs(u), axis=None)[-round(u.size / 5)], u, 0) for u in updates)
    larger = np.where(np.abs(one) > np.abs(other), one, other)
    return np.where(one * other > 0, (one + other) / 2, larger)


def test_rows():
    rows = choose_entries(["a", "b", "c"], {None: [2.0], "merge_ties": [1.0, 3.0]}, merge=["dare", "ties=c,a", "mean"])
    assert [(row.name, row.guidance_scale, row.loras, row.weight, row.method) for row in rows[4:]] == [
        ("merge_dare", 2.0, ("a", "b", "c"), 1.0, "dare"),
        ("merge_ties, guidance 1", 1.0, ("c", "a"), 1.0, "ties"),
        ("merge_ties, guidance 3", 3.0, ("c", "a"), 1.0, "ties"),
        ("merge_mean", 2.0, ("a", "b", "c"), pytest.approx(1 / 3), None),
    ]


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_images_are_those_of_a_base_with_the_merge_in_its_weights(world, merged, method):
    models = json.loads((merged / "summary.json").read_text())["settings"]["models"]
    pipe = StableDiffusion3Pipeline.from_pretrained(world.base)
    pipe.set_progress_bar_config(disable=True)
    student = load_file(world.loras["student"] / "pytorch_lora_weights.safetensors")
    other = load_file(world.loras["other"] / "adapter_model.safetensors")
    weights = dict(pipe.transformer.named_parameters())
    modules = [key.removesuffix(".lora_A.weight") for key in student if key.endswith(".lora_A.weight")]
    assert len(modules) == 15
    for module in modules:
        own = []
        for state, scale in ((student, 8 / 4), (other, 3 / 2)):
            prefix = "" if state is student else "base_model.model."
            name = prefix + (module if state is student else module.removeprefix("transformer."))
            a, b = (state[f"{name}.lora_{kind}.weight"].double().numpy() for kind in "AB")
            own.append(scale * b @ a)
        if method == "dare":
            # What is dropped is tested where it is drawn. Of two LoRAs, that with the smaller fingerprint comes first.
            own = own if models["student"]["weights"] < models["other"]["weights"] else own[::-1]
            tensors = [torch.from_numpy(each).float() for each in own]
            update = merge_updates(tensors, "dare", seed=module.removeprefix("transformer.")).numpy()
        else:
            update = ties(own)
        u, s, vh = np.linalg.svd(update)
        update = (u[:, :6] * s[:6]) @ vh[:6]  # of rank 4 + 2
        weights[f"{module.removeprefix('transformer.')}.weight"].data += torch.from_numpy(update).float()
    noise = torch.stack(
        [
            torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(image_seed(42, "words", position)))
            for position in range(5)
        ]
    )
    size = {"height": SIZE, "width": SIZE, "max_sequence_length": LENGTH, "num_inference_steps": STEPS}
    rows = [name for name in models if name.startswith(f"merge_{method}")]
    assert len(rows) == (2 if method == "ties" else 1)
    for name in rows:
        guidance = models[name]["guidance_scale"]
        images = pipe(PROMPTS, guidance_scale=guidance, latents=noise, output_type="pt", **size).images
        drawn = (images * 255).round().permute(0, 2, 3, 1).numpy()
        assert [other for other in models if same(drawn, pictures(merged / other))] == [name]


def test_tables_and_settings(merged):
    summary = json.loads((merged / "summary.json").read_text())
    models = summary["settings"]["models"]
    assert list(models) == ["student", "other", "merge_ties, guidance 2", "merge_ties, guidance 1.5", "merge_dare"]
    assert models["merge_dare"]["merge"] == "DARE, drop 0.5" and "merge" not in models["student"]
    assert models["merge_dare"]["weights"] == sorted(models["student"]["weights"] + models["other"]["weights"])
    assert [row["num_scored"] for row in summary["results"]] == [5] * 5
    table, page = (merged / "table.md").read_text(), (merged / "words.html").read_text()
    student, other = (f"{merged.parent.name}/{name}" for name in ("student", "other"))
    assert f"| merge_ties, guidance 1.5 | TIES, density 0.2 ({student} + {other}) | 1.5 |" in table
    assert f"| merge_dare | DARE, drop 0.5 ({other} + {student}) | 2 |" in table
    assert page.count('alt="merge_dare: ') == 5


def test_what_is_dropped_does_not_depend_on_order_or_company(world, merged):
    """And not on what was drawn before: a merge alone, of LoRAs in another order, goes on in the same folder."""
    copy = world.folder / "going on"
    shutil.copytree(merged, copy)
    before = pictures(copy / "merge_dare")
    for position in (2, 5):
        (copy / "merge_dare" / "words" / f"{position:05d}.png").unlink()
    loras = dict(reversed(world.loras.items()))
    torch.manual_seed(3)
    summary = world.evaluate("going on", loras=loras, base=False, merge="dare=student,other", batch_size=1)
    assert same(pictures(copy / "merge_dare"), before) and world.calls == []
    assert [row["num_scored"] for row in summary["results"]] == [5] * 5


def test_another_merge_is_refused(world, merged, monkeypatch):
    copy = world.folder / "refused"
    shutil.copytree(merged, copy)
    changed = shutil.copytree(world.loras["other"], world.folder / "changed")
    tensors = load_file(changed / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, changed / "adapter_model.safetensors")
    loras = {"student": world.loras["student"], "third": changed}
    with pytest.raises(
        ValueError, match=r"other settings: models: merge_dare: weights was \w{8} \+ \w{8} and is \w{8}"
    ):
        world.evaluate("refused", loras=loras, base=False, merge="dare")
    monkeypatch.setitem(settings._MERGES, "dare", "DARE, drop 0.9")
    with pytest.raises(ValueError, match="merge_dare: merge was DARE, drop 0.5 and is DARE, drop 0.9 now"):
        world.evaluate("refused", base=False, merge="dare")
    assert world.calls == []


@pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor")
@pytest.mark.parametrize(
    ("options", "merge", "message"),
    [
        (
            {"use_dora": True},
            "ties",
            "The LoRA 'more' has magnitudes (DoRA), but only updates `B A` of weights can be",
        ),
        (
            {"use_dora": True},
            "mean",
            "can be merged into 'merge_mean'. Name the other LoRAs: `--merge HOW=NAME,NAME`.",
        ),
        ({"lora_bias": True}, "dare", "The LoRA 'more' has biases, but only updates"),
        ({}, "ties=student", "`--merge` merges LoRAs and needs two or more of them"),
        ({}, "ssr", "`--merge` takes sum, mean, ties, dare, or several of them, but not 'ssr'."),
        ({}, "dare=student,x", "`--merge dare=student,x` names 'x', but the LoRAs are student, other, more."),
    ],
)
def test_what_cannot_be_merged_is_told_in_one_line(world, tmp_path, capsys, options, merge, message):
    more = save_diffusers_lora(tmp_path / "more", *random_lora(seed=5, **options))
    words = ["--model", world.base, "--lora", *world.loras.values(), more, "--merge", merge, "--benchmarks", "words"]
    words += ["--prompts", f"words={world.folder / 'prompts.txt'}", "--rewards", world.reward("brightness")[None][0]]
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["eval", *map(str, words), "--use_cpu", "--output_dir", str(tmp_path / "out")])
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit_info.value.code == 2 and error.startswith("error: ") and message in error, error
    assert not (tmp_path / "out").exists()


def test_a_lora_of_another_base_is_refused(world):
    loras = {**world.loras, "shapes": TEACHERS / "ocr"}
    with pytest.raises(ValueError, match="LoRA 'shapes' .* was trained for another base model"):
        world.evaluate("shapes", loras=loras, merge="dare")
    assert not (world.folder / "shapes").exists()


@pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor")
def test_biases_and_others_than_the_merged_are_no_matter(world, tmp_path):
    """The sum activates the LoRAs themselves, and DoRA may be a row beside merges of others."""
    biased = save_diffusers_lora(tmp_path / "biased", *random_lora(seed=5, lora_bias=True))
    dora = save_diffusers_lora(tmp_path / "dora", *random_lora(seed=6, use_dora=True))
    loras = {**world.loras, "biased": biased, "dora": dora}
    merges = ["sum=student,biased", "ties=student,other"]
    summary = world.evaluate("beside", loras=loras, merge=merges, num_images=1, base=False)
    assert [row["model"] for row in summary["results"]][-2:] == ["merge_sum", "merge_ties"]
    assert sum(world.calls) == 6
