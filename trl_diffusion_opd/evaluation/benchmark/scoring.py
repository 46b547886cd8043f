# SPDX-License-Identifier: Apache-2.0
"""Scoring the images of an evaluation: one scorer after the other, each in memory only while it is needed."""

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ...data.rounds import TaskBatch
from ...rewards import load_reward
from ...rewards.base import Reward
from ...rewards.functions import check_columns, reward_columns, reward_name
from ...rewards.lookup import find_reward
from .folder import STATISTICS_FILE, ResultsFolder
from .suites import Benchmark


# Images read from disk and given to a scorer at once; it makes its own batches of them.
IMAGES_AT_ONCE = 64
# Options that do not change a score.
_NOT_RECORDED = ("api_key_env", "base_url", "batch_size", "device", "max_retries", "timeout")


@dataclass(frozen=True)
class Scorer:
    """
    A reward as a scorer of benchmarks.

    Args:
        name (`str`):
            What it is called in tables and files.
        description (`str`):
            What it is, with the options that change its scores: kept to tell it from others of its name.
        func (`Callable`):
            The reward.
        benchmarks (`tuple[str, ...]`):
            Benchmarks that it scores.
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


def make_scorers(
    benchmarks: Sequence[Benchmark],
    device: torch.device,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Scorer]:
    """
    The scorers of the benchmarks. Their models are not loaded yet.

    Args:
        benchmarks (`Sequence[Benchmark]`):
            What is to be scored.
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
    scorers = [_make_scorer(spec, benchmarks, device, dict(options.get(spec, {}))) for spec in specs]
    for benchmark in benchmarks:
        own = [scorer.name for scorer in scorers if benchmark.name in scorer.benchmarks]
        if len(set(own)) < len(own):
            raise ValueError(f"Two rewards of {benchmark.name!r} have the same name: {', '.join(benchmark.rewards)}.")
        if STATISTICS_FILE in own:
            raise ValueError(
                f"A reward cannot be called {STATISTICS_FILE!r}, as the files of the image statistics are. Rename it."
            )
    return scorers


def _make_scorer(spec: str, benchmarks: Sequence[Benchmark], device: torch.device, options: dict[str, Any]) -> Scorer:
    func = find_reward(spec)
    built_in = isinstance(func, str)
    description = spec.replace("\\", "/").rpartition("/")[2]  # without the folder of a file
    if built_in:
        # The benchmark's own score, not the partial score of training.
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
    return Scorer(reward_name(func), description, func, names, built_in, None if built_in else _source_sha256(func))


def _source_sha256(func: Callable) -> str | None:
    try:
        file = inspect.getsourcefile(inspect.unwrap(func))
    except TypeError:  # an object that can be called
        file = inspect.getsourcefile(type(func))
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None


def check_scorers(scorers: Sequence[Scorer], rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Raises a `ValueError` if the prompts of a benchmark lack a column that one of its scorers needs."""
    for name in rows:
        check_columns({name: [scorer.func for scorer in scorers if name in scorer.benchmarks]}, rows, "prompts")


def score_images(
    scorer: Scorer,
    folder: ResultsFolder,
    wanted: Mapping[tuple[str, str], Sequence[int]],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    process: int = 0,
    show_progress: bool = True,
) -> None:
    """
    Scores images and writes the scores as they come. The scorer leaves memory afterwards.

    Args:
        scorer ([`Scorer`]):
            The scorer.
        folder ([`ResultsFolder`]):
            Where the images are.
        wanted (`Mapping[tuple[str, str], Sequence[int]]`):
            Positions of the images by model and benchmark.
        rows (`Mapping[str, Sequence[Mapping]]`):
            The prompts of each benchmark.
        process (`int`, *optional*, defaults to `0`):
            Number of this process, which has files of its own.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
    """
    total = sum(map(len, wanted.values()))
    try:
        with tqdm(total=total, desc=f"Scoring by {scorer.name}", disable=not show_progress) as progress:
            for (model, benchmark), places in wanted.items():
                prompts = rows[benchmark]
                for start in range(0, len(places), IMAGES_AT_ONCE):
                    part = places[start : start + IMAGES_AT_ONCE]
                    own = [dict(prompts[position % len(prompts)]) for position in part]
                    batch = TaskBatch(benchmark, own, [row["prompt"] for row in own], [], list(part))
                    images = folder.load_images(model, benchmark, part)
                    scores = reward_columns([scorer.func], images, batch)["reward"]
                    found = dict(zip(part, scores, strict=True))
                    made_of = scorer.func.parts if isinstance(scorer.func, Reward) else []
                    folder.add_scores(model, benchmark, scorer.name, process, found, made_of)
                    progress.update(len(part))
    finally:
        if isinstance(scorer.func, Reward):
            scorer.func.free()
