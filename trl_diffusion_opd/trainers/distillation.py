# SPDX-License-Identifier: Apache-2.0
"""What an objective sees of a run while it trains a batch: the student, what it is to predict, and where."""

from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from ..data.rounds import TaskBatch
from ..losses.objective import Objective, Prediction
from ..losses.queries import draw_queries
from ..models.prompt_encoder import PromptEncoder
from ..models.sampler import Mixture, Policy, PolicySampler
from ..sampling.denoising import Schedule, Trajectory
from .fake_score import FakeScore
from .opd_config import DiffusionOPDConfig
from .target_samples import TargetSamples


class DistillingRun(Protocol):
    """What is needed of a trainer."""

    args: DiffusionOPDConfig
    accelerator: Accelerator
    objective: Objective
    schedule: Schedule
    sampler: PolicySampler
    prompts: PromptEncoder
    query_probabilities: np.ndarray
    targets: dict[str, Policy | Mixture]
    anchor: Policy | Mixture | None
    fake_score: FakeScore | None
    target_samples: TargetSamples


class BatchDistillation:
    """
    The [`~losses.objective.Distillation`] of a trainer and a batch.

    Args:
        trainer ([`DistillingRun`]):
            Owner of all models.
        model (`torch.nn.Module`):
            The student, in its data-parallel wrapper.
        batch ([`TaskBatch`]):
            `B` samples of a task.
        draw (`list[int]`):
            Numbers that are equal on all processes, and with the run's seed decide on what is drawn for the batch as a
            whole.
    """

    def __init__(self, trainer: DistillingRun, model: nn.Module, batch: TaskBatch, draw: list[int]):
        self.trainer, self.model, self.batch = trainer, model, batch
        args = trainer.args
        self.schedule, self.num_steps = trainer.schedule, len(trainer.schedule) - args.skip_last_steps
        self.guidance_scale = args.guidance_scale
        self.draw = [args.seed, *draw]
        unbiased = args.query_distribution == "importance"
        self.queries = draw_queries(args.query_steps, trainer.query_probabilities, self.draw, unbiased=unbiased)
        self._targets: list[Policy | Mixture] = [trainer.targets[batch.task]]
        self.targets = [1.0]
        if trainer.anchor is not None:
            self._targets.append(trainer.anchor)
            self.targets.append(args.anchor_weight)
        self.conditioning = trainer.prompts.conditioning(batch.asked)
        self._theirs = self.conditioning
        if batch.student_prompts is not None:
            self._theirs = trainer.prompts.conditioning(batch.prompts)
        self._noise, self.generators = trainer.sampler.noise(batch.seeds)

    def trajectory(self) -> Trajectory:
        args = self.trainer.args
        return Trajectory(
            self._noise,
            self.schedule,
            solver=args.solver,
            noise_level=args.noise_level,
            generator=self.generators,
        )

    def student(self, sample: torch.Tensor, timestep: torch.Tensor) -> Prediction:
        scale = self.guidance_scale
        inputs = sample, timestep, *self.conditioning.batch(scale), scale
        if not self.trainer.objective.needs_branches:
            return Prediction(self.model(*inputs))
        return Prediction(*self.model(*inputs, keep_branches=True))

    def target(self, sample: torch.Tensor, timestep: torch.Tensor, index: int = 0) -> Prediction:
        sampler, policy = self.trainer.sampler, self._targets[index]
        if not self.trainer.objective.needs_branches:
            return Prediction(sampler.velocity(policy, sample, timestep, self._theirs))
        return Prediction(*sampler.branches(policy, sample, timestep, self._theirs))

    def target_samples(self, num_inference_steps: int) -> torch.Tensor:
        return self.trainer.target_samples.latents(self.batch, self._targets[0], self._theirs, num_inference_steps)

    def fake(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.trainer.fake_score.velocity(self.trainer.sampler, sample, timestep, self.conditioning)

    def train_fake(
        self, sample: torch.Tensor, timestep: torch.Tensor, velocity: torch.Tensor, weight: torch.Tensor
    ) -> None:
        trainer = self.trainer
        trainer.fake_score.train(
            trainer.accelerator, sample, timestep, velocity, weight, self.conditioning, trainer.args.max_grad_norm
        )
