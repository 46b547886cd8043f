# SPDX-License-Identifier: Apache-2.0
"""Scoring a policy on the prompts of every task: divergences along its rollouts, rewards of its images."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..data.rounds import Prompts, TaskBatch, num_prompts, prompt_at, sample_seed
from ..models.prompt_encoder import PromptEncoder
from ..models.sampler import Policy, PolicySampler
from ..models.velocity import Conditioning
from ..rewards.functions import RewardFunc, reward_columns
from ..sampling.denoising import DenoisingStep, Schedule
from ..utils.hardware import on_device


# `measure(policy, batch, conditioning)`: the final latents `[B, C, H, W]` and metrics `[B]` by name.
Measure = Callable[[Policy, TaskBatch, Conditioning], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def count_images(datasets: Mapping[str, Prompts], num_eval_images: int | None) -> dict[str, int]:
    """
    How many images of each task an evaluation draws: by default one of each prompt.

    Raises:
        `ValueError`: a stream, whose length is not known, without `num_eval_images`.
    """
    counts = {task: num_eval_images or num_prompts(data) for task, data in datasets.items()}
    if streamed := [task for task, count in counts.items() if count is None]:
        raise ValueError(
            f"`eval_dataset` has streams ({', '.join(streamed)}), whose length is not known. Set `num_eval_images`."
        )
    return counts


def evaluation_batch(
    dataset: Prompts, task: str, positions: list[int], *, seed: int, column: str, purpose: str = "eval"
) -> TaskBatch:
    """
    Rows of a task's dataset with noise that is the same at every evaluation of a run. Positions beyond its end start
    over, with other noise.
    """
    rows = [prompt_at(dataset, position) for position in positions]
    seeds = [sample_seed(seed, f"{purpose}/{task}", 0, position) for position in positions]
    return TaskBatch(task, rows, [row[column] for row in rows], seeds, positions)


@dataclass
class Evaluator:
    """
    Draws and scores images of policies, always from the same noise.

    Args:
        sampler ([`PolicySampler`]):
            Rolls them out.
        prompts ([`PromptEncoder`]):
            Encodes their prompts.
        schedule ([`Schedule`]), solver (`str`), noise_level (`float`):
            How they are rolled out.
        seed (`int`):
            Seed of all noise.
        column (`str`):
            Column that holds the prompt.
        batch_size (`int`):
            Images drawn at once.
        chunk_size (`int`):
            Prompts encoded at once.
        num_images (`int`, *optional*):
            Images of each task; by default one of each prompt.
        reward_funcs (`dict[str, list[Callable]]`, *optional*), reward_weights (`list[float]`, *optional*):
            What images of the tasks are scored with, and the weight of each function.
        reward_timeout (`float`, *optional*):
            Seconds that a reward may take for a batch.
        process_index (`int`, *optional*, defaults to `0`), num_processes (`int`, *optional*, defaults to `1`):
            The processes that share the prompts, and this one among them.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
    """

    sampler: PolicySampler
    prompts: PromptEncoder
    schedule: Schedule
    solver: str
    noise_level: float
    seed: int
    column: str
    batch_size: int
    chunk_size: int
    num_images: int | None = None
    reward_funcs: dict[str, list[RewardFunc]] = field(default_factory=dict)
    reward_weights: list[float] | None = None
    reward_timeout: float | None = None
    process_index: int = 0
    num_processes: int = 1
    show_progress: bool = True

    def rollout(self, policy: Policy, conditioning: Conditioning, seeds: list[int]) -> Iterator[DenoisingStep]:
        """Rolls a policy out with the settings of evaluation, without gradients."""
        return self.sampler.rollout(
            policy, conditioning, seeds, self.schedule, solver=self.solver, noise_level=self.noise_level
        )

    def sample_latents(self, policy: Policy, batch: TaskBatch, conditioning: Conditioning) -> torch.Tensor:
        """The latents `[B, C, H, W]` at the end of a rollout."""
        kwargs = {"solver": self.solver, "noise_level": self.noise_level}
        return self.sampler.sample_latents(policy, conditioning, batch.seeds, self.schedule, **kwargs)

    def batch(self, data: Prompts, task: str, positions: list[int], purpose: str = "eval") -> TaskBatch:
        """See [`evaluation_batch`]."""
        return evaluation_batch(data, task, positions, seed=self.seed, column=self.column, purpose=purpose)

    def score(
        self,
        policy: Policy,
        datasets: dict[str, Prompts],
        *,
        measure: Measure | None = None,
        description: str = "Evaluating",
    ) -> dict[str, dict[str, float]]:
        """
        Rolls a policy out on every task, the prompts shared among all processes.

        Args:
            policy ([`Policy`]):
                The model to score.
            datasets (`dict[str, Dataset | StreamedPrompts]`):
                Prompts of each task.
            measure (`Callable`, *optional*):
                Rolls out in the place of `sample_latents` and measures along the way.
            description (`str`, *optional*):
                Title of the progress bar.

        Returns:
            `dict[str, dict[str, float]]`: means by task and metric: what was measured along the way, `reward` where the
            task has reward functions (their weighted sum; with several, each as `reward/<function>` too), and
            `reward_failures`, the number of images without a score, where there are any.
        """
        shares = {
            task: list(range(count))[self.process_index :: self.num_processes]
            for task, count in count_images(datasets, self.num_images).items()
        }
        total = sum(map(len, shares.values()))
        progress = tqdm(total=total, desc=description, disable=not self.show_progress, leave=False)
        scores = {}
        vae = self.sampler.pipeline.vae if set(datasets) & set(self.reward_funcs) else None
        with progress, on_device((vae,), self.sampler.device):
            for task, data in datasets.items():
                records: list[dict[str, float]] = []
                for first in range(0, len(shares[task]), self.chunk_size):
                    chunk = shares[task][first : first + self.chunk_size]
                    # Encoded once for all evaluations if they fit the cache, else chunk by chunk.
                    self._encode(datasets, shares if total <= self.chunk_size else {task: chunk})
                    for start in range(0, len(chunk), self.batch_size):
                        batch = self.batch(data, task, chunk[start : start + self.batch_size])
                        records += self._score_batch(policy, batch, measure)
                        progress.update(len(batch.prompts))
                scores[task] = _means(gather_object(records))
        return scores

    def _encode(self, datasets: dict[str, Prompts], positions: dict[str, list[int]]) -> None:
        prompts = [
            prompt_at(datasets[task], position)[self.column]
            for task, indices in positions.items()
            for position in indices
        ]
        self.prompts.prepare(tuple(prompts), lambda: prompts)

    def _score_batch(self, policy: Policy, batch: TaskBatch, measure: Measure | None) -> list[dict[str, float]]:
        conditioning = self.prompts.conditioning(batch.prompts)
        if measure is None:
            latents, metrics = self.sample_latents(policy, batch, conditioning), {}
        else:
            latents, metrics = measure(policy, batch, conditioning)
        columns = {name: values.tolist() for name, values in metrics.items()}
        if batch.task in self.reward_funcs:
            funcs, images = self.reward_funcs[batch.task], self.sampler.decode(latents)
            columns |= reward_columns(funcs, images, batch, self.reward_weights, timeout=self.reward_timeout)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def name_metrics(scores: dict[str, dict[str, float]], prefix: str) -> dict[str, float]:
    """`<prefix><metric>/<task>` of what [`Evaluator.score`] returned, and `<prefix>loss`, the mean of the divergences."""
    metrics = {f"{prefix}{name}/{task}": value for task, own in scores.items() for name, value in own.items()}
    if all("kl" in own for own in scores.values()):
        metrics[f"{prefix}loss"] = sum(own["kl"] for own in scores.values()) / len(scores)
    return metrics


def _means(records: list[dict[str, float]]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for name, value in record.items():
            values[name].append(value)
    means = {}
    for name, column in values.items():
        valid = [value for value in column if math.isfinite(value)]
        means[name] = sum(valid) / len(valid) if valid else math.nan
        if name == "reward" and len(valid) < len(column):
            means["reward_failures"] = float(len(column) - len(valid))
    return means
