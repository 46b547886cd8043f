# SPDX-License-Identifier: Apache-2.0
"""Prompt sets of the tasks, and which of their prompts a round uses."""

import math
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset


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
    """

    task: str
    rows: list[dict[str, Any]]
    prompts: list[str]
    seeds: list[int]


def load_prompts(source: str | Path, *, split: str = "train", column: str = "prompt", **kwargs) -> Dataset:
    """
    Loads a prompt set: a `.txt` file (a prompt a line), a `.jsonl` / `.json` / `.csv` / `.parquet` file, or a dataset
    of the Hub.

    Args:
        source (`str` or `Path`):
            Path or `https://` address of a file, path of a folder, or id of a Hub dataset.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a Hub dataset or folder.
        column (`str`, *optional*, defaults to `"prompt"`):
            Name that the lines of a `.txt` file get.
        kwargs:
            Passed on to `datasets.load_dataset`.

    Raises:
        `ValueError`: the path looks like a file but does not exist, or its type is unknown.
    """
    source = str(source)
    readers = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    reader = readers.get(Path(urlparse(source).path).suffix)
    if reader is None:
        return load_dataset(source, split=split, **kwargs)
    if source.startswith(("https://", "http://")):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / Path(urlparse(source).path).name
            torch.hub.download_url_to_file(source, str(file), progress=False)
            return load_prompts(file, column=column, **kwargs)
    if not Path(source).is_file():
        raise ValueError(f"The prompt file {source!r} does not exist. Check its spelling.")
    data = load_dataset(reader, data_files=source, split="train", **kwargs)
    if reader == "text":
        lines = (line.strip() for line in data["text"])
        return Dataset.from_dict({column: [line for line in lines if line]})
    return data


def task_datasets(
    data: Any, tasks: list[str] | None, *, column: str = "prompt", argument: str = "train_dataset"
) -> dict:
    """
    Brings the dataset argument of a trainer into the form `{task: Dataset}`.

    Args:
        data (`dict[str, Dataset | list | str | Path]` or `Dataset`):
            Per task a dataset, a list of prompts or rows, a file or a Hub id; or one dataset with a `"task"` column.
        tasks (`list[str]`, *optional*):
            Names that a task may have, those of the teachers.
        column (`str`, *optional*, defaults to `"prompt"`):
            Column that holds the prompt.
        argument (`str`, *optional*, defaults to `"train_dataset"`):
            Name of the argument, for errors.

    Raises:
        `ValueError`: a dataset without prompts, without the column, or with prompts that are not text.
    """
    if isinstance(data, (DatasetDict, IterableDatasetDict)):
        raise ValueError(
            f"`{argument}` is a dictionary of splits ({', '.join(data)}). Choose one, e.g. `{argument}=data['train']`."
        )
    if isinstance(data, (list, tuple)) and data and all(isinstance(row, Mapping) for row in data):
        data = Dataset.from_list(list(data))
    if isinstance(data, Dataset):
        if "task" not in data.column_names:
            raise ValueError(
                f"`{argument}` is one dataset without a `task` column (it has {data.column_names}), so its prompts "
                f"cannot be told apart. Add the column, or pass a dictionary with the keys {tasks}."
            )
        names = np.array(data["task"])
        data = {str(task): data.select(np.flatnonzero(names == task)) for task in dict.fromkeys(names.tolist())}
    if not isinstance(data, Mapping):
        raise ValueError(
            f"`{argument}` must be a dictionary from task to prompts or a dataset with a `task` column, but is a "
            f"{type(data).__name__}."
        )
    if tasks is not None and (unknown := sorted(set(data) - set(tasks))):
        raise ValueError(f"`{argument}` names unknown tasks {unknown}. The tasks are {list(tasks)}.")
    return {task: _as_dataset(value, task, column, argument) for task, value in data.items()}


def _as_dataset(data: Any, task: str, column: str, argument: str) -> Dataset:
    if isinstance(data, (str, Path)):
        data = load_prompts(data, column=column)
    elif isinstance(data, (list, tuple)):
        data = Dataset.from_list([{column: row} if isinstance(row, str) else row for row in data])
    where = f"`{argument}[{task!r}]`"
    if isinstance(data, IterableDataset):
        raise ValueError(
            f"{where} is a streaming dataset. Rounds draw prompts at random, so take what you need into memory: "
            "`Dataset.from_list(list(stream.take(10_000)))`."
        )
    if not isinstance(data, Dataset):
        raise ValueError(f"{where} must be a dataset, a list of prompts, a file or a Hub id, but is {type(data)}.")
    if len(data) == 0:
        raise ValueError(f"{where} has no rows. Give the task prompts, or leave it and its teacher out.")
    if column not in data.column_names:
        raise ValueError(
            f"{where} has no column {column!r}, only {data.column_names}. Rename one "
            f"(`dataset.rename_column(..., {column!r})`), or set `prompt_column`."
        )
    if not isinstance(data[0][column], str):
        raise ValueError(f"{where}: column {column!r} must hold text, but row 0 holds {data[0][column]!r}.")
    return data


class RoundSampler:
    """
    Which prompts and seeds every process uses in every round, as a pure function of the round's number.

    There is no state to save or to restore. A round holds `weight * batch_size * num_processes * num_micro_rounds`
    samples of each task; processes and micro-rounds take consecutive slices of them, so that the samples of a round
    do not depend on how many processes share the work. Each task walks through a fresh permutation of its prompts in
    every pass.

    Args:
        datasets (`dict[str, Dataset]`):
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
        num_processes (`int`, *optional*, defaults to `1`), process_index (`int`, *optional*, defaults to `0`):
            The processes that share a round, and this one among them.
    """

    def __init__(
        self,
        datasets: dict[str, Dataset],
        batch_size: int,
        seed: int,
        *,
        column: str = "prompt",
        weights: dict[str, int] | None = None,
        num_micro_rounds: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
    ):
        self.datasets = datasets
        self.batch_size = batch_size
        self.seed = seed
        self.column = column
        self.weights = {task: (weights or {}).get(task, 1) for task in datasets}
        self.num_micro_rounds = num_micro_rounds
        self.num_processes = num_processes
        self.process_index = process_index
        self._permutation: dict[str, tuple[int, np.ndarray]] = {}

    @property
    def rounds_per_epoch(self) -> int:
        """Rounds until every prompt of every task was used at least once."""
        share = self.batch_size * self.num_processes * self.num_micro_rounds
        return max(math.ceil(len(data) / (share * self.weights[task])) for task, data in self.datasets.items())

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

    def prompts_of(self, rounds: Iterable[int]) -> list[str]:
        """The prompts that this process draws in some rounds, in order."""
        return [
            prompt
            for round_index in rounds
            for micro_round in range(self.num_micro_rounds)
            for batch in self.batches(round_index, micro_round)
            for prompt in batch.prompts
        ]

    def distinct_prompts(self, at_most: int) -> list[str] | None:
        """The distinct prompts of all tasks, in a fixed order, or `None` if there are more than `at_most`."""
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
        data = self.datasets[task]
        rows = [data[self._prompt_index(task, round_index * per_round + position)] for position in positions]
        seeds = [sample_seed(self.seed, task, round_index, position) for position in positions]
        return TaskBatch(task, rows, [row[self.column] for row in rows], seeds)

    def _prompt_index(self, task: str, position: int) -> int:
        epoch, offset = divmod(position, len(self.datasets[task]))
        if self._permutation.get(task, (None,))[0] != epoch:
            rng = np.random.default_rng([self.seed, zlib.crc32(task.encode()), epoch])
            self._permutation[task] = (epoch, rng.permutation(len(self.datasets[task])))
        return int(self._permutation[task][1][offset])


def sample_seed(seed: int, task: str, round_index: int, position: int) -> int:
    """Seed of one sample's noise: never depends on the process that draws it."""
    entropy = np.random.SeedSequence([seed, zlib.crc32(task.encode()), round_index, position])
    return int(entropy.generate_state(1, np.uint64)[0] >> 1)  # torch takes 63 bits
