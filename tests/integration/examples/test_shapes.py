# SPDX-License-Identifier: Apache-2.0
"""The Shapes world and what is shipped of it: rules that judge rightly, a base and teachers that are what they say."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trl_diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer
from trl_diffusion_opd.data.prompt_sets import load_prompts
from trl_diffusion_opd.models.sampler import Policy


EXAMPLES = Path(__file__).parents[3] / "examples"
SHAPES = EXAMPLES / "shapes"
sys.path.insert(0, str(EXAMPLES))

from shapes.render import GLYPHS, WEB, Recipe, make_dataset, scene_picture  # noqa: E402
from shapes.rewards import REWARDS, VIEW, VIEW_FLOOR, geneval_partial, likeness, read_text  # noqa: E402
from shapes.world import COLOURS, LETTERS, NOUNS, TASKS, Counting, Scene, parse, prompts, split_of  # noqa: E402


SCORERS = {**REWARDS, "geneval_partial": geneval_partial}
TASK_OF = {"geneval_partial": "geneval"}


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("task, at_least", [("geneval", 0.97), ("ocr", 0.97), ("aesthetic", 0.6)])
def test_right_pictures_score_high_and_wrong_ones_low(task, at_least):
    pictures, captions = make_dataset(200, Recipe(tasks={task: 1.0}), seed=1)
    assert np.mean(REWARDS[task](to_tensor(pictures), captions)) > at_least
    others = [captions[(i + 67) % 200] for i in range(200)]  # the captions of other pictures
    wrong = [
        score
        for score, a, b in zip(REWARDS[task](to_tensor(pictures), others), captions, others, strict=True)
        if a != b
    ]
    assert np.mean(wrong) < (0.05 if task != "aesthetic" else at_least)
    blank = torch.full((4, 3, 32, 32), 0.9)
    assert np.mean(REWARDS[task](blank, captions[:4])) < 0.05


def test_part_of_what_was_asked_for_is_part_of_the_score():
    pictures, captions = make_dataset(300, Recipe(tasks={"geneval": 1.0}), seed=4)
    pictures, subjects = to_tensor(pictures), [parse(caption) for caption in captions]
    strict, partial = REWARDS["geneval"](pictures, captions), geneval_partial(pictures, captions)
    assert [score == 1 for score in partial] == [score == 1 for score in strict] and np.mean(strict) > 0.97
    for i, subject in enumerate(subjects):
        if not strict[i]:
            continue

        def score(i=i, **changes):
            changed = [str(subjects[i]._replace(**changes))]
            assert REWARDS["geneval"](pictures[i : i + 1], changed) == [0.0]
            return geneval_partial(pictures[i : i + 1], changed)[0]

        colour = next(c for c in COLOURS if c not in (subject.colour, getattr(subject, "other_colour", None)))
        if isinstance(subject, Counting):
            assert score(colour=colour) == 0
            if subject.count > 1:
                assert score(count=subject.count - 1) == pytest.approx((subject.count - 1) / subject.count)
        else:
            assert score(colour=colour) == pytest.approx(1 / 3), "one thing of two, and hence no relation"
            turned = subject._asdict()
            names = ("colour", "shape", "other_colour", "other_shape")
            values = (turned["other_colour"], turned["other_shape"], turned["colour"], turned["shape"])
            assert score(**dict(zip(names, values, strict=True))) == pytest.approx(2 / 3), "only the relation is wrong"
    blank = torch.full((1, 3, 32, 32), 0.9)
    assert geneval_partial(blank, captions[:1]) == [0.0]


def awkward_pictures() -> torch.Tensor:
    """Pictures of the world, clean and spoiled, and such as are hard to compute with: noise, flat ones, almost flat ones."""
    generator = torch.Generator().manual_seed(6)
    drawn = to_tensor(make_dataset(36, WEB, seed=2)[0])
    noise = torch.rand(12, 3, 32, 32, generator=generator)
    flat = torch.rand(12, 3, 1, 1, generator=generator).expand(12, 3, 32, 32)
    faint = torch.logspace(-7, -1, 12)[:, None, None, None] * (noise - 0.5)  # a window's norm is far below its mean
    halves = flat.clone()
    halves[..., 16:] = flat.flip(0)[..., 16:]
    spoiled = drawn + 0.2 * (torch.rand(drawn.shape, generator=generator) - 0.5)
    whole = torch.cat(
        [drawn, spoiled, 0.9 * drawn[:12] + 0.1 * noise, noise, noise.round(), flat, flat + faint, halves]
    )
    return torch.cat([whole, torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)]).clamp(0, 1)


def awkward_cases() -> dict[str, tuple[torch.Tensor, list[str]]]:
    """For every reward pictures and prompts: those that belong together, and all pictures with any prompts."""
    pictures, captions = make_dataset(48, WEB, seed=2)
    others, cases = awkward_pictures(), {}
    for name in SCORERS:
        texts = prompts(TASK_OF.get(name, name), "train")
        own = [i for i, caption in enumerate(captions) if caption in set(texts)]
        images = torch.cat([to_tensor(pictures[own]), others])
        cases[name] = images, [captions[i] for i in own] + [texts[5 * i % len(texts)] for i in range(len(others))]
    return cases


@pytest.mark.parametrize("name", SCORERS)
def test_rewards_do_not_depend_on_the_batch(name):
    images, texts = awkward_cases()[name]
    expected = pytest.approx(SCORERS[name](images, texts), rel=1e-9, abs=0)
    for size in (1, 2, 7, 64):
        starts = range(0, len(texts), size)
        assert sum([SCORERS[name](images[i : i + size], texts[i : i + size]) for i in starts], []) == expected, size
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    shuffled = SCORERS[name](images[order], [texts[i] for i in order])
    assert [shuffled[i] for i in order.argsort()] == expected
    assert SCORERS[name](images.double().to(memory_format=torch.channels_last), texts) == expected


def test_rewards_do_not_depend_on_the_threads(tmp_path):
    """In processes of their own: the number of threads of matrix products is read when numpy is imported."""
    cases = awkward_cases()
    np.savez(tmp_path / "images.npz", **{name: images.numpy() for name, (images, _) in cases.items()})
    (tmp_path / "texts.json").write_text(json.dumps({name: texts for name, (_, texts) in cases.items()}))
    code = (
        "import json, numpy as np; from shapes import rewards; images = np.load('images.npz')\n"
        "texts = json.load(open('texts.json')).items()\n"
        "print(json.dumps({name: getattr(rewards, name)(images[name], text) for name, text in texts}))"
    )
    scores = []
    for threads in "12":
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(names, threads), "PYTHONPATH": str(EXAMPLES)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        scores.append(json.loads(done.stdout))
    for name, (images, texts) in cases.items():
        expected = pytest.approx(SCORERS[name](images, texts), rel=1e-9, abs=0)
        assert scores[0][name] == expected and scores[1][name] == expected, name


def test_rounding_chooses_no_letter():
    """Two letters over each other are equally like both: the first of them is read, never the second."""
    flat = {letter: glyph - glyph.mean() for letter, glyph in GLYPHS.items()}
    unit = {letter: glyph / np.linalg.norm(glyph) for letter, glyph in flat.items()}
    pairs = list(itertools.combinations(LETTERS, 2))
    pictures = np.full((len(pairs), 32, 32, 3), 0.9)
    for picture, (first, second) in zip(pictures, pairs, strict=True):
        both = unit[first] + unit[second]
        picture[9:23, 4:14] -= 0.7 * ((both - both.min()) / np.ptp(both))[..., None]
    read = [text[0] for text in read_text(pictures)]
    assert [pair for pair, letter in zip(pairs, read, strict=True) if letter == pair[1]] == []
    assert sum(letter == first for letter, (first, _) in zip(read, pairs, strict=True)) > len(pairs) / 2


def test_likeness_is_right_to_the_last_digits():
    """Against one window after the other in extended precision, also where there is next to nothing to see."""
    pictures = awkward_pictures()[::6].permute(0, 2, 3, 1).numpy().astype(np.longdouble)
    height, width = VIEW
    view = scene_picture(Scene("boat", "noon"), 16, 24)[6 : 6 + height, 8 : 8 + width].astype(np.longdouble)
    view -= view.mean((0, 1))
    best = []
    for picture in pictures:
        windows = [picture[y : y + height, x : x + width] for y in range(3, 9) for x in range(2, 16)]
        windows = [window - window.mean((0, 1)) for window in windows]
        norms = [np.sqrt((window**2).sum()) + VIEW_FLOOR for window in windows]
        pairs = zip(windows, norms, strict=True)
        best.append(float(max((window * view).sum() / norm for window, norm in pairs) / np.sqrt((view**2).sum())))
    measured = likeness(pictures.astype(np.float64), "noon")[:, NOUNS.index("boat")]
    assert measured == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_held_out_prompts_are_seen_by_nobody():
    for task in TASKS:
        train, test = set(prompts(task, "train")), set(prompts(task, "test"))
        assert not train & test and len(test) == pytest.approx(0.2 * len(train | test), abs=2)
    _, captions = make_dataset(3000, WEB, seed=3)
    assert {split_of(caption) for caption in captions} == {"train"}


def test_prompt_files_are_those_of_the_world():
    for task in TASKS:
        for split in ("train", "test"):
            assert load_prompts(SHAPES / "prompts" / f"{task}_{split}.txt")[0]["prompt"] == prompts(task, split)


def test_shipped_weights_are_small_and_finite():
    files = sorted([*SHAPES.rglob("*.safetensors")])
    assert len(files) == 5 + len(TASKS)
    assert sum(path.stat().st_size for path in SHAPES.rglob("*") if path.is_file()) < 12e6
    for path in files:
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())
    assert not [path for path in SHAPES.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


@pytest.mark.slow
def test_teachers_lead_on_their_own_tasks_and_their_merge_does_not(tmp_path):
    """A small sample of what `results.json` of the default run tells."""
    files = {split: {t: SHAPES / "prompts" / f"{t}_{split}.txt" for t in TASKS} for split in ("train", "test")}
    trainer = DiffusionOPDTrainer(
        SHAPES / "base",
        {task: SHAPES / "teachers" / task for task in TASKS},
        DiffusionOPDConfig(
            output_dir=str(tmp_path),
            guidance_scale=1.0,
            max_sequence_length=10,
            num_eval_images=48,
            per_device_eval_batch_size=48,
            activation_checkpointing=False,
            disable_tqdm=True,
            use_cpu=True,
        ),
        files["train"],
        eval_dataset=files["test"],
        reward_funcs=REWARDS,
    )

    def score(policy, *tasks):
        scores = trainer.evaluator.score(policy, {task: trainer.eval_datasets[task] for task in tasks})
        return {task: values["reward"] for task, values in scores.items()}

    base = score(Policy("base", 1.0), *TASKS)
    teachers = {task: score(trainer.teachers[task], task)[task] for task in TASKS}
    adapters = tuple(adapter for teacher in trainer.teachers.values() for adapter in teacher.adapters)
    merge = score(Policy("merge", 1.0, adapters), *TASKS)
    for task in TASKS:
        assert teachers[task] > base[task] + 0.1, (teachers, base)
    assert any(merge[task] < teachers[task] - 0.15 for task in TASKS), (merge, teachers)


def test_the_readme_names_the_commands_that_made_it():
    text = (SHAPES / "README.md").read_text()
    for script in ("build_base.py", "train_teachers.py"):
        assert f"python examples/shapes/{script}" in text
    assert re.search(r"seed", text)
