# SPDX-License-Identifier: Apache-2.0
"""Scoring a policy on the prompts of every task: divergences along its rollouts, rewards of its images."""

import asyncio
import inspect
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .data import Prompts, TaskBatch, num_prompts, prompt_at, sample_seed
from .prompts import on_device
from .rewards import Reward, load_reward


if TYPE_CHECKING:
    from .base_trainer import DiffusionTrainer, Policy

# `f(images, prompts, **columns) -> scores`: images as a float tensor `[B, 3, H, W]` in `[0, 1]`, the other columns of
# the dataset as lists, and one number per image (`None` or NaN where scoring failed). May be async.
RewardFunc = Callable[..., list[float]]


def normalize_reward_funcs(
    reward_funcs: Mapping[str, RewardFunc | str | list[RewardFunc | str]], tasks: list[str]
) -> dict[str, list[RewardFunc]]:
    """
    Brings the reward functions into the form `{task: [callable, ...]}`; names of built-in rewards are looked up.

    Raises:
        `ValueError`: a task that is not trained, or something that cannot be called.
    """
    normalized = {}
    for task, funcs in reward_funcs.items():
        if task not in tasks:
            raise ValueError(f"`reward_funcs` names the unknown task {task!r}. The tasks are {tasks}.")
        funcs = list(funcs) if isinstance(funcs, (list, tuple)) else [funcs]
        if not funcs:
            raise ValueError(f"`reward_funcs[{task!r}]` is empty. Pass at least one function or the name of a reward.")
        normalized[task] = [load_reward(func) if isinstance(func, str) else func for func in funcs]
        for func in normalized[task]:
            if not callable(func):
                raise ValueError(
                    f"`reward_funcs[{task!r}]` must be callables `f(images, prompts, **columns) -> list[float]`, but "
                    f"one is {func!r}."
                )
    return normalized


def check_columns(
    reward_funcs: Mapping[str, list[RewardFunc]], datasets: Mapping[str, Prompts], argument: str
) -> None:
    """
    Raises a `ValueError` if the prompts of a task lack a column that one of its rewards needs.

    Args:
        reward_funcs (`dict[str, list[Callable]]`):
            From [`normalize_reward_funcs`].
        datasets (`dict[str, Dataset | StreamedPrompts]`):
            Prompts of the tasks.
        argument (`str`):
            Whose they are, for the error.
    """
    for task, funcs in reward_funcs.items():
        columns = list(datasets[task][0]) if task in datasets else None
        for reward in (func for func in funcs if isinstance(func, Reward) and columns is not None):
            if missing := reward.missing_columns(columns):
                raise ValueError(
                    f"The reward `{reward.name}` of task {task!r} needs the column {' and '.join(map(repr, missing))}, "
                    f"but `{argument}` has only {columns}. Add it (see docs/rewards.md), or choose another reward."
                )


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
        columns |= reward_columns(funcs, images, batch, trainer.reward_weights)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@torch.no_grad()  # which holds for one thread only
def reward_columns(
    funcs: list[RewardFunc], images: torch.Tensor, batch: TaskBatch, weights: list[float] | None = None
) -> dict[str, list[float]]:
    """
    Scores of a batch of images: `reward`, their weighted sum, and with several functions `reward/<name>` of each. NaN
    where one failed.
    """
    extra: dict[str, list[Any]] = {
        name: [row.get(name) for row in batch.rows]  # rows of a stream need not have the same columns
        for name in dict.fromkeys(name for row in batch.rows for name in row)
        if name not in ("prompt", "prompts", "images")
    }
    columns = {}
    for index, func in enumerate(funcs):
        name = reward_name(func)
        values = func(images, batch.prompts, **extra)
        if inspect.isawaitable(values):
            values = asyncio.run_coroutine_threadsafe(_awaited(values), _event_loop()).result()
        if not hasattr(values, "__len__"):
            raise TypeError(
                f"The reward function {name!r} of task {batch.task!r} returned {type(values).__name__}. It must return a "
                "list with one number per image."
            )
        if len(values) != len(images):
            raise ValueError(
                f"The reward function {name!r} of task {batch.task!r} returned {len(values)} scores for {len(images)} "
                "images. It must return one number per image."
            )
        name = f"reward/{name}" if f"reward/{name}" not in columns else f"reward/{name}_{index}"
        columns[name] = [math.nan if value is None else float(value) for value in values]
    weights = weights or [1.0] * len(funcs)
    total = [sum(w * v for w, v in zip(weights, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {"reward": total, **(columns if len(funcs) > 1 else {})}


def reward_name(func: RewardFunc) -> str:
    """What a reward function is called in logs and tables."""
    return getattr(func, "__name__", type(func).__name__)


async def _awaited(scores: Awaitable[list[float]]) -> list[float]:
    return await scores


_loops: list[asyncio.AbstractEventLoop] = []
_loops_lock = Lock()


def _event_loop() -> asyncio.AbstractEventLoop:
    """
    The event loop of all async rewards, in a thread of its own: clients with open connections belong to one loop for
    life, and the thread of a notebook has another one. It works without gradients, on the device of who asks first.
    """

    def serve(loop: asyncio.AbstractEventLoop, device: int | None) -> None:
        if device is not None:
            torch.accelerator.set_device_index(device)
        with torch.no_grad():
            loop.run_forever()

    with _loops_lock:
        if not _loops:
            device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
            _loops.append(asyncio.new_event_loop())
            Thread(target=serve, args=(_loops[0], device), name="async rewards", daemon=True).start()
        return _loops[0]


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
