# SPDX-License-Identifier: Apache-2.0
"""The trainers learn: a rule that sees only finished pictures of the Shapes world is satisfied more often after them."""

from pathlib import Path

import pytest

from trl_diffusion_opd.grpo_trainer import FlowGRPOTrainer
from trl_diffusion_opd.loading import ATTENTION_TARGETS, default_lora
from trl_diffusion_opd.rl_config import FlowGRPOConfig


SHAPES = Path(__file__).parents[1] / "examples" / "shapes"


@pytest.mark.slow
def test_grpo_guard_learns_to_write(tmp_path, monkeypatch):
    """
    8 rounds of 48 pictures, about 20 s on one core. With three seeds the share of held-out pictures whose two letters
    can be read rose by X, Y and Z.
    """
    monkeypatch.syspath_prepend(str(SHAPES.parent))
    from shapes.rewards import ocr

    trainer = FlowGRPOTrainer(
        SHAPES / "base",
        ocr,
        FlowGRPOConfig(
            output_dir=str(tmp_path),
            max_steps=8,
            per_device_train_batch_size=48,
            num_generations=12,
            steps_per_rollout=1,
            learning_rate=2e-3,
            guidance_scale=1.0,
            skip_last_steps=5,
            max_sequence_length=10,
            num_eval_images=192,
            per_device_eval_batch_size=64,
            ema_decay=None,
            save_strategy="no",
            num_grid_prompts=0,
            save_curves=False,
            activation_checkpointing=False,
            disable_tqdm=True,
            use_cpu=True,
            seed=1,
        ),
        SHAPES / "prompts" / "ocr_train.txt",
        SHAPES / "prompts" / "ocr_test.txt",
        peft_config=default_lora(
            r=16,
            lora_alpha=32,
            target_modules=[
                *ATTENTION_TARGETS,
                *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
            ],
        ),
    )
    before = trainer.evaluate()["eval_reward/ocr"]
    trainer.train()
    after = trainer.evaluate()["eval_reward/ocr"]
    assert after > before + 0.1, (before, after)
