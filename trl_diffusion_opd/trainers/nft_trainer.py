# SPDX-License-Identifier: Apache-2.0
"""Reinforcement on the forward process: DiffusionNFT."""

import copy
from pathlib import Path

import torch
from torch import nn

from ..data.rounds import TaskBatch
from ..lora.adapters import add_lora, load_lora_into, lora_state_dict, save_lora
from ..lora.files import LoraWeights
from ..losses.nft import nft_losses, noised, old_policy_decay, optimality_probability
from ..models.loading import STUDENT
from ..models.sampler import Policy
from .experience import Experience, zero_unselected
from .nft_config import DiffusionNFTConfig
from .rl_trainer import RLTrainer


OLD = "old"
OLD_WEIGHT_NAME = "old_policy.safetensors"


class DiffusionNFTTrainer(RLTrainer):
    """
    Trainer for [DiffusionNFT: Online Diffusion Reinforcement with Forward
    Process](https://huggingface.co/papers/2509.16117).

    An old copy of the student draws several images of each prompt, with any sampler. They are noised again, and the
    student's velocity is pulled towards the good ones and away from the bad ones.

    Example:

    ```python
    from trl_diffusion_opd import DiffusionNFTConfig, DiffusionNFTTrainer

    trainer = DiffusionNFTTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        reward_funcs="geneval",
        args=DiffusionNFTConfig(output_dir="sd35m-geneval", max_steps=1000, gradient_accumulation_steps=48, fp16=True),
        train_dataset="geneval_prompts.jsonl",
    )
    trainer.train()
    ```

    Args:
        model, reward_funcs, train_dataset, eval_dataset, callbacks, optimizers, peft_config, adapter:
            As of the [`FlowGRPOTrainer`].
        args ([`DiffusionNFTConfig`], *optional*):
            Configuration of the trainer.
    """

    _tag_names = ["trl", "diffusion-nft", "reinforcement-learning"]
    _name = "DiffusionNFT"
    _paper = {
        "title": "DiffusionNFT: Online Diffusion Reinforcement with Forward Process",
        "id": "2509.16117",
        # docstyle-ignore
        "citation": """\
@article{zheng2025diffusionnft,
    title        = {{DiffusionNFT: Online Diffusion Reinforcement with Forward Process}},
    author       = {Kaiwen Zheng and Huayu Chen and Haotian Ye and Haoxiang Wang and Qinsheng Zhang and Kai Jiang and Hang Su and Stefano Ermon and Jun Zhu and Ming-Yu Liu},
    year         = 2025,
    eprint       = {arXiv:2509.16117}
}""",
    }

    config_class = DiffusionNFTConfig
    kept_latents = 1
    num_kept_policies = 1

    def add_models(self, args: DiffusionNFTConfig) -> None:
        config = copy.deepcopy(self.transformer.peft_config[STUDENT])
        state = {name: tensor.detach().clone() for name, tensor in lora_state_dict(self.transformer, STUDENT).items()}
        add_lora(self.transformer, LoraWeights(config, state, "old policy"), OLD)
        self.old_policy = Policy("old", args.guidance_scale, (OLD,))
        self.base_policy = Policy("base", args.guidance_scale)

    @property
    def objective(self) -> str:
        return f"DiffusionNFT, beta {self.args.nft_beta:g}, old policy by schedule {self.args.old_policy_schedule}"

    def draw(self, batch: TaskBatch) -> tuple[torch.Tensor, torch.Tensor]:
        args, conditioning = self.args, self.prompts.conditioning(batch.prompts)
        clean = self.sampler.sample_latents(
            self.old_policy,
            conditioning,
            batch.seeds,
            self.schedule,
            solver=args.solver,
            noise_level=args.noise_level,
        )
        return clean, clean

    def learn(
        self, model: nn.Module, experience: Experience, loss_weight: float, is_last_batch: bool
    ) -> dict[str, torch.Tensor]:
        args, clean = self.args, zero_unselected(experience.taken, experience.trajectory)
        conditioning = self.prompts.conditioning(experience.batch.prompts)
        probability = optimality_probability(experience.advantages, args.advantage_clip)
        # Every image visits the noise levels in an order of its own, with fresh noise at each.
        generators = [torch.Generator().manual_seed(seed + 1) for seed in experience.batch.seeds]
        orders = torch.stack([torch.randperm(len(self.schedule), generator=g) for g in generators])
        num_levels = len(self.schedule) - self.args.skip_last_steps
        metrics = {"loss": [], "kl": []}
        for index in range(num_levels):
            sigma = self.schedule.sigmas[orders[:, index]].to(clean.device)
            timestep = self.schedule.timesteps[orders[:, index]].to(clean.device)
            noise = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in generators]).to(clean.device)
            sample = noised(clean, noise, sigma)
            # Before the student's forward: between that and its backward no adapter may be switched.
            old = self.sampler.velocity(self.old_policy, sample, timestep, conditioning)
            reference = self.sampler.velocity(self.base_policy, sample, timestep, conditioning)
            with self.reduce_only_if(model, is_last_batch and index == num_levels - 1):
                velocity = model(sample, timestep, *conditioning.batch(args.guidance_scale), args.guidance_scale)
                policy, divergence = nft_losses(
                    velocity, old, reference, sample, clean, sigma, probability, beta=args.nft_beta
                )
                loss = args.advantage_clip * policy + args.kl_coef * divergence
                loss = torch.where(experience.taken, loss, 0.0) / num_levels
                self.accelerator.backward(loss_weight * loss.sum())
            metrics["loss"].append(loss.detach())
            metrics["kl"].append(divergence.detach())
        return {"loss": torch.stack(metrics["loss"]).sum(0), "kl": torch.stack(metrics["kl"]).mean(0)}

    @torch.no_grad()
    def prepare_rollout(self) -> None:
        """`old <- d old + (1 - d) student`. Before the first step of a run `d` is 0."""
        decay = old_policy_decay(self.args.old_policy_schedule, self.state.global_step)
        student = lora_state_dict(self.transformer, STUDENT)
        for name, old in lora_state_dict(self.transformer, OLD).items():
            old.lerp_(student[name].to(old.dtype), 1 - decay)

    def save_method_state(self, folder: Path) -> None:
        save_lora(folder, self.transformer, adapter_name=OLD, weight_name=OLD_WEIGHT_NAME)

    def load_method_state(self, folder: Path) -> None:
        super().load_method_state(folder)
        load_lora_into(self.transformer, folder / OLD_WEIGHT_NAME, OLD)
