# SPDX-License-Identifier: Apache-2.0
"""
Times a round in a single pass against the same round in three passes (roll out, replay the teacher, replay the
student), which gives the same gradient, on the model of the Shapes world. The two take turns, so that both see the
same machine.

    python examples/benchmark_round.py
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig

from trl_diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer
from trl_diffusion_opd.losses.opd import step_divergence
from trl_diffusion_opd.models.loading import STUDENT


SHAPES = Path(__file__).parent / "shapes"
TASKS = ("geneval", "ocr", "aesthetic")


class ThreePassTrainer(DiffusionOPDTrainer):
    """The reference: every step of the trajectory is visited once to roll out and once by each model to replay it."""

    def distill(self, model, batch, num_steps, loss_weight, is_last_batch):
        teacher, student = self.teachers[batch.task], self.student_policy
        conditioning = self.prompts.conditioning(batch.prompts)
        rollout = self.sampler.rollout(
            student,
            conditioning,
            batch.seeds,
            self.schedule,
            solver=self.args.solver,
            noise_level=self.args.noise_level,
            num_steps=num_steps,
        )
        steps, timesteps = list(rollout), self.schedule.timesteps
        targets = [self.sampler.velocity(teacher, s.sample, timesteps[s.index], conditioning) for s in steps]
        divergences = []
        for step, target in zip(steps, targets, strict=True):
            scale = student.guidance_scale
            velocity = model(step.sample, timesteps[step.index], *conditioning.batch(scale), scale)
            divergence = step_divergence(velocity, target, step.transition).mean()
            self.accelerator.backward(loss_weight * divergence)
            divergences.append(divergence.detach())
        return torch.stack(divergences)


def make(cls, folder: str, batch_size: int, activation_checkpointing: bool) -> DiffusionOPDTrainer:
    trainer = cls(
        SHAPES / "base",
        {task: SHAPES / "teachers" / task for task in TASKS},
        DiffusionOPDConfig(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            guidance_scale=1.0,
            skip_last_steps=0,
            max_sequence_length=10,
            disable_tqdm=True,
        ),
        {task: SHAPES / "prompts" / f"{task}_train.txt" for task in TASKS},
        peft_config=LoraConfig(
            r=16, lora_alpha=32, init_lora_weights="gaussian", target_modules=["attn.to_q", "attn.to_k", "attn.to_v"]
        ),
    )
    if activation_checkpointing:
        trainer.model.activation_checkpointing_enable()  # as `train` does
    return trainer


def gradient_of_a_round(trainer: DiffusionOPDTrainer) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.current_gradient_accumulation_steps = 1
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    trainer.model.zero_grad()
    start = time.perf_counter()
    trainer.training_step(trainer.model, {"micro_round": 0})
    seconds = time.perf_counter() - start
    named = trainer.transformer.named_parameters()
    return seconds, {name: parameter.grad for name, parameter in named if f".{STUDENT}." in name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=8, help="prompts of each task")
    parser.add_argument("--rounds", type=int, default=8, help="rounds of each kind to time, after one to warm up")
    args = parser.parse_args()
    for checkpointing in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            single = make(DiffusionOPDTrainer, folder, args.batch_size, checkpointing)
            three = make(ThreePassTrainer, folder, args.batch_size, checkpointing)
            times = {"single": [], "three": []}
            for _ in range(args.rounds + 1):
                for name, trainer in (("single", single), ("three", three)):
                    seconds, gradient = gradient_of_a_round(trainer)
                    times[name].append(seconds)
                    if name == "single":
                        expected = gradient
            error = max((gradient[n] - expected[n]).abs().max() for n in expected) / max(
                g.abs().max() for g in expected.values()
            )
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}
        print(
            f"activation checkpointing {'on' if checkpointing else 'off'}: single pass {medians['single']:.2f} s, three "
            f"passes {medians['three']:.2f} s, ratio {medians['three'] / medians['single']:.2f}; largest difference of "
            f"the gradients {error:.1e} of the largest entry"
        )


if __name__ == "__main__":
    main()
