# SPDX-License-Identifier: Apache-2.0
"""Prompt files, on this machine or at an address."""

import hashlib
import json
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

import datasets.config
from datasets import Dataset, IterableDataset, load_dataset
from filelock import FileLock
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import hf_raise_for_status, httpx

from ..hub.errors import SourceError, retried
from ..hub.locations import Origin, shown


_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_TIMEOUT = 30  # seconds without a byte


def is_address(path: str | Path) -> bool:
    """Whether a path is the address of a file on the web."""
    return str(path).lower().startswith(("https://", "http://"))


def reader_of(path: str | Path) -> str | None:
    """The packaged module of `datasets` that reads a file, by its ending; `None` if there is none."""
    name = urlsplit(str(path)).path if is_address(path) else str(path)
    return _READERS.get(Path(name).suffix.lower())


def load_file(
    path: str | Path, owner: str, column: str, split: str = "train", streaming: bool = False, **options
) -> tuple[Dataset | IterableDataset, Origin]:
    """
    Loads a prompt file.

    Args:
        path (`str` or `Path`):
            Its path, or its address.
        owner (`str`):
            Whose prompts these are, for the error messages.
        column (`str`):
            Column that the lines of a text file become.
        split (`str`, *optional*, defaults to `"train"`):
            Name of the split, and which of its rows.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows as they are needed.
        options:
            Further arguments of `datasets.load_dataset`.

    Returns:
        `tuple[Dataset | IterableDataset, Origin]`: the rows, and where they came from.

    Raises:
        `SourceError`: there is no such file, or it cannot be fetched.
        `ValueError`: a stream of a file at an address.
    """
    if is_address(path):
        if streaming:
            raise ValueError(
                "a file at an address cannot be streamed. Leave `streaming` out, or download it yourself."
            )
        origin, file = Origin(shown(path), repo_type="dataset"), _download(str(path), owner)
    elif Path(path).is_file():
        origin, file = Origin.local(path, "dataset"), Path(path)
    else:
        raise SourceError(
            f"{owner}: the prompt file {shown(path)!r} does not exist. Check its spelling. (A file of a Hub dataset is "
            "named by a mapping with `path`, the dataset, and `data_files`.)"
        )
    reader = reader_of(path)
    if reader == "text":  # the others know a byte order mark, which only this encoding takes away
        options = {"encoding": "utf-8-sig", **options}
    files = {split.partition("[")[0]: str(file)}
    data = load_dataset(reader, data_files=files, split=split, streaming=streaming, **options)
    if reader == "text" and streaming:
        data = data.map(lambda row: {column: row["text"].strip()}, remove_columns="text")
        data = data.filter(lambda row: row[column])
    elif reader == "text":
        lines = (line.strip() for line in data["text"])
        data = Dataset.from_dict({column: [line for line in lines if line]})
    return data, origin


def _download(address: str, owner: str) -> Path:
    """
    The file at an address, from the cache of `datasets` unless the server has another one by now. Of the processes of
    a machine one asks at a time; the next ones find its copy.
    """
    parts = urlsplit(address)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "prompt_files" / hashlib.sha256(address.encode()).hexdigest()
    file = folder / (Path(unquote(parts.path)).name)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock"):
            retried(lambda: _refresh(address, file))
    except (OSError, httpx.HTTPError, httpx.InvalidURL) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        # What the client says of a status has the whole address.
        reason = f"the server answered with HTTP {status}" if status else str(error).replace(address, shown(address))
        reason = reason.rstrip(".")
        raise SourceError(f"{owner}: downloading {shown(address)} failed: {reason}. Check the address.") from None
    return file


def _refresh(address: str, file: Path) -> None:
    """Downloads a file if there is none, or the server says that it is another one."""
    version = file.with_name(".version.json")
    known = json.loads(version.read_text(encoding="utf-8")) if file.is_file() and version.is_file() else {}
    asked = {"ETag": "If-None-Match", "Last-Modified": "If-Modified-Since"}
    headers = {asked[name]: value for name, value in known.items()}
    with httpx.stream("GET", address, headers=headers, follow_redirects=True, timeout=_TIMEOUT) as response:
        if response.status_code == httpx.codes.NOT_MODIFIED:
            return
        hf_raise_for_status(response)
        partial = file.with_name(".partial")
        with open(partial, "wb") as out:
            for chunk in response.iter_bytes():
                out.write(chunk)
        version.unlink(missing_ok=True)  # the two files never belong to different answers
        os.replace(partial, file)
        kept = {name: response.headers[name] for name in asked if name in response.headers}
        version.write_text(json.dumps(kept), encoding="utf-8")
