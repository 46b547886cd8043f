# SPDX-License-Identifier: Apache-2.0
"""The prompts of the tasks by position, and which of them a round uses."""

import itertools
import logging
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from huggingface_hub.utils import httpx

from ..hub.errors import SourceError, explain_failure, retried


logger = logging.getLogger(__name__)


@dataclass
class TaskBatch:
    """
    Samples of one task. The task, and with it the teacher, travels with the samples.

    Args:
        task (`str`):
            Name of the task.
        rows (`list[dict]`):
            Rows of the task's dataset.
        prompts (`list[str]`):
            Their prompts.
        seeds (`list[int]`):
            Seed of each sample's noise, a function of run seed, round, task and position alone.
        groups (`list[int]`):
            Number of each sample's prompt in the course of the run. Samples of one number share a prompt.
        student_prompts (`list[str]`, *optional*):
            What the student is asked instead of the prompts.
    """

    task: str
    rows: list[dict[str, Any]]
    prompts: list[str]
    seeds: list[int]
    groups: list[int]
    student_prompts: list[str] | None = None

    @property
    def asked(self) -> list[str]:
        """The prompts that the student draws."""
        return self.prompts if self.student_prompts is None else self.student_prompts


class StreamedPrompts:
    """
    Rows of a stream by position, read as far as they are asked for and kept. A stream that ends starts over.

    Row `i` is always the same one, so that nothing has to be saved to resume: the rows are read again from the start.
    Columns that hold anything but text, numbers and lists of them (images, sound, bytes) are left out.

    Args:
        stream ([`~datasets.IterableDataset`]):
            The stream. It must give the same rows in the same order whenever it is iterated.
        owner (`str`):
            Whose prompts these are, for the error messages.
        column (`str`):
            What the column that holds the prompt is called in the rows.
        own_column (`str`, *optional*):
            What it is called in the stream, if that is something else.
    """

    def __init__(self, stream: IterableDataset, *, owner: str, column: str, own_column: str | None = None):
        self.owner = owner
        self.column = column
        self.own_column = own_column or column
        self._stream = stream
        self._iterator: Iterator[dict[str, Any]] | None = None
        self._rows: list[dict[str, Any]] = []
        self._read = 0  # rows, those with an empty prompt too
        self._ended = False

    def __getitem__(self, position: int) -> dict[str, Any]:
        while not self._ended and len(self._rows) <= position:
            self._read_row()
        return self._rows[position % len(self._rows)]

    def _read_row(self) -> None:
        try:
            row = retried(self._next_row)
        except (OSError, httpx.TransportError) as error:
            reason = explain_failure(error, "its repository") or f"{error}."
            raise SourceError(
                f"{self.owner}: row {self._read} of the stream could not be read, also after some attempts: "
                f"{reason} If training had begun, the last checkpoint is intact: resume from it with "
                "`resume_from_checkpoint`."
            ) from error
        except ValueError as error:
            raise ValueError(f"{self.owner}: row {self._read} of the stream cannot be read: {error}") from error
        if row is None:
            self._ended = True
            if not self._rows:
                raise no_rows(self.owner)
            return
        self._read += 1
        if self.own_column not in row:
            raise ValueError(f"{self.owner} has no column {self.own_column!r}, only {list(row)}. Set `column` to one.")
        row = dict(row)  # maybe the very one of the user's list
        prompt = row.pop(self.own_column)
        check_prompt(prompt, self.owner, self.own_column, self._read - 1)
        if not prompt.strip():
            if self._read == len(self._rows) + 1:  # the first of them
                logger.warning("%s: row %d has an empty prompt; such rows are left out.", self.owner, self._read - 1)
            return
        self._rows.append({self.column: prompt, **{name: value for name, value in row.items() if is_plain(value)}})

    def _next_row(self) -> dict[str, Any] | None:
        try:
            if self._iterator is None:
                self._iterator = itertools.islice(self._stream, self._read, None)
            return next(self._iterator, None)
        except Exception:
            self._iterator = None  # an iterator that raised is at its end: the next attempt starts afresh
            raise


Prompts = Dataset | StreamedPrompts
StudentPrompt = Callable[[dict[str, Any], int], str]


def no_rows(owner: str) -> ValueError:
    """The error of a set without prompts."""
    return ValueError(f"{owner} has no rows. Give the task prompts, or leave it and its teacher out.")


def check_prompt(prompt: Any, owner: str, column: str, row: int) -> None:
    """Raises a `ValueError` if a prompt is no text."""
    if not isinstance(prompt, str):
        raise ValueError(f"{owner}: column {column!r} must hold text, but row {row} holds {prompt!r}.")


def is_plain(value: Any) -> bool:
    """Whether a value is text, a number, nothing, or lists and dictionaries of these: what JSON holds."""
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, str | int | float)


def num_prompts(data: Prompts) -> int | None:
    """Number of prompts of a set, `None` for a stream."""
    return None if isinstance(data, StreamedPrompts) else len(data)


