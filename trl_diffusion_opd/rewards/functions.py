# SPDX-License-Identifier: Apache-2.0
"""Reward functions: what one is, which columns it needs, and how it is called."""

import asyncio
import inspect
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Lock, Thread
from typing import Any

import torch

from ..data.rounds import Prompts, TaskBatch
from .base import Reward
from .registry import load_reward


logger = logging.getLogger(__name__)

# Seconds for the scores of a batch: less than the 1800 after which other processes stop waiting (`ddp_timeout`).
REWARD_TIMEOUT = 900.0
# Seconds after which it is said what is waited for.
_PATIENCE = 60.0

# `f(images, prompts, **columns) -> scores`: images as a float tensor `[B, 3, H, W]` in `[0, 1]`, the other columns of
# the dataset as lists, and one number per image (`None` or NaN where scoring failed). May be async.
RewardFunc = Callable[..., list[float]]


def normalize_reward_funcs(
    reward_funcs: Mapping[str, RewardFunc | str | list[RewardFunc | str]], tasks: list[str]
) -> dict[str, list[RewardFunc]]:
    """
    Brings the reward functions into the form `{task: [callable, ...]}`; names of built-in rewards are looked up.

    Raises:
        `ValueError`: a task that is not trained, or something that cannot be called with images and prompts.
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
            _check_arguments(func, task)
    return normalized


def _check_arguments(func: RewardFunc, task: str) -> None:
    """Raises a `ValueError` for a function that takes other arguments, those of TRL's text rewards above all."""
    try:
        signature = inspect.signature(func)
    except (TypeError, ValueError):  # some that are written in C have none
        return
    names = list(signature.parameters)
    try:
        signature.bind_partial(None, None)
        fits = "completions" not in names and names[0] not in ("prompt", "prompts")
    except TypeError:
        fits = False
    if not fits:
        hint = " `completions` are what text models write: here, images are scored." if "completions" in names else ""
        raise ValueError(
            f"`reward_funcs[{task!r}]` has {reward_name(func)!r}, which takes {signature}.{hint} Write it as `f(images, "
            "prompts, **columns) -> list[float]`."
        )


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


@torch.no_grad()  # which holds for one thread only
def reward_columns(
    funcs: list[RewardFunc],
    images: torch.Tensor,
    batch: TaskBatch,
    weights: list[float] | None = None,
    *,
    timeout: float | None = REWARD_TIMEOUT,
) -> dict[str, list[float]]:
    """
    Scores a batch of images.

    Args:
        funcs (`list[Callable]`):
            The reward functions of the task.
        images (`torch.Tensor`):
            `[B, 3, H, W]`, in `[0, 1]`.
        batch ([`TaskBatch`]):
            The task, and the prompts and other columns of the images.
        weights (`list[float]`, *optional*):
            Weight of each function; 1 by default.
        timeout (`float`, *optional*, defaults to 900):
            Seconds that a function may take; `None` to wait for ever. Loading the models of a [`Reward`] does not count.

    Returns:
        `dict[str, list[float]]`: `reward`, the weighted sum, and with several functions `reward/<name>` of each. NaN
        where one failed.

    Raises:
        `TimeoutError`: a function took longer. `TypeError`, `ValueError`: it did not return one number per image.
    """
    extra: dict[str, list[Any]] = {
        name: [row.get(name) for row in batch.rows]  # rows of a stream need not have the same columns
        for name in dict.fromkeys(name for row in batch.rows for name in row)
        if name not in ("prompt", "prompts", "images")
    }
    columns = {}
    for index, func in enumerate(funcs):
        name = reward_name(func)
        if isinstance(func, Reward):
            func.load()
        values = _call(func, (images, batch.prompts), extra, f"the reward {name!r} of task {batch.task!r}", timeout)
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


def _call(func: RewardFunc, arguments: tuple, columns: dict[str, list], what: str, timeout: float | None) -> Any:
    """
    What a reward function returns, plain or async. It runs in a thread of its own, which nothing waits for any more
    once the time is over, without gradients and on the device of who asks.
    """
    result: Future[Any] = Future()
    device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None

    def run() -> None:
        try:
            if device is not None:
                torch.accelerator.set_device_index(device)
            with torch.no_grad():
                values = func(*arguments, **columns)
            if inspect.isawaitable(values):
                values = asyncio.run_coroutine_threadsafe(_awaited(values), _event_loop()).result()
            result.set_result(values)
        except BaseException as error:  # for who waits for the result
            result.set_exception(error)

    start = time.monotonic()
    Thread(target=run, name=what, daemon=True).start()
    if timeout is None or timeout > _PATIENCE:
        wait([result], _PATIENCE)
        if not result.done():
            limit = "there is no limit" if timeout is None else f"`reward_timeout` is {timeout:g} s"
            logger.warning(f"Still waiting for {what} after {_PATIENCE:g} s ({limit}).")
    wait([result], None if timeout is None else max(0.0, start + timeout - time.monotonic()))
    if not result.done():
        raise TimeoutError(
            f"Gave up on {what}: no scores for {len(arguments[0])} images within {timeout:g} s. Find out where it hangs, "
            "or raise `reward_timeout` (None waits for ever)."
        )
    return result.result()


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


def reward_threads(number: int) -> ThreadPoolExecutor:
    """Threads to score in, on the GPU of this process: a new thread starts on the first one."""
    if not torch.accelerator.is_available():
        return ThreadPoolExecutor(number)
    device = torch.accelerator.current_device_index()
    return ThreadPoolExecutor(number, initializer=torch.accelerator.set_device_index, initargs=(device,))
