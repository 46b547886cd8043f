# SPDX-License-Identifier: Apache-2.0
"""The Shapes world and what is shipped of it: rules that judge rightly, a base and teachers that are what they say."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trl_diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer
from trl_diffusion_opd.data.prompt_sets import load_prompts
from trl_diffusion_opd.evaluation.comparison import compare


EXAMPLES = Path(__file__).parents[3] / "examples"
SHAPES = EXAMPLES / "shapes"
sys.path.insert(0, str(EXAMPLES))

from shapes.render import WEB, Recipe, make_dataset  # noqa: E402
from shapes.rewards import REWARDS, geneval_partial  # noqa: E402
from shapes.world import COLOURS, TASKS, Counting, parse, prompts, split_of  # noqa: E402


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


def test_rewards_do_not_depend_on_the_batch():
    pictures, captions = make_dataset(24, WEB, seed=2)
    for task in TASKS:
        own = [i for i, caption in enumerate(captions) if caption in set(prompts(task, "train"))]
        images, texts = to_tensor(pictures[own]), [captions[i] for i in own]
        one_by_one = [REWARDS[task](images[i : i + 1], texts[i : i + 1])[0] for i in range(len(own))]
        assert REWARDS[task](images, texts) == pytest.approx(one_by_one, rel=1e-3)  # float32, two orders of summation


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
            num_eval_images=96,
            per_device_eval_batch_size=48,
            activation_checkpointing=False,
            disable_tqdm=True,
            use_cpu=True,
        ),
        files["train"],
        eval_dataset=files["test"],
        reward_funcs=REWARDS,
    )
    results = compare(trainer)
    for task in TASKS:
        assert results["teachers"][task][task] > results["base"][task] + 0.1, results
    assert any(results["merge"][task] < results["teachers"][task][task] - 0.15 for task in TASKS), results


def test_the_readme_names_the_commands_that_made_it():
    text = (SHAPES / "README.md").read_text()
    for script in ("build_base.py", "train_teachers.py"):
        assert f"python examples/shapes/{script}" in text
    assert re.search(r"seed", text)