def spread(data: Prompts, count: int) -> list[int]:
    """Positions of up to `count` prompts: spread over a set, the first ones of a stream."""
    total = num_prompts(data)
    if total is None:
        return list(range(count))
    count = min(count, total)
    return [index * total // count for index in range(count)]


def prompt_at(data: Prompts, position: int) -> dict[str, Any]:
    """The row at a position; positions beyond the end start over."""
    total = num_prompts(data)
    return data[position if total is None else position % total]


class RoundSampler:
    """
    Which prompts and seeds every process uses in every round, as a pure function of the round's number.

    There is no state to save or to restore. A round holds `weight * batch_size * num_processes * num_micro_rounds`
    samples of each task; processes and micro-rounds take consecutive slices of them, so that the samples of a round
    do not depend on how many processes share the work. Each task walks through a fresh permutation of its prompts in
    every pass, or through its stream as it comes.

    Args:
        datasets (`dict[str, Dataset | StreamedPrompts]`):
            Prompts of each task.
        batch_size (`int`):
            Samples per task, process and micro-round.
        seed (`int`):
            Seed of the run.
        column (`str`, *optional*, defaults to `"prompt"`):
            Column that holds the prompt.
        weights (`dict[str, int]`, *optional*):
            Batches of each task in a round; 1 by default.
        num_micro_rounds (`int`, *optional*, defaults to `1`):
            Gradient accumulation steps.
        num_generations (`int`, *optional*, defaults to `1`):
            Consecutive samples of a task that share a prompt.
        num_processes (`int`, *optional*, defaults to `1`), process_index (`int`, *optional*, defaults to `0`):
            The processes that share a round, and this one among them.
        student_prompt (`Callable`, *optional*):
            `f(row, seed) -> str`, the prompt that the student is asked, if it is another one than its row's.
    """

    def __init__(
        self,
        datasets: dict[str, Prompts],
        batch_size: int,
        seed: int,
        *,
        column: str = "prompt",
        weights: dict[str, int] | None = None,
        num_micro_rounds: int = 1,
        num_generations: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
        student_prompt: StudentPrompt | None = None,
    ):
        self.datasets = datasets
        self.batch_size = batch_size
        self.seed = seed
        self.column = column
        self.weights = {task: (weights or {}).get(task, 1) for task in datasets}
        self.num_micro_rounds = num_micro_rounds
        self.num_generations = num_generations
        self.num_processes = num_processes
        self.process_index = process_index
        self.student_prompt = student_prompt
        self._permutation: dict[str, tuple[int, np.ndarray]] = {}

    @property
    def rounds_per_epoch(self) -> int | None:
        """Rounds until every prompt of every task was used at least once, `None` if a task has a stream."""
        share = self.batch_size * self.num_processes * self.num_micro_rounds / self.num_generations
        totals = {task: num_prompts(data) for task, data in self.datasets.items()}
        if None in totals.values():
            return None
        return max(math.ceil(total / (share * self.weights[task])) for task, total in totals.items())

    def batches(self, round_index: int, micro_round: int = 0) -> list[TaskBatch]:
        """This process's batches in a (micro-)round, in the order in which all processes visit the tasks."""
        return [
            self._batch(task, round_index, micro_round * weight + repeat)
            for task, weight in self.weights.items()
            for repeat in range(weight)
        ]

    @property
    def prompts_per_round(self) -> int:
        """Prompts that this process draws in a round."""
        return self.batch_size * self.num_micro_rounds * sum(self.weights.values())

    @property
    def embeddings_per_round(self) -> int:
        """Prompts that have to be encoded for a round."""
        return self.prompts_per_round * (1 if self.student_prompt is None else 2)

    def prompts_of(self, rounds: Iterable[int]) -> list[str]:
        """The prompts that this process draws in some rounds, in order."""
        return [
            prompt
            for round_index in rounds
            for micro_round in range(self.num_micro_rounds)
            for batch in self.batches(round_index, micro_round)
            for prompt in [*batch.prompts, *(batch.student_prompts or ())]
        ]

    def distinct_prompts(self, at_most: int) -> list[str] | None:
        """
        The distinct prompts of all tasks, in a fixed order, or `None` if there are more than `at_most`, a task has a
        stream, or the student is asked other ones.
        """
        if self.rounds_per_epoch is None or self.student_prompt is not None:
            return None
        found: dict[str, None] = {}
        for data in self.datasets.values():
            for prompt in data[self.column]:
                found[prompt] = None
                if len(found) > at_most:
                    return None
        return list(found)

    def _batch(self, task: str, round_index: int, block: int) -> TaskBatch:
        per_round = self.batch_size * self.num_processes * self.num_micro_rounds * self.weights[task]
        start = (block * self.num_processes + self.process_index) * self.batch_size
        positions = range(start, start + self.batch_size)
        groups = [(round_index * per_round + position) // self.num_generations for position in positions]
        rows = [self.datasets[task][self._prompt_index(task, group)] for group in groups]
        seeds = [sample_seed(self.seed, task, round_index, position) for position in positions]
        asked = None
        if self.student_prompt is not None:
            asked = [self.student_prompt(row, seed) for row, seed in zip(rows, seeds, strict=True)]
        return TaskBatch(task, rows, [row[self.column] for row in rows], seeds, groups, asked)

    def _prompt_index(self, task: str, position: int) -> int:
        total = num_prompts(self.datasets[task])
        if total is None:
            return position
        epoch, offset = divmod(position, total)
        if self._permutation.get(task, (None,))[0] != epoch:
            rng = np.random.default_rng([self.seed, zlib.crc32(task.encode()), epoch])
            self._permutation[task] = (epoch, rng.permutation(total))
        return int(self._permutation[task][1][offset])


def sample_seed(seed: int, task: str, round_index: int, position: int) -> int:
    """Seed of one sample's noise: never depends on the process that draws it."""
    entropy = np.random.SeedSequence([seed, zlib.crc32(task.encode()), round_index, position])
    return int(entropy.generate_state(1, np.uint64)[0] >> 1)  # torch takes 63 bits
