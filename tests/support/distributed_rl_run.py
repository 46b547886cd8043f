# SPDX-License-Identifier: Apache-2.0
"""A tiny run of every trainer that learns from rewards, for `accelerate launch`. Arguments: folder, batch size."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object


sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.rl_runs import brightness, make_trainer, redness  # noqa: E402
from tests.support.runs import PROMPTS  # noqa: E402


def judged(images, prompts, **columns):
    """Redness, for images on whose prompt there is something to say: whole batches of a process may be equal."""
    scores = redness(images, prompts)
    return [
        None if "tree" in prompt else score * ("boat" in prompt) for prompt, score in zip(prompts, scores, strict=True)
    ]


def run(method: str, folder: Path, batch_size: int) -> dict:
    trainer = make_trainer(
        method,
        folder / method,
        rewards={"count": brightness, "scene": [judged, brightness]} if method == "nft" else {"scene": judged},
        data=PROMPTS if method == "nft" else {"scene": PROMPTS["scene"]},
        per_device_train_batch_size=batch_size,
        num_generations=4 if method == "nft" else 2,  # across the processes, and within one
        gradient_accumulation_steps=2,
        steps_per_rollout=2,
        max_steps=4,
        optim="sgd",
        learning_rate=1.0,
        ema_decay=0.9,
        ema_update_every=1,
        save_strategy="steps",
        save_steps=4,
        # All targets: in the last block the text stream's query gets a gradient of zero, which DDP must not wait for.
        peft_config={"r": 4},
        **({"eval_dataset": PROMPTS} if method == "nft" else {"beta": 0.1}),
    )
    learn, idle = trainer.learn, []

    def watch(model, experience, loss_weight, is_last_batch):
        idle.append(not experience.taken.any().item())
        return learn(model, experience, loss_weight, is_last_batch)

    trainer.learn = watch
    trainer.train()
    metrics = trainer.evaluate() if method == "nft" else {}
    return {
        "logs": trainer.state.log_history,
        "metrics": metrics,
        "processes": trainer.args.world_size,
        "idle": gather_object(idle),
    }


def main(folder: Path, batch_size: int) -> None:
    torch.set_num_threads(1)
    results = {method: run(method, folder, batch_size) for method in ("grpo", "nft")}
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / "result.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    PartialState().destroy_process_group()
