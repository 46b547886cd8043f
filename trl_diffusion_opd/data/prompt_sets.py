# SPDX-License-Identifier: Apache-2.0
"""Prompt sets of the tasks: from the Hub, from files, from lists and from streams."""

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import datasets.config
import numpy as np
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetsError
from huggingface_hub import constants

from ..hub.download import fetch, find_commit
from ..hub.errors import SourceError, hub_errors, retried
from ..hub.locations import Origin, Source, parse_source
from .rounds import StreamedPrompts


_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_prompts(
    source: str | Path | Mapping[str, Any], *, column: str = "prompt", owner: str = "prompts"
) -> tuple[Dataset | StreamedPrompts, Origin]:
    """
    Loads a prompt set: a `.txt` file (a prompt a line), a `.jsonl` / `.json` / `.csv` / `.parquet` file, a folder, or
    a dataset of the Hub, of which only the files of the chosen split are fetched.

    Args:
        source (`str`, `Path` or `dict`):
            Path or `https://` address of a file, path of a folder, or `owner/name[/sub/folder][@revision]` on the Hub.
            Or a mapping with that as `path` and any of `name` (configuration), `split` (`"train"` by default),
            `revision`, `column` (the one that holds the prompt), `streaming` (`True` reads rows as they are needed) and
            other arguments of `datasets.load_dataset_builder`.
        column (`str`, *optional*, defaults to `"prompt"`):
            What the column that holds the prompt is called in the result.
        owner (`str`, *optional*, defaults to `"prompts"`):
            Whose prompts these are, for the error messages.

    Returns:
        `tuple[Dataset | StreamedPrompts, Origin]`: the prompts and where they came from.

    Raises:
        `SourceError`: the set cannot be found or fetched; the message says what to do.
        `ValueError`: the source is no prompt set, or its files cannot be read.
    """
    options = dict(source) if isinstance(source, Mapping) else {"path": source}
    if not isinstance(options.get("path"), (str, Path)):
        raise ValueError(f"{owner}: a mapping must have the `path` of the prompts, but has {list(options)}.")
    path, own_column = options.pop("path"), options.pop("column", column)
    with _reading_errors(path, owner):
        if Path(urlparse(str(path)).path).suffix in _READERS:
            data, origin = _load_file(path, owner, own_column, **options)
        else:
            data, origin = _load_set(path, owner, **options)
    if isinstance(data, IterableDataset):
        name = f"{owner} ({origin.name})"
        return StreamedPrompts(data, owner=name, column=column, own_column=own_column), origin
    if own_column != column:
        if own_column not in data.column_names:
            raise ValueError(f"{owner} has no column {own_column!r}, only {data.column_names}. Set `column` to one.")
        data = data.rename_column(own_column, column)
    return data, origin


