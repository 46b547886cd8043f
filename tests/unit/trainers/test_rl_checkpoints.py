# SPDX-License-Identifier: Apache-2.0
"""Runs of the trainers that learn from rewards: resuming, starting from a LoRA, evaluation, record and card."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.support.rl_runs import brightness, logs, make_trainer, redness, student_and_old
from tests.support.runs import PROMPTS, small_lora, stock_images, student_state
from tests.support.tiny import random_lora, save_diffusers_lora, save_peft_lora
from trl_diffusion_opd.evaluation.score import evaluation_batch
from trl_diffusion_opd.hub.errors import SourceError
from trl_diffusion_opd.publishing.card import render_card
from trl_diffusion_opd.publishing.record import RunRecord


SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
METHODS = ("grpo", "nft")


def optimizer_state(trainer) -> dict[int, dict[str, torch.Tensor]]:
    return trainer.optimizer.state_dict()["state"]


class Kill(TrainerCallback):
    """Ends a run after a step, as a signal does."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "settings",
    [
        {"ema_decay": 0.9, "ema_update_every": 1, "gradient_accumulation_steps": 2},
        {"steps_per_rollout": 2, "num_generations": 8, "prompt_cache_size": 5},
    ],
)
def test_resuming_continues_bit_identically(tmp_path, method, settings):
    """Killed between two checkpoints, in the middle of a rollout if that is two steps long."""
    if method == "nft":
        settings = {**settings, "old_policy_schedule": 1}
    straight = make_trainer(method, tmp_path / "a", **SAVING, **settings)
    straight.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(method, tmp_path / "b", callbacks=[Kill(3)], **SAVING, **settings).train()
    resumed = make_trainer(method, tmp_path / "b", **SAVING, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    weights, expected = student_and_old(resumed), student_and_old(straight)
    assert len(weights) == len(student_state(straight)) * (2 if method == "nft" else 1)
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())
    if straight.ema is not None:
        average = resumed.ema.state_dict()
        assert all(average[name].equal(tensor) for name, tensor in straight.ema.state_dict().items())
    for index, state in optimizer_state(straight).items():
        assert all(optimizer_state(resumed)[index][name].equal(tensor) for name, tensor in state.items())
    assert logs(resumed, "reward/brightness") == logs(straight, "reward/brightness")


def test_the_old_policy_is_saved_beside_the_student(tmp_path):
    trainer = make_trainer("nft", tmp_path, old_policy_schedule=1, **SAVING)
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-4"
    saved = load_file(folder / "old_policy.safetensors")
    for name, tensor in student_and_old(trainer).items():
        if ".old." in name:
            assert saved[f"transformer.{name.replace('.old', '')}"].equal(tensor)
    assert not (tmp_path / "out" / "old_policy.safetensors").exists(), "which is no use to anybody else"


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("grpo", {"rewards": redness}, "belongs to a run with other tasks"),
        ("grpo", {"rewards": {"brightness": redness}, "data": {"brightness": ["a cat"]}}, "other rewards"),
        ("grpo", {"reward_weights": [2.0]}, "belongs to a run with other reward weights"),
        ("nft", {}, "belongs to a run with other method"),
        ("grpo", {"loss_type": "grpo"}, "belongs to a run with other method"),
        ("grpo", {"steps_per_rollout": 3}, "in the middle of a rollout, .*: its step 4 .* `steps_per_rollout` = 3"),
    ],
)
def test_resuming_with_something_else_is_refused(tmp_path, method, change, message):
    make_trainer("grpo", tmp_path, **SAVING).train()
    other = make_trainer(method, tmp_path, **{**SAVING, "save_strategy": "no", "max_steps": 8, **change})
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))


