# SPDX-License-Identifier: Apache-2.0
"""Tiny distillations of every model family for `accelerate launch`. Arguments: folder, batch size."""

import json
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.family_runs import make_family_trainer  # noqa: E402
from tests.support.tiny_families import FAMILY_PIPELINES  # noqa: E402


def main(folder: Path, batch_size: int) -> None:
    torch.set_num_threads(1)
    losses = {}
    for name in FAMILY_PIPELINES:
        if name == "sd3":
            continue
        trainer = make_family_trainer(
            name, folder / name, per_device_train_batch_size=batch_size, max_steps=2, activation_checkpointing=True
        )
        trainer.train()
        trainer.save_model()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        (folder / "result.json").write_text(json.dumps({"processes": trainer.args.world_size, "losses": losses}))
    trainer.end_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
