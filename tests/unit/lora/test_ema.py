# SPDX-License-Identifier: Apache-2.0
"""The moving average: as far behind the student as the published code's, and never without effect."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from tests.support.runs import make_trainer, student_state
from trl_diffusion_opd.lora.ema import StudentEMA


CONFIGS = Path(__file__).parents[3] / "examples" / "configs"
# Rounds of the published code: micro-batches of a round, after which of them an optimizer step is taken, and whether the
# average is updated after optimizer steps alone.
PUBLISHED = {
    "DiffusionOPD": {"micro_batches": 3, "accumulated": 3, "after_steps_alone": False, "every": 8},
    "GRPO-Guard": {"micro_batches": 8, "accumulated": 4, "after_steps_alone": False, "every": 8},
    "DiffusionNFT": {"micro_batches": 16, "accumulated": 16, "after_steps_alone": True, "every": 1},
}
RECIPES = {
    "sd35_medium": "DiffusionOPD",
    "sd35_large_to_medium": "DiffusionOPD",
    "sd35_grpo_guard_ocr": "GRPO-Guard",
    "sd35_grpo_guard_aesthetic": "GRPO-Guard",
    "sd35_joint_grpo_guard": "GRPO-Guard",
    "sd35_nft_geneval": "DiffusionNFT",
    "sd35_joint_nft": "DiffusionNFT",
    "sd35_cascade_nft": "DiffusionNFT",
}


def published_averages(steps: int, *, micro_batches: int, accumulated: int, after_steps_alone: bool, every: int):
    """The average of a weight that is `n` after `n` steps, at the last moment before step `n + 1`, for `n < steps`."""
    average, taken, found = 0.0, 0, {}
    while taken <= steps:
        for micro_batch in range(micro_batches):
            found[taken] = average
            stepped = (micro_batch + 1) % accumulated == 0
            taken += stepped
            if (stepped or not after_steps_alone) and (taken + 1) % every == 0:
                average += (1 - min((1 + taken) / (10 + taken), 0.9)) * (taken - average)
    return found


def drift(steps: int, **settings) -> dict[int, float]:
    """Our average of the same weight."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    ema, found = StudentEMA({"w": weight}, **settings), {}
    for n in range(1, steps + 1):
        weight.data.fill_(n)
        ema.update(n)
        found[n] = ema.state_dict()["w"].item()
    return found


def recipe_settings(name: str) -> dict:
    recipe = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    settings = {key: recipe.get(f"ema_{key}", 1) for key in ("decay", "update_every", "update_repeats")}
    return settings


@pytest.mark.parametrize(("recipe", "method"), RECIPES.items())
def test_a_recipe_lags_as_the_published_code_does(recipe, method):
    published = published_averages(300, **PUBLISHED[method])
    ours = drift(300, **recipe_settings(recipe))
    lag = {"DiffusionOPD": 26.5, "GRPO-Guard": 20.3, "DiffusionNFT": 9.0}[method]
    assert 300 - published[300] == pytest.approx(lag, abs=0.05)
    assert 300 - ours[300] == pytest.approx(lag, abs=0.05)
    # Ours starts from the weights of the first update, theirs from those that training began with.
    assert all(ours[n] == pytest.approx(published[n], abs=1e-3) for n in range(150, 301))


def test_every_recipe_with_an_average_is_compared_with_the_published_code():
    assert set(RECIPES) == {path.stem for path in CONFIGS.glob("sd35_*.yaml") if "ema_decay" in path.read_text()}


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("every", [1, 2, 8])
def test_up_to_its_first_update_it_is_the_student(every, repeats):
    found = drift(20, decay=0.9, update_every=every, update_repeats=repeats)
    first = max(every - 1, 1)
    assert [found[n] for n in range(1, first + 1)] == list(range(1, first + 1))
    assert found[first + every] < first + every
    assert all(found[n] == found[n - 1] for n in range(first + 1, 21) if (n + 1) % every)


def test_repeats_are_updates_at_once():
    """`k` repeats are `k` updates in a row, with the decay of that moment."""
    ours = drift(40, decay=0.7, update_every=4, update_repeats=3)
    average = 3.0
    for n in range(7, 41, 4):
        for _ in range(3):
            decay = min((1 + n) / (10 + n), 0.7)
            average = decay * average + (1 - decay) * n
        assert ours[n] == pytest.approx(average, rel=1e-12)


def test_a_run_shorter_than_the_interval_saves_the_student(tmp_path):
    """The average of the published warm-up would still be the LoRA of the start, whose B is zero."""
    trainer = make_trainer(tmp_path, max_steps=2, ema_decay=0.9)
    trainer.train()
    trainer.save_model()
    raw = {name: tensor for name, tensor in student_state(trainer).items() if "lora_B" in name}
    average = trainer.ema.state_dict()
    assert all(average[name].equal(tensor) and tensor.abs().max() > 0 for name, tensor in raw.items())
    saved = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert min(tensor.abs().max() for name, tensor in saved.items() if "lora_B" in name) > 0


def test_the_setting_reaches_the_average(tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=0.9, ema_update_every=5, ema_update_repeats=4)
    assert (trainer.ema.decay, trainer.ema.update_every, trainer.ema.update_repeats) == (0.9, 5, 4)
    with pytest.raises(ValueError, match="`ema_update_repeats` must be at least 1, but is 0"):
        make_trainer(tmp_path, ema_decay=0.9, ema_update_repeats=0)
