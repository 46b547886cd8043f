# SPDX-License-Identifier: Apache-2.0
"""Prompt sets of the tasks: from the Hub, from files, from lists and from streams."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets.config
import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetsError
from huggingface_hub import constants

from ..hub.download import fetch, find_commit
from ..hub.errors import SourceError, hub_errors, retried
from ..hub.locations import Origin, Source, parse_source, shown
from .prompt_files import is_address, load_file, reader_of
from .rounds import StreamedPrompts, check_prompt, no_rows
from .tasks import check_task_name


logger = logging.getLogger(__name__)
# Options of a mapping that `datasets` does not check.
_KINDS = {"path": (str, Path), "name": str, "split": str, "revision": str, "column": str, "streaming": bool}


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
    if "path" not in options:
        raise ValueError(f"{owner}: a mapping must have the `path` of the prompts, but has {list(options)}.")
    for name, kinds in _KINDS.items():
        if name in options and not isinstance(options[name], kinds):
            kind = "true or false" if kinds is bool else "text"
            raise ValueError(f"{owner}: `{name}` must be {kind}, but is {options[name]!r}.")
    path, own_column = options.pop("path"), options.pop("column", column)
    with _reading_errors(path, owner):
        if reader_of(path) is not None:
            data, origin = load_file(path, owner, own_column, **options)
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
    except StopIteration:  # what `datasets` ends with if there is not even a first row
        raise no_rows(owner) from None
    except (DatasetsError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        if unknown := re.search(r"(?:unexpected keyword argument|doesn't have a) '(\w+)'", reason):
            usual = ", ".join(f"`{name}`" for name in _KINDS)
            reason = f"there is no option {unknown[1]!r}. The usual ones are {usual}."
        elif "scripts are no longer supported" in reason:
            reason += ". Convert it to a file, or name its data by `data_files`."
        reason = reason.replace(str(path), shown(path))
        raise ValueError(f"{owner}: {shown(path)!r} cannot be read: {reason}") from (
            None if is_address(path) else error
        )


def _load_set(
    path: str | Path,
    owner: str,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    **options,
) -> tuple[Dataset | IterableDataset, Origin]:
    if is_address(path):
        raise ValueError("the address of a prompt file must end in .txt, .jsonl, .json, .csv or .parquet.")
    source = parse_source(path, kind="prompt set", repo_type="dataset")
    if source.path is not None:
        if not source.path.is_dir():
            raise SourceError(f"{owner}: the folder {str(path)!r} does not exist. Check its spelling.")
        if saved := _saved_to_disk(source.path, split.partition("[")[0]):
            options["data_files"] = {split.partition("[")[0]: saved}
        data = load_dataset("arrow" if saved else str(source.path), split=split, streaming=streaming, **options)
        return data, Origin.local(source.path, "dataset")
    if revision is not None:
        if source.revision is not None:
            raise ValueError(f"the revision is there twice, as `revision={revision!r}` too. Keep one of them.")
        source = replace(source, revision=revision)
    if source.subfolder is not None:
        options["data_dir"] = source.subfolder
    return _load_from_hub(source, split, streaming, owner, options)


def _saved_to_disk(folder: Path, split: str) -> list[str]:
    """The files of a dataset or of a split that `save_to_disk` wrote into a folder; none if it did not."""
    if (folder / "dataset_dict.json").is_file():
        if not (folder / split).is_dir():
            splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
            raise ValueError(f"there is no split {split!r}, only {splits}. Set `split`.")
        folder = folder / split
    if not (folder / "state.json").is_file():
        return []
    return [str(file) for file in sorted(folder.glob("*.arrow"))]


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
        if None in (missing := names.tolist()):
            raise ValueError(f"`{argument}`: row {missing.index(None)} has no `task`. Name it, or leave the row out.")
        data = {str(task): data.select(np.flatnonzero(names == task)) for task in dict.fromkeys(names.tolist())}
    if not isinstance(data, Mapping):
        raise ValueError(
            f"`{argument}` must be a dictionary from task to prompts or a dataset with a `task` column, but is a "
            f"{type(data).__name__}."
        )
    for task in data:
        check_task_name(task)
    if tasks is not None and (unknown := sorted(set(data) - set(tasks))):
        raise ValueError(f"`{argument}` names unknown tasks {unknown}. The tasks are {list(tasks)}.")
    loaded = {task: _prompts_of(value, column, f"`{argument}[{task!r}]`") for task, value in data.items()}
    return {task: prompts for task, (prompts, _) in loaded.items()}, {task: o for task, (_, o) in loaded.items()}


def _prompts_of(data: Any, column: str, owner: str) -> tuple[Dataset | StreamedPrompts, Origin]:
    if isinstance(data, (str, Path, Mapping)):
        data, origin = load_prompts(data, column=column, owner=owner)
    else:
        if isinstance(data, (list, tuple)):
            data = _from_list(data, column, owner)
        if not isinstance(data, (Dataset, IterableDataset)):
            raise ValueError(f"{owner} must be a dataset, a list of prompts, a file or a Hub id, but is {type(data)}.")
        origin = origin_of(data)
        if isinstance(data, IterableDataset):
            data = StreamedPrompts(data, owner=owner, column=column)
    if isinstance(data, StreamedPrompts):
        data[0]  # which raises what is wrong with it
        return data, origin
    return _checked(data, column, owner), origin


def _from_list(rows: list | tuple, column: str, owner: str) -> Dataset:
    rows = [{column: row} if isinstance(row, str) else row for row in rows]
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"{owner} must hold prompts or rows (dictionaries), but row {index} is {row!r}.")
        check_prompt(row.get(column, ""), owner, column, index)
    try:
        return Dataset.from_list([dict(row) for row in rows])
    except (ValueError, TypeError) as error:  # of pyarrow, for columns of several types
        raise ValueError(f"{owner}: the rows have no common form: {error}. Give each column one type.") from error


def _checked(data: Dataset, column: str, owner: str) -> Dataset:
    """The rows with a prompt, each of which is text."""
    if len(data) == 0:
        raise no_rows(owner)
    if column not in data.column_names:
        raise ValueError(
            f"{owner} has no column {column!r}, only {data.column_names}. Rename one "
            f"(`dataset.rename_column(..., {column!r})`), or set `prompt_column`."
        )
    kept, index = [], 0
    for batch in data.select_columns(column).iter(batch_size=1000):  # which is fast, and a column is not
        for prompt in batch[column]:
            check_prompt(prompt, owner, column, index)
            if prompt.strip():
                kept.append(index)
            index += 1
    if not kept:
        raise no_rows(owner)
    if len(kept) < len(data):
        logger.warning("%s: %d of %d rows have an empty prompt and are left out.", owner, index - len(kept), index)
        data = data.select(kept)
    return data