@contextmanager
def _reading_errors(path: str | Path, owner: str) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except (DatasetsError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{owner}: {str(path)!r} cannot be read: {reason}") from error


def _load_file(
    path: str | Path, owner: str, column: str, split: str = "train", streaming: bool = False, **options
) -> tuple[Dataset | IterableDataset, Origin]:
    address = urlparse(str(path))
    remote = address.scheme in ("https", "http")
    if remote and streaming:
        raise ValueError("a file at an address cannot be streamed. Leave `streaming` out, or download it yourself.")
    if remote:
        origin = Origin(f"{address.scheme}://{address.hostname}{address.path}", repo_type="dataset")
    elif Path(path).is_file():
        origin = Origin.local(path, "dataset")
    else:
        raise SourceError(
            f"{owner}: the prompt file {str(path)!r} does not exist. Check its spelling. (A file of a Hub dataset is "
            "named by a mapping with `path`, the dataset, and `data_files`.)"
        )
    reader = _READERS[Path(address.path).suffix]
    with tempfile.TemporaryDirectory() as folder:
        file = str(path)
        if remote:
            file = str(Path(folder) / Path(address.path).name)
            try:
                retried(lambda: torch.hub.download_url_to_file(str(path), file, progress=False))
            except OSError as error:
                raise SourceError(f"{owner}: downloading {origin.name} failed: {error}. Check the address.") from error
        data = load_dataset(
            reader, data_files={split.partition("[")[0]: file}, split=split, streaming=streaming, **options
        )
    if reader == "text" and streaming:
        data = data.map(lambda row: {column: row["text"].strip()}, remove_columns="text")
        data = data.filter(lambda row: row[column])
    elif reader == "text":
        lines = (line.strip() for line in data["text"])
        data = Dataset.from_dict({column: [line for line in lines if line]})
    return data, origin


def _load_set(
    path: str | Path,
    owner: str,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    **options,
) -> tuple[Dataset | IterableDataset, Origin]:
    source = parse_source(path, kind="prompt set", repo_type="dataset")
    if source.path is not None:
        if not source.path.is_dir():
            raise SourceError(f"{owner}: the folder {str(path)!r} does not exist. Check its spelling.")
        data = load_dataset(str(source.path), split=split, streaming=streaming, **options)
        return data, Origin.local(source.path, "dataset")
    if revision is not None:
        if source.revision is not None:
            raise ValueError(f"the revision is there twice, as `revision={revision!r}` too. Keep one of them.")
        source = replace(source, revision=revision)
    if source.subfolder is not None:
        options["data_dir"] = source.subfolder
    return _load_from_hub(source, split, streaming, owner, options)


def _load_from_hub(
    source: Source, split: str, streaming: bool, owner: str, options: dict[str, Any]
) -> tuple[Dataset | IterableDataset, Origin]:
    repo = Source(source.repo_id, revision=source.revision, repo_type="dataset")
    access = {"token": options["token"]} if "token" in options else {}
    commit = find_commit(repo, "README.md", owner, **access)
    # A folder of its own in the cache: what is there under the usual name is expected to have all splits.
    cache = Path(options.pop("cache_dir", datasets.config.HF_DATASETS_CACHE)) / "splits" / split
    with hub_errors(source, owner):
        builder = retried(
            lambda: load_dataset_builder(
                source.repo_id, revision=commit or source.revision, cache_dir=str(cache), **options
            )
        )
    wanted = commit or source.revision
    if wanted is not None and builder.hash != wanted:  # offline, `datasets` takes any commit that is in its cache
        raise SourceError(
            f"{owner}: {source} is not in the local cache, only its commit {builder.hash} is, and the Hub was not "
            "asked or did not answer. Unset HF_HUB_OFFLINE and check the connection, or ask for that commit."
        )
    if (files := builder.config.data_files) is not None and split != "all":
        names = {part.partition("[")[0].strip() for part in split.split("+")}
        if absent := sorted(names - set(files)):
            raise ValueError(f"there is no split {', '.join(map(repr, absent))}, only {list(files)}. Set `split`.")
        for name in set(files) - names:
            del files[name]
    if streaming:
        with hub_errors(source, owner):
            return retried(lambda: builder.as_streaming_dataset(split)), Origin.of_source(source, builder.hash)
    prefix = f"hf://datasets/{source.repo_id}@{builder.hash}/"
    for file in (file for of_split in (files or {}).values() for file in of_split if file.startswith(prefix)):
        fetch(repo, file.removeprefix(prefix), owner, commit=builder.hash, **access)
    with hub_errors(source, owner):
        retried(lambda: builder.download_and_prepare(verification_mode="no_checks"))
    return builder.as_dataset(split), Origin.of_source(source, builder.hash)


def origin_of(data: Dataset | IterableDataset) -> Origin:
    """
    Where a dataset in memory came from, as far as can be told: the Hub dataset in whose cache its rows lie.
    """
    for file in getattr(data, "cache_files", ()):
        if found := re.search(
            r"[/\\]([^/\\]+)___[^/\\]+(?:[/\\][^/\\]+){2}[/\\]([0-9a-f]{40})[/\\]", file["filename"]
        ):
            owner, commit = found.groups()
            # The name in that path is not the repository's: its capitals are lost.
            hub_cache = Path(constants.HF_HUB_CACHE)
            for folder in hub_cache.glob(f"datasets--{owner}--*/*/{commit}"):
                repo_id = folder.parents[1].name.removeprefix("datasets--").replace("--", "/", 1)
                return Origin(repo_id, repo_id, commit, "dataset")
    return Origin("in memory" if isinstance(data, Dataset) else "a stream", repo_type="dataset")


def task_datasets(
    data: Any, tasks: list[str] | None, *, column: str = "prompt", argument: str = "train_dataset"
) -> tuple[dict[str, Dataset | StreamedPrompts], dict[str, Origin]]:
    """
    Brings the dataset argument of a trainer into the form `{task: prompts}`.

    Args:
        data (`dict[str, Dataset | IterableDataset | list | str | Path | dict]` or `Dataset`):
            Per task a dataset, a stream, a list of prompts or rows, or anything that [`load_prompts`] takes; or one
            dataset with a `"task"` column.
        tasks (`list[str]`, *optional*):
            Names that a task may have, those of the teachers.
        column (`str`, *optional*, defaults to `"prompt"`):
            Column that holds the prompt.
        argument (`str`, *optional*, defaults to `"train_dataset"`):
            Name of the argument, for errors.

    Returns:
        `tuple[dict, dict]`: the prompts of each task, and where they came from.

    Raises:
        `ValueError`: a dataset without prompts, without the column, or with prompts that are not text.
        `SourceError`: a set that cannot be found or fetched.
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
    loaded = {task: _prompts_of(value, column, f"`{argument}[{task!r}]`") for task, value in data.items()}
    return {task: prompts for task, (prompts, _) in loaded.items()}, {task: o for task, (_, o) in loaded.items()}


def _prompts_of(data: Any, column: str, owner: str) -> tuple[Dataset | StreamedPrompts, Origin]:
    if isinstance(data, (str, Path, Mapping)):
        data, origin = load_prompts(data, column=column, owner=owner)
    else:
        if isinstance(data, (list, tuple)):
            data = Dataset.from_list([{column: row} if isinstance(row, str) else row for row in data])
        if not isinstance(data, (Dataset, IterableDataset)):
            raise ValueError(f"{owner} must be a dataset, a list of prompts, a file or a Hub id, but is {type(data)}.")
        origin = origin_of(data)
        if isinstance(data, IterableDataset):
            data = StreamedPrompts(data, owner=owner, column=column)
    if isinstance(data, Dataset) and len(data) == 0:
        raise ValueError(f"{owner} has no rows. Give the task prompts, or leave it and its teacher out.")
    if isinstance(data, Dataset) and column not in data.column_names:
        raise ValueError(
            f"{owner} has no column {column!r}, only {data.column_names}. Rename one "
            f"(`dataset.rename_column(..., {column!r})`), or set `prompt_column`."
        )
    if not isinstance(data[0][column], str):
        raise ValueError(f"{owner}: column {column!r} must hold text, but row 0 holds {data[0][column]!r}.")
    return data, origin
