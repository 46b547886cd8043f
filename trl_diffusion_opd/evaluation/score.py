# SPDX-License-Identifier: Apache-2.0
"""Scoring a policy on the prompts of every task: divergences along its rollouts, rewards of its images."""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..data.rounds import Prompts, TaskBatch, num_prompts, prompt_at, sample_seed
from ..rewards.functions import reward_columns
from ..utils.hardware import on_device


if TYPE_CHECKING:
    from ..models.sampler import Policy
    from ..trainers.base_trainer import DiffusionTrainer


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


def score_policy(
    trainer: "DiffusionTrainer",
    policy: "Policy",
    datasets: dict[str, Prompts],
    *,
    description: str = "Evaluating",
    rewards_only: bool = False,
) -> dict[str, dict[str, float]]:
    """
    Rolls a policy out on every task, the prompts shared among all processes.

    Args:
        trainer ([`DiffusionTrainer`]):
            Owner of the models and of the settings of evaluation.
        policy ([`Policy`]):
            The model to score.
        datasets (`dict[str, Dataset | StreamedPrompts]`):
            Prompts of each task.
        description (`str`, *optional*):
            Title of the progress bar.
        rewards_only (`bool`, *optional*, defaults to `False`):
            Whether to leave out what `trainer.rollout_metrics` measures along the way.

    Returns:
        `dict[str, dict[str, float]]`: means by task and metric: what `trainer.rollout_metrics` measures, `reward` where
        the task has reward functions (their weighted sum; with several, each as `reward/<function>` too), and
        `reward_failures`, the number of images without a score, where there are any.
    """
    args, device = trainer.args, trainer.accelerator.device
    size, step = args.per_device_eval_batch_size, trainer.args.prompt_cache_size
    shares = {
        task: list(range(count))[args.process_index :: args.world_size]
        for task, count in count_images(datasets, args.num_eval_images).items()
    }
    total = sum(map(len, shares.values()))
    progress = tqdm(
        total=total,
        desc=description,
        disable=args.disable_tqdm or not trainer.is_world_process_zero(),
        leave=False,
    )
    scores = {}
    vae = trainer.pipeline.vae if set(datasets) & set(trainer.reward_funcs) else None
    with progress, on_device((vae,), device):
        for task, data in datasets.items():
            records: list[dict[str, float]] = []
            for first in range(0, len(shares[task]), step):
                chunk = shares[task][first : first + step]
                # Encoded once for all evaluations if they fit the cache, else chunk by chunk.
                wanted = shares if total <= step else {task: chunk}
                prompts = _prompts_at(datasets, wanted, args.prompt_column)
                trainer.eval_prompts.prepare(tuple(prompts), lambda prompts=prompts: prompts)
                for start in range(0, len(chunk), size):
                    batch = evaluation_batch(
                        data, task, chunk[start : start + size], seed=args.seed, column=args.prompt_column
                    )
                    records += _score_batch(trainer, policy, batch, rewards_only)
                    progress.update(len(batch.prompts))
            scores[task] = _means(gather_object(records))
    return scores


def _prompts_at(datasets: dict[str, Prompts], positions: dict[str, list[int]], column: str) -> list[str]:
    return [prompt_at(datasets[task], position)[column] for task, indices in positions.items() for position in indices]


def _score_batch(
    trainer: "DiffusionTrainer", policy: "Policy", batch: TaskBatch, rewards_only: bool
) -> list[dict[str, float]]:
    conditioning = trainer.eval_prompts.conditioning(batch.prompts)
    if rewards_only:
        latents, metrics = trainer.final_latents(policy, batch, conditioning), {}
    else:
        latents, metrics = trainer.rollout_metrics(policy, batch, conditioning)
    columns = {name: values.tolist() for name, values in metrics.items()}
    if batch.task in trainer.reward_funcs:
        funcs, images = trainer.reward_funcs[batch.task], trainer.decode(latents)
        columns |= reward_columns(funcs, images, batch, trainer.reward_weights, timeout=trainer.args.reward_timeout)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


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
