# SPDX-License-Identifier: Apache-2.0
"""Tiny distillations with other objectives for `accelerate launch`. Arguments: folder, batch size."""

import json
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.runs import make_teachers, make_trainer  # noqa: E402


# Those with a second optimizer, with a part of the steps, with samples that are kept, and with weights that follow losses.
RUNS = {
    "tdm": {"objective": "tdm", "learning_rate": 1e-3},
    "queries": {"query_steps": 1, "query_distribution": "importance", "adaptive_task_weights": 1.0},
    "sft": {"objective": "sft", "objective_kwargs": {"guided": True}},
}


def main(folder: Path, batch_size: int) -> None:
    torch.set_num_threads(1)
    losses = {}
    for name, settings in RUNS.items():
        own = folder / name
        trainer = make_trainer(
            own,
            teachers={**make_teachers(own), "scene": str(own / "scene")},
            per_device_train_batch_size=batch_size,
            max_steps=3,
            peft_config={"r": 4},
            **settings,
        )
        trainer.train()
        trainer.save_model()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        (folder / "result.json").write_text(json.dumps({"processes": trainer.args.world_size, "losses": losses}))
    trainer.end_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
