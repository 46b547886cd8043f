# SPDX-License-Identifier: Apache-2.0
"""Rounds of distillation, whatever the objective: Algorithm 1 of the DiffusionOPD paper."""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..data.rounds import TaskBatch, prompt_at, sample_seed, spread
from ..lora.adapters import lora_state_dict
from ..lora.merging import set_adapter
from ..lora.ssr import SSRStatistics, ssr_factors
from ..losses.objective import Course, Objective
from ..losses.opd import step_divergence
from ..losses.queries import query_probabilities
from ..losses.registry import make_objective
from ..losses.targets import Target
from ..models.loading import STUDENT
from ..models.sampler import Mixture, Policy
from ..models.velocity import Conditioning
from ..sampling.transitions import Transition, transition
from ..utils.serialization import write_json
from ..utils.turns import Turns
from .base_trainer import DiffusionTrainer
from .checkpoints import read_json
from .distillation import BatchDistillation
from .fake_score import FakeScore
from .opd_config import DiffusionOPDConfig
from .target_samples import TargetSamples
from .task_balance import TaskBalance


AVERAGE_ADAPTER = "average"
CALIBRATION_PROMPTS = 8  # of each task, for SSR-Merge
_BALANCE_FILE = "task_balance.json"


class DistillingTrainer(DiffusionTrainer):
    """
    A trainer of a student that follows targets. Subclasses set what is declared here in `add_models`.
    """

    args: DiffusionOPDConfig
    turns: Turns
    objective: Objective
    targets: dict[str, Policy | Mixture]  # by task
    anchor: Policy | Mixture | None
    fake_score: FakeScore | None
    target_samples: TargetSamples

    @property
    def num_kept_policies(self) -> int:
        return 3 if self.objective.needs_fake else 0  # the fake score and its two moments

    def check_method(self, args: DiffusionOPDConfig) -> None:
        self.objective = make_objective(args.objective, args.objective_kwargs)
        branches = self.family.needs_negative(args.guidance_scale)
        self.objective.check(Course(args.solver, args.noise_level, args.guidance_scale, branches))
        trained = args.num_inference_steps - args.skip_last_steps
        if args.query_steps is not None and args.query_steps > trained:
            raise ValueError(
                f"`query_steps` must be at most the number of trained steps, {trained}, but is {args.query_steps}. Leave "
                "it out to query all."
            )

    def make_target(self, name: str, target: Target, known: dict[str, Policy]) -> Policy | Mixture:
        """The policies of a target's terms."""
        if len(target) == 1 and target[0].weight == 1:
            return known[target[0].model]
        return Mixture(name, tuple((term.weight, known[term.model]) for term in target))

    @property
    def teacher_adapters(self) -> list[str]:
        """The LoRAs of all teachers."""
        return [name for teacher in self.teachers.values() for name in teacher.adapters]

    def merge_by_what_teachers_see(self) -> None:
        """SSR-Merge: teachers draw some prompts of their tasks, and their inputs weigh their updates."""
        statistics = SSRStatistics(self.transformer, self.teacher_adapters)
        for task, teacher in self.teachers.items():
            positions = spread(self.datasets[task], CALIBRATION_PROMPTS) if task in self.datasets else []
            for position in positions:
                prompt = prompt_at(self.datasets[task], position)[self.args.prompt_column]
                seed = sample_seed(self.args.seed, f"{task} {prompt}", 0, 0)
                with statistics.of(*teacher.adapters):
                    self.sampler.sample_latents(teacher, self.prompts.conditioning([prompt]), [seed], self.schedule)
        set_adapter(self.transformer, ssr_factors(statistics), STUDENT)

    def prepare_sampling(self, args: DiffusionOPDConfig) -> None:
        super().prepare_sampling(args)
        self.balance = TaskBalance(self.rounds.weights, args.adaptive_task_weights)
        trained = len(self.schedule) - args.skip_last_steps
        if self.objective.needs_noise and 0 in (idle := [self._step(index).std for index in range(trained)]):
            raise ValueError(
                f"`objective={self.objective.name!r}` needs noise in each trained step, but step {idle.index(0)} of "
                f"{len(self.schedule)} of the solver {args.solver!r} has none. Leave it out: `skip_last_steps="
                f"{len(self.schedule) - idle.index(0)}`."
            )
        weights = None
        if args.query_distribution == "importance":
            weights = [self._step_weight(index) for index in range(trained)]
        self.query_probabilities = query_probabilities(args.query_distribution, len(self.schedule), trained, weights)

    def _step_weight(self, index: int) -> float:
        """The objective's weight of a step."""
        return self.objective.weight(self._step(index), self.schedule.sigmas[index].item())

    def _step(self, index: int) -> Transition:
        """A step of the rollout, from nowhere: its coefficients."""
        args, sigmas, nothing = self.args, self.schedule.sigmas.tolist(), torch.zeros(1, 1)
        ends = sigmas[index], sigmas[index + 1]
        return transition(args.solver, nothing, nothing, *ends, noise_level=args.noise_level, sigma_max=sigmas[1])

    # Rounds

    def train_round(self, model: nn.Module, micro_round: int) -> tuple[torch.Tensor, int]:
        """One (micro-)round of Algorithm 1: every task's batch is rolled out and distilled."""
        self.prepare_prompts(self.state.global_step)
        self._refresh_average()
        batches = self.rounds.batches(self.state.global_step, micro_round)
        foreign = [self._backbone_of(batch.task) for batch in batches]
        task_weights, share = self.balance.weights(), len(batches) * self.current_gradient_accumulation_steps
        runs, rows = [], []
        for index, batch in enumerate(batches):
            self.turns.begin(foreign[index], then=foreign[(index + 1) % len(batches)])
            run = BatchDistillation(self, model, batch, [self.state.global_step, micro_round, index])
            number = self.objective.num_losses(len(run.queries))
            weight = task_weights[batch.task] / (share * number)
            rows.append(self.distill(run, number, weight, is_last_batch=index == len(batches) - 1))
            runs.append(run)
        rows = self._reduced(rows)
        self.check_finite(rows, runs)
        self.log_losses(rows, runs)
        losses = [sum(row["loss"] for row in of_batch) / len(of_batch) for of_batch in rows]
        loss = sum(losses) / len(losses) / self.current_gradient_accumulation_steps
        return torch.tensor(loss, device=self.accelerator.device), sum(len(batch.prompts) for batch in batches)

    def distill(
        self, run: BatchDistillation, number: int, weight: float, *, is_last_batch: bool
    ) -> list[dict[str, torch.Tensor]]:
        """
        Accumulates the gradients of a batch: each loss is differentiated as soon as its forward is done.

        No parameter changes within a round, so the velocity that the student is rolled out with is the one to
        differentiate: one forward of each model per step, instead of a rollout and two replays of it.

        Args:
            run ([`BatchDistillation`]):
                `B` samples of one task.
            number (`int`):
                How many losses it has.
            weight (`float`):
                Of each of them.
            is_last_batch (`bool`):
                Whether this is the round's last batch; gradients are reduced over the processes in its last backward.

        Returns:
            `list[dict[str, torch.Tensor]]`: of each loss its mean over the batch, `loss`, and those of its metrics.
        """
        losses, rows = self.objective.losses(run), []
        for index in range(number):
            with self.reduce_only_if(run.model, is_last_batch and index == number - 1):
                loss = next(losses)
                value = loss.value.mean()
                self.accelerator.backward(weight * value)
            metrics = {name: metric.mean() for name, metric in loss.metrics.items()}
            rows.append({"loss": value.detach(), **metrics})
        return rows

    def _backbone_of(self, task: str) -> nn.Module | None:
        """The first model of a task's target that is not the student's."""
        target = self.targets[task]
        policies = [policy for _, policy in target.terms] if isinstance(target, Mixture) else [target]
        return next((policy.model for policy in policies if policy.model is not None), None)

    @torch.no_grad()
    def _refresh_average(self) -> None:
        """Brings the adapter that is the moving average of the student up to date."""
        if AVERAGE_ADAPTER not in self.transformer.peft_config:
            return
        average = {name.replace(f".{STUDENT}.", "."): tensor for name, tensor in self.ema.state_dict().items()}
        for name, tensor in lora_state_dict(self.transformer, AVERAGE_ADAPTER).items():
            tensor.copy_(average[name])

    def _reduced(self, rows: list[list[dict[str, torch.Tensor]]]) -> list[list[dict[str, float]]]:
        """The values of all batches, averaged over the processes."""
        values = torch.stack([value.float() for of_batch in rows for row in of_batch for value in row.values()])
        numbers = iter(self.accelerator.reduce(values, reduction="mean").tolist())
        return [[{name: next(numbers) for name in row} for row in of_batch] for of_batch in rows]

    # Evaluation

    def rollout_metrics(
        self, policy: Policy, batch: TaskBatch, conditioning: Conditioning
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Adds `kl`, the mean divergence from the task's target over the steps that are trained; and with `eval_fixed_kl` the
        one at the states of the target's own rollout, `fixed_kl`.
        """
        target = self.targets[batch.task]
        latents, divergence = self._divergence(policy, target, batch, conditioning)
        metrics = {"kl": divergence}
        if self.args.eval_fixed_kl:
            _, metrics["fixed_kl"] = self._divergence(target, policy, batch, conditioning)
        return latents, metrics

    def _divergence(
        self, policy: Policy | Mixture, other: Policy | Mixture, batch: TaskBatch, conditioning: Conditioning
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the rollout of `policy` ends, and its mean divergence `[B]` from `other` over the trained steps."""
        num_steps = len(self.eval_schedule) - self.args.skip_last_steps
        divergences = []
        for step in self.evaluator.rollout(policy, conditioning, batch.seeds):
            if step.index < num_steps:
                timestep = self.eval_schedule.timesteps[step.index].to(step.sample.device)
                velocity = self.sampler.velocity(other, step.sample, timestep, conditioning)
                divergences.append(step_divergence(step.velocity, velocity, step.transition))
        return step.next_sample, torch.stack(divergences).mean(0)

    # Checks and logs

    def check_finite(self, rows: list[list[dict[str, float]]], runs: list[BatchDistillation]) -> None:
        """Raises a `FloatingPointError` that names task and step of the first loss that is NaN or infinite."""
        for of_batch, run in zip(rows, runs, strict=True):
            for row, step in zip(of_batch, self._steps_of(of_batch, run), strict=True):
                if math.isfinite(row["loss"]):
                    continue
                where = (
                    ""
                    if step is None
                    else (f" at denoising step {step} (sigma {self.schedule.sigmas[step].item():.4f})")
                )
                raise FloatingPointError(
                    f"The divergence from the teacher of task {run.batch.task!r} is {row['loss']}{where} of round "
                    f"{self.state.global_step}. Nothing was updated and the last checkpoint is intact. Lower "
                    "`learning_rate`, or train in bf16 or fp32 instead of fp16."
                )

    def _steps_of(self, of_batch: list[dict[str, float]], run: BatchDistillation) -> list[int | None]:
        """The denoising step that each loss is of."""
        return list(run.queries) if self.objective.visits else [None] * len(of_batch)

    def log_losses(self, rows: list[list[dict[str, float]]], runs: list[BatchDistillation]) -> None:
        """Logs the metrics of each task, and the divergence at each denoising step."""
        by_task, by_step = defaultdict(list), defaultdict(list)
        for of_batch, run in zip(rows, runs, strict=True):
            for row, step in zip(of_batch, self._steps_of(of_batch, run), strict=True):
                for name, value in row.items():
                    by_task[name, run.batch.task].append(value)
                if step is not None and "kl" in row:
                    by_step[step].append(row["kl"])
        losses = {task: float(np.mean(values)) for (name, task), values in by_task.items() if name == "loss"}
        self.balance.add(losses, is_last=self.accelerator.sync_gradients)
        args = self.args
        is_divergence = args.objective == "kl" and self.anchor is None and args.query_steps is None
        for (name, task), values in by_task.items():
            if name != "loss" or not is_divergence:
                self.metrics[f"{name}/{task}"].append(float(np.mean(values)))
        for step, values in sorted(by_step.items()):
            self.metrics[f"kl_step/{step}"].append(float(np.mean(values)))

    # Checkpoints

    def save_method_state(self, folder: Path) -> None:
        super().save_method_state(folder)
        if self.args.adaptive_task_weights > 0:
            write_json(folder / _BALANCE_FILE, self.balance.state_dict())
        if self.fake_score is not None:
            self.fake_score.save(folder)

    def load_method_state(self, folder: Path) -> None:
        super().load_method_state(folder)
        if self.args.adaptive_task_weights > 0:
            self.balance.load_state_dict(read_json(folder, _BALANCE_FILE))
        if self.fake_score is not None:
            self.fake_score.load(folder)
