# SPDX-License-Identifier: Apache-2.0
"""A tiny run for `accelerate launch`: trains, evaluates and saves the LoRA. Arguments: folder, batch size, noise level."""

import json
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.runs import PROMPTS, make_trainer  # noqa: E402


def brightness(images, prompts, **columns):
    return [float(image.mean()) for image in images]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, batch_size, noise_level = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    trainer = make_trainer(
        folder,
        per_device_train_batch_size=batch_size,
        noise_level=noise_level,
        max_steps=3,
        eval_dataset=PROMPTS,
        reward_funcs={"count": brightness},
        save_strategy="steps",
        save_steps=3,
        num_grid_prompts=1,
        # All targets: in the last block the text stream's query gets a gradient of zero, which DDP must not wait for.
        peft_config={"r": 4},
    )
    reductions = []
    all_reduce = torch.distributed.all_reduce if torch.distributed.is_initialized() else None
    if all_reduce is not None:
        # DDP's gradient buckets go through the communication hook, once per reduction.
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
        from transformers import TrainerCallback

        def count(group, bucket):
            reductions.append(bucket.index())
            return allreduce_hook(group, bucket)

        class Watch(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                trainer.model_wrapped.register_comm_hook(torch.distributed.group.WORLD, count)

        trainer.add_callback(Watch())
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        result = {"logs": logs, "metrics": metrics, "reductions": reductions, "processes": trainer.args.world_size}
        (folder / "result.json").write_text(json.dumps(result))
    trainer.end_processes()
