# SPDX-License-Identifier: Apache-2.0
"""Download files of the Hub and check them."""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from .errors import AbsentError, SourceError, hub_errors, retried
from .locations import (
    DIFFUSERS_WEIGHT_NAME,
    PEFT_CONFIG_NAME,
    PEFT_WEIGHT_NAME,
    PICKLE_SUFFIXES,
    Resolved,
    Source,
    check_not_pickle,
    parse_source,
)


def resolve(source: Source | str | Path, *, weight_name: str | None = None, owner: str = "LoRA") -> Resolved:
    """
    Makes sure that the files of a LoRA are on this machine; only those that are needed are downloaded.

    Args:
        source ([`Source`], `str` or `Path`):
            The location, parsed with [`parse_source`] if it is text.
        weight_name (`str`, *optional*):
            File to load. By default PEFT's `adapter_model.safetensors` is used if there is an `adapter_config.json`,
            else diffusers' `pytorch_lora_weights.safetensors`.
        owner (`str`, *optional*, defaults to `"LoRA"`):
            Who needs the files, for the error messages.

    Returns:
        [`Resolved`]: the local path and, for a Hub source, the commit.
    """
    source = source if isinstance(source, Source) else parse_source(source)
    if weight_name is not None:
        check_not_pickle(weight_name, owner)
    if source.path is not None:
        if not source.path.exists():
            raise SourceError(f"{owner}: the local path {str(source.path)!r} does not exist. Check the spelling.")
        return Resolved(source.path)
    return _download(source, weight_name, owner)


def _download(source: Source, weight_name: str | None, owner: str) -> Resolved:
    with hub_errors(source, owner):
        config, commit, error = _fetch(source, PEFT_CONFIG_NAME, owner)
        # Not asked or no answer: the weights may still be in the cache, and asking again would only take time.
        cached_only = error is not None and not _is_absent(error)
        name = weight_name or (DIFFUSERS_WEIGHT_NAME if config is None else PEFT_WEIGHT_NAME)
        # All files come from one commit, also if somebody pushes in the meantime.
        path, commit, weights_error = _fetch(source, name, owner, commit=commit, local_files_only=cached_only)
        if path is not None:
            return Resolved(path, commit)
        if cached_only:
            raise error
        if not _is_absent(weights_error):
            raise weights_error
        names = _list_names(source)
    _raise_absent(source, name, names, owner)


def fetch(source: Source, name: str, owner: str, *, commit: str | None = None, **kwargs) -> Resolved:
    """
    Makes sure that one file of a Hub repository, at `commit` if given, is on this machine; raises a [`SourceError`]
    that says what to do. `kwargs` (`token`, `cache_dir`, ...) go to `hf_hub_download`.
    """
    with hub_errors(source, owner):
        path, commit, error = _fetch(source, name, owner, commit=commit, **kwargs)
        if error is not None and not _is_absent(error):
            raise error
    if path is None:
        raise AbsentError(f"{owner}: there is no file {name!r} in {source}. Check the spelling.")
    return Resolved(path, commit)


def find_commit(source: Source, name: str, owner: str, **kwargs) -> str | None:
    """
    The commit that a Hub source is at, told by a request for one of its files, which need not be there. `None` if
    HF_HUB_OFFLINE is set and the file is not in the cache.
    """
    from huggingface_hub import constants

    with hub_errors(source, owner):
        _, commit, error = _fetch(source, name, owner, **kwargs)
        if error is not None and not _is_absent(error) and not constants.HF_HUB_OFFLINE:
            raise error
    return commit


def _fetch(
    source: Source, name: str, owner: str, *, commit: str | None = None, **kwargs
) -> tuple[Path | None, str | None, Exception | None]:
    """Downloads one file; returns its path and commit, or why it is not there."""
    # Imported here because local teachers do not need the Hub client.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    filename = f"{source.subfolder}/{name}" if source.subfolder else name

    def download() -> Path:
        file = hf_hub_download(
            source.repo_id, filename, revision=commit or source.revision, repo_type=source.repo_type, **kwargs
        )
        return Path(file)

    try:
        path = fetch_checked(download, source, owner, lambda path: [path])
    except EntryNotFoundError as error:
        response = getattr(error, "response", None)
        return None, response.headers.get("X-Repo-Commit") if response is not None else None, error
    # The cache stores a file at `snapshots/<commit>/<filename>`.
    return path, path.parents[len(PurePosixPath(filename).parts) - 1].name, None


def _is_absent(error: Exception) -> bool:
    """Whether the Hub said that there is no such file, as opposed to not being asked or not answering."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return not isinstance(error, LocalEntryNotFoundError)


def _list_names(source: Source) -> list[str]:
    from huggingface_hub import HfApi

    return retried(lambda: HfApi().list_repo_files(source.repo_id, revision=source.revision))


def _raise_absent(source: Source, name: str, names: list[str], owner: str) -> None:
    folder = PurePosixPath(source.subfolder or ".")
    here = [PurePosixPath(other) for other in names if PurePosixPath(other).parent == folder]
    weights = [other.name for other in here if other.suffix == ".safetensors"]
    pickles = [other.name for other in here if other.suffix in PICKLE_SUFFIXES]
    if pickles and not weights:
        check_not_pickle(pickles[0], f"{owner} ({source})")
    if weights:
        hint = f"The folder holds {', '.join(map(repr, weights))}: pass one of them as `weight_name`."
    else:
        folders = sorted({str(PurePosixPath(other).parent) for other in names if other.endswith(".safetensors")})
        hint = f"Folders of the repository with safetensors files: {', '.join(map(repr, folders)) or 'none'}."
    raise AbsentError(f"{owner}: there is no file {name!r} in {source}. {hint}")


def is_damaged(path: Path) -> bool:
    """
    Whether a file in the Hub's cache is not the one that the Hub named, which `huggingface_hub` does not check.

    The link in the cache ends with the ETag, which for large files is their SHA-256. What has another kind of ETag
    (small text files) passes.
    """
    sha256 = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() != sha256


def fetch_checked(call: Callable[[], Path], source: "Source", owner: str, files: Callable[[Path], list[Path]]) -> Path:
    """
    Downloads and checks the files; those that arrived damaged are thrown away and fetched once more.

    Args:
        call (`Callable[[], Path]`):
            Downloads what is not in the cache yet.
        source ([`Source`]), owner (`str`):
            What is fetched and for whom, for the error messages.
        files (`Callable[[Path], list[Path]]`):
            From what `call` returns to the files to check.
    """
    for _ in range(2):
        path = retried(call, f"{owner}: downloading {source}")
        damaged = [file for file in files(path) if is_damaged(file)]
        if not damaged:
            return path
        for file in damaged:
            (file.parent / os.readlink(file)).unlink()
            file.unlink()
    names = ", ".join(repr(file.name) for file in damaged)
    raise SourceError(
        f"{owner}: {names} of {source} arrived damaged twice: what came does not have the SHA-256 that the Hub names. "
        "Nothing was kept. Try again later, or from another network."
    )
