# SPDX-License-Identifier: Apache-2.0
"""Policy gradients at every denoising step: Flow-GRPO and GRPO-Guard."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback

from ..data.rounds import TaskBatch
from ..losses.grpo import is_clipped, log_ratio, mean_shift, reference_divergence, step_weight, surrogate_loss
from ..models.loading import STUDENT
from ..models.sampler import Policy
from ..rewards.functions import RewardFunc
from ..sampling.solvers import SOLVERS
from .experience import Experience, zero_unselected
from .grpo_config import FlowGRPOConfig
from .rl_trainer import RLTrainer


_GUARD_PAPER = {
    "title": "GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping",
    "id": "2510.22319",
    # docstyle-ignore
    "citation": """\
@article{wang2025grpoguard,
    title        = {{GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping}},
    author       = {Jing Wang and Jiajun Liang and Jie Liu and Henglin Liu and Gongye Liu and Jun Zheng and Wanyuan Pang and Ao Ma and Zhenyu Xie and Xintao Wang and Meng Wang and Pengfei Wan and Xiaodan Liang},
    year         = 2025,
    eprint       = {arXiv:2510.22319}
}""",
}


@dataclass
class VisitedStep:
    """
    A denoising step that was taken.

    Args:
        sample (`torch.Tensor`), velocity (`torch.Tensor`), noise (`torch.Tensor`):
            State, velocity of the policy that took the step, and the noise that it drew; of shape `[B, C, H, W]`.
        std (`torch.Tensor`), coefficient (`torch.Tensor`):
            Of its [`Transition`].
    """

    sample: torch.Tensor
    velocity: torch.Tensor
    noise: torch.Tensor
    std: torch.Tensor
    coefficient: torch.Tensor


class FlowGRPOTrainer(RLTrainer):
    """
    Trainer for [Flow-GRPO: Training Flow Matching Models via Online RL](https://huggingface.co/papers/2505.05470) and
    [GRPO-Guard](https://huggingface.co/papers/2510.22319).

    Several images of each prompt are drawn with a stochastic sampler. Every denoising step of an image is made more
    probable if the image is better than the others of its prompt, and less probable if it is worse.

    Example:

    ```python
    from trl_diffusion_opd import FlowGRPOConfig, FlowGRPOTrainer

    trainer = FlowGRPOTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        reward_funcs="ocr",
        args=FlowGRPOConfig(output_dir="sd35m-ocr", max_steps=1000, gradient_accumulation_steps=24, fp16=True),
        train_dataset="ocr_prompts.txt",
    )
    trainer.train()
    ```

    Args:
        model (`str` or `Path` or [`~diffusers.DiffusionPipeline`]):
            The base: a Hub id, a local folder, or a pipeline in memory.
        reward_funcs (`Callable`, `str`, `list` or `dict`):
            What is rewarded: a function `f(images, prompts, **columns) -> list[float]`, plain or async, where `images`
            is a float tensor `[B, 3, H, W]` in `[0, 1]`; the name of a built-in reward (`"ocr"`, ...); several of
            them; or a dictionary with those of each task.
        args ([`FlowGRPOConfig`], *optional*):
            Configuration of the trainer.
        train_dataset (`dict`, [`~datasets.Dataset`], `list` or `str`):
            Prompts, or those of each task if `reward_funcs` is a dictionary.
        eval_dataset (*optional*):
            Held-out prompts in the same form.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Added to the default callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            As of the [`DiffusionOPDTrainer`].
        peft_config ([`~peft.LoraConfig`] or `dict`, *optional*):
            LoRA of the student, or the fields in which it differs from the default: rank 32, alpha 64, gaussian init, on
            the attention projections.
        adapter (`str` or `Path`, *optional*):
            LoRA to start from, from the Hub or from disk, with the shape of `peft_config` if that is given.
    """

    _tag_names = ["trl", "flow-grpo", "reinforcement-learning"]
    _name = "Flow-GRPO"
    _paper = {
        "title": "Flow-GRPO: Training Flow Matching Models via Online RL",
        "id": "2505.05470",
        # docstyle-ignore
        "citation": """\
@article{liu2025flowgrpo,
    title        = {{Flow-GRPO: Training Flow Matching Models via Online RL}},
    author       = {Jie Liu and Gongye Liu and Jiajun Liang and Yangguang Li and Jiaheng Liu and Xintao Wang and Pengfei Wan and Di Zhang and Wanli Ouyang},
    year         = 2025,
    eprint       = {arXiv:2505.05470}
}""",
    }

    config_class = FlowGRPOConfig

    def __init__(
        self,
        model: str | Path | DiffusionPipeline,
        reward_funcs: RewardFunc | str | list[RewardFunc | str] | Mapping[str, Any],
        args: FlowGRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Callable | None, Callable | None] = (None, None),
        peft_config: LoraConfig | dict[str, Any] | None = None,
        adapter: str | Path | None = None,
    ):
        if args is None or args.loss_type == "grpo_guard":
            self._name, self._paper = "GRPO-Guard", _GUARD_PAPER
            self._tag_names = [*self._tag_names, "grpo-guard"]
        super().__init__(
            model, reward_funcs, args, train_dataset, eval_dataset, callbacks, optimizers, peft_config, adapter
        )

    @property
    def objective(self) -> str:
        name = "GRPO-Guard" if self.args.loss_type == "grpo_guard" else "Flow-GRPO"
        return f"{name}, clip range {self.args.epsilon:g}, weight of the divergence {self.args.beta:g}"

    @property
    def kept_latents(self) -> int:
        return 3 * (len(self.schedule) - self.args.skip_last_steps)

    def check_method(self, args: FlowGRPOConfig) -> None:
        if SOLVERS[args.solver].last_step_is_noiseless and self.args.skip_last_steps == 0:
            raise ValueError(
                f"`skip_last_steps` is 0 for this model, but the last step of `solver={args.solver!r}` has no noise and "
                "hence no probability. Set it to 1 at least."
            )

    def takes(self, advantages: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
        """All but those of prompts whose images are equally good, which have no gradient."""
        return advantages != 0

    def draw(self, batch: TaskBatch) -> tuple[torch.Tensor, list[VisitedStep]]:
        args, visited = self.args, []
        policy = Policy("student", args.guidance_scale, (STUDENT,))
        conditioning = self.prompts.conditioning(batch.prompts)
        for step in self.sampler.rollout(
            policy, conditioning, batch.seeds, self.schedule, solver=args.solver, noise_level=args.noise_level
        ):
            if step.index < len(self.schedule) - self.args.skip_last_steps:
                std, coefficient = step.transition.std, step.transition.coefficient
                drawn = (step.next_sample - step.transition.mean) / std
                visited.append(VisitedStep(step.sample, step.velocity, drawn, std, coefficient))
        return step.next_sample, visited

    def learn(
        self, model: nn.Module, experience: Experience, loss_weight: float, is_last_batch: bool
    ) -> dict[str, torch.Tensor]:
        args, advantage, selected = self.args, experience.advantages, experience.taken
        visited, sigmas = experience.trajectory, self.schedule.sigmas.tolist()
        conditioning = self.prompts.conditioning(experience.batch.prompts)
        timesteps = self.schedule.timesteps.to(self.accelerator.device)
        base = Policy("base", args.guidance_scale)
        metrics = {"loss": [], "clip_ratio": [], "log_ratio": [], **({"kl": []} if args.beta else {})}
        for index, step in enumerate(visited):
            timestep = timesteps[index]
            sample, old, noise = (zero_unselected(selected, kept) for kept in (step.sample, step.velocity, step.noise))
            if args.beta:  # before the student's forward: between that and its backward no adapter may be switched
                reference = self.sampler.velocity(base, sample, timestep, conditioning)
            with self.reduce_only_if(model, is_last_batch and index == len(visited) - 1):
                velocity = model(sample, timestep, *conditioning.batch(args.guidance_scale), args.guidance_scale)
                shift = mean_shift(velocity, old, step.coefficient)
                ratio = log_ratio(shift, noise, step.std, loss_type=args.loss_type)
                weight = step_weight(
                    args.solver, sigmas[index], sigmas[index + 1], args.noise_level, loss_type=args.loss_type
                )
                loss = weight * surrogate_loss(ratio, advantage, args.epsilon)
                if args.beta:
                    shift = mean_shift(velocity, reference, step.coefficient)
                    divergence = reference_divergence(shift, step.std, sigmas[index], sigmas[index + 1])
                    loss = loss + args.beta * divergence
                    metrics["kl"].append(divergence.detach())
                loss = torch.where(selected, loss, 0.0) / len(visited)
                self.accelerator.backward(loss_weight * loss.sum())
            metrics["loss"].append(loss.detach())
            metrics["clip_ratio"].append(is_clipped(ratio, advantage, args.epsilon).float())
            metrics["log_ratio"].append(ratio.detach().abs())
        columns = {name: torch.stack(values).mean(0) for name, values in metrics.items()}
        return {**columns, "loss": columns["loss"] * len(visited)}
