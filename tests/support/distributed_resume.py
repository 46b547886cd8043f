# SPDX-License-Identifier: Apache-2.0
"""Resumes a run of one process in as many as there are, with smaller batches. Arguments: folder, batch size."""

import json
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.runs import make_trainer  # noqa: E402


SETTINGS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "optim": "sgd", "learning_rate": 1.0}


def make(folder: Path, batch_size: int, **settings):
    # All targets: in the last block the text stream's query gets a gradient of zero, which DDP must not wait for.
    return make_trainer(
        folder, per_device_train_batch_size=batch_size, peft_config={"r": 4}, **{**SETTINGS, **settings}
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, batch_size = Path(sys.argv[1]), int(sys.argv[2])
    trainer = make(folder, batch_size, resume_from_checkpoint="true")
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    if trainer.is_world_process_zero():
        result = {
            "first_step": trainer.first_step,
            "steps": trainer.state.global_step,
            "processes": trainer.args.world_size,
        }
        (folder / "result.json").write_text(json.dumps(result))
    trainer.end_processes()
