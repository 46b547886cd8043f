# SPDX-License-Identifier: Apache-2.0
"""Scoring the pictures of an evaluation: one judge after the other, each in memory only while it is needed."""

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data import TaskBatch
from ..evaluation import check_columns, reward_columns, reward_name
from ..lookup import find_reward
from ..rewards import Reward, load_reward
from .folder import ResultsFolder
from .suites import Benchmark


# Pictures read from disk and given to a judge at once; it makes its own batches of them.
PICTURES_AT_ONCE = 64
# Options that do not change a score.
_NOT_RECORDED = ("api_key_env", "base_url", "batch_size", "device", "max_retries", "timeout")


@dataclass(frozen=True)
class Judge:
    """
    A reward as a judge of benchmarks.

    Args:
        name (`str`):
            What it is called in tables and files.
        description (`str`):
            What it is, with the options that change its scores: kept to tell it from others of its name.
        func (`Callable`):
            The reward.
        benchmarks (`tuple[str, ...]`):
            Benchmarks that it judges.
        built_in (`bool`):
            Whether it is one of the rewards of this package.
        sha256 (`str`, *optional*):
            Fingerprint of the file that a function is in.
    """

    name: str
    description: str
    func: Callable[..., list[float]]
    benchmarks: tuple[str, ...]
    built_in: bool
    sha256: str | None = None


def make_judges(
    benchmarks: Sequence[Benchmark],
    device: torch.device,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Judge]:
    """
    The judges of the benchmarks. Their models are not loaded yet.

    Args:
        benchmarks (`Sequence[Benchmark]`):
            What is to be judged.
        device (`torch.device`):
            Where their models are going to run.
        options (`Mapping[str, Mapping[str, Any]]`, *optional*):
            Arguments of built-in rewards, by reward.

    Raises:
        `ValueError`: a reward that cannot be found, two of one name, or options of one that is not there.
        `ImportError`: a package that a reward needs is not installed.
    """
    options = options or {}
    specs = list(dict.fromkeys(spec for benchmark in benchmarks for spec in benchmark.rewards))
    if idle := sorted(set(options) - set(specs)):
        raise ValueError(f"`--reward_options` names {idle[0]!r}, but the rewards are {', '.join(specs)}.")
    judges = [_make_judge(spec, benchmarks, device, dict(options.get(spec, {}))) for spec in specs]
    for benchmark in benchmarks:
        own = [judge.name for judge in judges if benchmark.name in judge.benchmarks]
        if len(set(own)) < len(own):
            raise ValueError(f"Two rewards of {benchmark.name!r} have the same name: {', '.join(benchmark.rewards)}.")
    return judges


def _make_judge(spec: str, benchmarks: Sequence[Benchmark], device: torch.device, options: dict[str, Any]) -> Judge:
    func = find_reward(spec)
    built_in = isinstance(func, str)
    description = spec.replace("\\", "/").rpartition("/")[2]  # without the folder of a file
    if built_in:
        # The benchmark's own judgement, not the partial score of training.
        options = ({"strict": True} if spec == "geneval" else {}) | options
        try:
            func = load_reward(spec, **{"device": device, **options})
        except TypeError as error:
            raise ValueError(f"`--reward_options` of {spec!r}: {error}.") from error
        told = [f"{key}={value}" for key, value in sorted(options.items()) if key not in _NOT_RECORDED]
        description += f" ({', '.join(told)})" if told else ""
    elif options:
        raise ValueError(f"`--reward_options` are for built-in rewards, and {spec!r} is none.")
    names = tuple(benchmark.name for benchmark in benchmarks if spec in benchmark.rewards)
    return Judge(reward_name(func), description, func, names, built_in, None if built_in else _source_sha256(func))


def _source_sha256(func: Callable) -> str | None:
    try:
        file = inspect.getsourcefile(inspect.unwrap(func))
    except TypeError:  # an object that can be called
        file = inspect.getsourcefile(type(func))
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None


def check_judges(judges: Sequence[Judge], rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Raises a `ValueError` if the prompts of a benchmark lack a column that one of its judges needs."""
    for name in rows:
        check_columns({name: [judge.func for judge in judges if name in judge.benchmarks]}, rows, "prompts")


def score_pictures(
    judge: Judge,
    folder: ResultsFolder,
    wanted: Mapping[tuple[str, str], Sequence[int]],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    process: int = 0,
    show_progress: bool = True,
) -> None:
    """
    Scores pictures and writes the scores as they come. The judge leaves memory afterwards.

    Args:
        judge ([`Judge`]):
            The judge.
        folder ([`ResultsFolder`]):
            Where the pictures are.
        wanted (`Mapping[tuple[str, str], Sequence[int]]`):
            Positions of the pictures by model and benchmark.
        rows (`Mapping[str, Sequence[Mapping]]`):
            The prompts of each benchmark.
        process (`int`, *optional*, defaults to `0`):
            Number of this process, which has files of its own.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
    """
    total = sum(map(len, wanted.values()))
    try:
        with tqdm(total=total, desc=f"Scoring by {judge.name}", disable=not show_progress) as progress:
            for (model, benchmark), places in wanted.items():
                prompts = rows[benchmark]
                for start in range(0, len(places), PICTURES_AT_ONCE):
                    part = places[start : start + PICTURES_AT_ONCE]
                    own = [dict(prompts[position % len(prompts)]) for position in part]
                    batch = TaskBatch(benchmark, own, [row["prompt"] for row in own], [], list(part))
                    images = folder.load_pictures(model, benchmark, part)
                    scores = reward_columns([judge.func], images, batch)["reward"]
                    folder.add_scores(model, benchmark, judge.name, process, dict(zip(part, scores, strict=True)))
                    progress.update(len(part))
    finally:
        if isinstance(judge.func, Reward):
            judge.func.free()
