# SPDX-License-Identifier: Apache-2.0
"""Tiny runs of the trainers that learn from rewards: real components, rewards that depend on the images."""

from pathlib import Path

import torch
from torch import nn

from tests.support.runs import PROMPTS, small_lora
from tests.support.tiny import tiny_pipeline
from trl_diffusion_opd.trainers.grpo_config import FlowGRPOConfig
from trl_diffusion_opd.trainers.grpo_trainer import FlowGRPOTrainer
from trl_diffusion_opd.trainers.nft_config import DiffusionNFTConfig
from trl_diffusion_opd.trainers.nft_trainer import DiffusionNFTTrainer
from trl_diffusion_opd.trainers.rl_trainer import RLTrainer


TRAINERS = {"grpo": (FlowGRPOTrainer, FlowGRPOConfig), "nft": (DiffusionNFTTrainer, DiffusionNFTConfig)}
ARGUMENTS = ("eval_dataset", "callbacks", "optimizers", "adapter")


def brightness(images, prompts, **columns):
    """How bright a image is, in steps that float32 holds exactly."""
    return [round(1024 * image.mean().item()) / 1024 for image in images]


def redness(images, prompts, **columns):
    """How much redder than green a image is, in steps that float32 holds exactly."""
    return [round(1024 * (image[0] - image[1]).mean().item()) / 1024 for image in images]


def make_config(method: str, folder: Path, **overrides):
    settings = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_generations": 4,
        "steps_per_rollout": 1,
        "max_steps": 2,
        "num_inference_steps": 4,
        "guidance_scale": 2.0,
        "max_sequence_length": 16,
        "learning_rate": 0.01,  # large, so that a few steps move the weights measurably
        "ema_decay": None,
        "logging_steps": 1,
        "save_strategy": "no",
        "num_grid_prompts": 0,
        "save_curves": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "activation_checkpointing": False,
        **overrides,
    }
    return TRAINERS[method][1](**settings)


def make_trainer(
    method: str, folder: Path, *, rewards=brightness, data=None, pipeline=None, peft_config="small", **settings
) -> RLTrainer:
    """A trainer on the tiny pipeline; `settings` are fields of the config or arguments of the trainer."""
    arguments = {name: settings.pop(name) for name in ARGUMENTS if name in settings}
    return TRAINERS[method][0](
        pipeline or tiny_pipeline(),
        rewards,
        make_config(method, folder, **settings),
        data or (PROMPTS if isinstance(rewards, dict) else PROMPTS["count"]),
        peft_config=small_lora() if peft_config == "small" else peft_config,
        **arguments,
    )


def in_float64(trainer: RLTrainer) -> RLTrainer:
    """Has a trainer compute in float64, but for the images and the rewards."""
    noise = trainer.sampler.noise
    trainer.transformer.to(torch.float64)
    trainer.sampler.noise = lambda seeds: (noise(seeds)[0].double(), noise(seeds)[1])
    return trainer


def student_and_old(trainer: RLTrainer) -> dict[str, torch.Tensor]:
    """The tensors of all adapters, copied."""
    return {name: p.detach().clone() for name, p in trainer.transformer.named_parameters() if "lora_" in name}


def perturb(trainer: RLTrainer, scale: float = 0.05, adapter: str = "default") -> None:
    """Gives an adapter, whose B is zero at first, an effect."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trainer.transformer.named_parameters():
            if f"lora_B.{adapter}" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(scale * noise)


def prepare(trainer: RLTrainer) -> RLTrainer:
    """A trainer as the training loop has it at the start of a round."""
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    return trainer


def run_round(trainer: RLTrainer, step: int = 0) -> dict[str, torch.Tensor]:
    """Gradients of one optimizer step's rounds, which is not taken."""
    prepare(trainer)
    trainer.state.global_step = step
    trainer.model.zero_grad()
    for micro_round in range(trainer.args.gradient_accumulation_steps):
        trainer.training_step(trainer.model, {"micro_round": micro_round})
    return {name: p.grad.clone() for name, p in trainer.transformer.named_parameters() if p.grad is not None}


def logs(trainer: RLTrainer, name: str) -> list[float]:
    """What was logged by that name, in the order of the steps."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Forwards:
    """Notes the timesteps of every forward of a trainer's model while it is entered, and whether gradients are on."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.timesteps: list[torch.Tensor] = []
        self.graded: list[bool] = []

    def _note(self, module, arguments) -> None:
        self.timesteps.append(arguments[1].clone())
        self.graded.append(torch.is_grad_enabled())

    def __enter__(self) -> "Forwards":
        self._hook = self.model.register_forward_pre_hook(self._note)
        return self

    def __exit__(self, *exception) -> None:
        self._hook.remove()