class TestAdapter:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("save", [save_diffusers_lora, save_peft_lora])
    def test_a_run_starts_from_it(self, tmp_path, method, save):
        """The same images as with stock diffusers; average and old policy start from it too."""
        config, state = random_lora(rank=3, alpha=5, seed=1)
        save(tmp_path / "lora", config, state)
        trainer = make_trainer(
            method,
            tmp_path,
            adapter=str(tmp_path / "lora"),
            peft_config=None,
            ema_decay=0.5,
            ema_update_every=1,
            solver="flow" if method == "grpo" else "dpm1",
        )
        weights = student_and_old(trainer)
        assert {name.replace(".default", "") for name in weights if ".default." in name} == set(state)
        for name, tensor in weights.items():
            assert tensor.equal(state[name.replace(".default", "").replace(".old", "")])
        assert all(trainer.ema.state_dict()[n].equal(t) for n, t in weights.items() if ".default." in n)

        batch = evaluation_batch(trainer.datasets["brightness"], "brightness", [0, 1], seed=0, column="prompt")
        trainer.grid.prompts.prepare("test", lambda: batch.prompts)
        pictures = trainer.grid.sample_batch(trainer.student_policy, batch)
        save_diffusers_lora(tmp_path / "stock", config, state)
        noise = trainer.sampler.noise(batch.seeds)[0]
        expected = stock_images(tmp_path / "stock", batch, noise, num_inference_steps=4)
        torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-5)

        trainer.train()
        moved = student_state(trainer)
        assert any(not moved[name].equal(weights[name]) for name in moved)
        assert "It started from the LoRA `" in trainer.make_record().summary

    def test_a_stage_starts_from_the_one_before(self, tmp_path):
        first = make_trainer("nft", tmp_path / "first", ema_decay=0.5, ema_update_every=1)
        first.train()
        first.save_model()
        second = make_trainer("grpo", tmp_path / "second", adapter=tmp_path / "first" / "out", peft_config=None)
        average = first.ema.state_dict()
        assert all(tensor.equal(average[name]) for name, tensor in student_state(second).items())
        assert second.transformer.peft_config["default"].r == 4

    def test_another_shape_is_refused(self, tmp_path):
        save_diffusers_lora(tmp_path / "lora", *random_lora(rank=3, targets=["attn.to_q", "attn.to_v"]))
        with pytest.raises(ValueError, match="adapter .*lora': tensors have wrong shapes"):
            make_trainer("grpo", tmp_path, adapter=tmp_path / "lora")
        with pytest.raises(ValueError, match="adapter .*lora': .* another LoRA config"):
            make_trainer("grpo", tmp_path, adapter=tmp_path / "lora", peft_config=small_lora(r=3, lora_alpha=6))
        with pytest.raises(SourceError, match="adapter '.*nowhere': the local path '.*nowhere' does not exist"):
            make_trainer("grpo", tmp_path, adapter=tmp_path / "nowhere")


def test_evaluation_scores_average_and_raw_weights(tmp_path):
    trainer = make_trainer(
        "grpo",
        tmp_path,
        rewards={"count": [brightness, redness], "scene": brightness},
        reward_weights=None,
        eval_dataset=PROMPTS,
        ema_decay=0.9,
        ema_update_every=1,
        learning_rate=0.05,
    )
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    names = {"reward/count", "reward/brightness/count", "reward/redness/count", "reward/scene"}
    metrics = {name for name in first if "/" in name}
    assert metrics == {f"eval_{prefix}{name}" for name in names for prefix in ("", "raw_")}
    assert first["eval_reward/count"] == pytest.approx(
        first["eval_reward/brightness/count"] + first["eval_reward/redness/count"]
    )
    assert all(first[f"eval_{name}"] == first[f"eval_raw_{name}"] for name in names)
    apart = [len({first[f"eval_{name}"], last[f"eval_{name}"], last[f"eval_raw_{name}"]}) for name in names]
    assert max(apart) == 3, apart


@pytest.mark.parametrize(
    ("method", "settings", "paper", "tag"),
    [
        ("grpo", {}, "2510.22319", "grpo-guard"),
        ("grpo", {"loss_type": "grpo"}, "2505.05470", "flow-grpo"),
        ("nft", {"solver": "dpm2"}, "2509.16117", "diffusion-nft"),
    ],
)
def test_record_and_card_tell_the_run(tmp_path, method, settings, paper, tag):
    def scored(images, prompts, **columns):
        """How bright it is."""
        return brightness(images, prompts)

    trainer = make_trainer(
        method,
        tmp_path,
        rewards={"count": scored, "scene": redness},
        eval_dataset=PROMPTS,
        ema_decay=0.9,
        ema_update_every=1,
        num_grid_prompts=1,
        save_curves=True,
        **settings,
    )
    trainer.train()
    score = trainer.evaluate()["eval_reward/count"]
    trainer.save_model()
    trainer.create_model_card()
    record, text = RunRecord.load(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text()
    assert text.strip() == str(render_card(record)).strip()
    told = text.partition("## Citation")[0]
    for part in ("None", "nan", "teacher", "Teacher", str(tmp_path)):
        assert part not in told, part
    for part in (f"papers/{paper}", f"- {tag}", "- reinforcement-learning", f"{score:.3f}", "How bright it is."):
        assert part in text, part
    assert "count (rewarded by scored), scene (rewarded by redness)" in record.summary
    assert "moving average of the weights" in text
    assert ("made with the solver `dpm2`" in text) == (method == "nft")
    assert f"noise_level: {0.7}" in text if method == "grpo" else "guidance_scale: 2.0" in text
    assert record.images_per_round == 8 and record.rounds == 2
    assert (tmp_path / "out" / "curves.png").is_file() and record.curves == "curves.png"
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["rewards"] == {
        "count": ["scored"],
        "scene": ["redness"],
    }
