# SPDX-License-Identifier: Apache-2.0
"""Where models and prompts come from: a local path or a Hub repository, and how files get onto this machine."""

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .downloads import SourceError, fetch_checked, hub_errors, retried


PEFT_CONFIG_NAME = "adapter_config.json"
PEFT_WEIGHT_NAME = "adapter_model.safetensors"
DIFFUSERS_WEIGHT_NAME = "pytorch_lora_weights.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".ckpt", ".pth", ".pkl")


@dataclass(frozen=True)
class Source:
    """
    A parsed location: exactly one of `path` and `repo_id` is set.

    Args:
        repo_id (`str`, *optional*):
            Hub repository, as `owner/name`.
        subfolder (`str`, *optional*):
            Folder inside the repository.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.
        path (`Path`, *optional*):
            Local file or folder.
        repo_type (`str`, *optional*, defaults to `"model"`):
            `"model"` or `"dataset"`.
    """

    repo_id: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    path: Path | None = None
    repo_type: str = "model"

    def __str__(self) -> str:
        if self.path is not None:
            return str(self.path)
        subfolder = f"/{self.subfolder}" if self.subfolder else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo_id}{subfolder}{revision}"

    @property
    def page(self) -> str:
        """The page of the Hub repository."""
        return _page(self.repo_id, self.repo_type)


@dataclass(frozen=True)
class Resolved:
    """
    Files that are on this machine.

    Args:
        path (`Path`):
            The local file or folder; for a Hub source, the downloaded file.
        commit (`str`, *optional*):
            The Hub commit the files belong to; not set for a local source.
    """

    path: Path
    commit: str | None = None


@dataclass(frozen=True)
class Origin:
    """
    Where a model or a prompt set came from, told without naming this machine.

    Args:
        name (`str`):
            For the Hub `owner/repo[/sub/folder][@revision]` as it was asked for; for a local path its last two parts.
        repo_id (`str`, *optional*):
            Hub repository; not set for what is local.
        commit (`str`, *optional*):
            The Hub commit that was read.
        repo_type (`str`, *optional*, defaults to `"model"`):
            `"model"` or `"dataset"`.
    """

    name: str
    repo_id: str | None = None
    commit: str | None = None
    repo_type: str = "model"

    @classmethod
    def local(cls, path: str | Path, repo_type: str = "model") -> "Origin":
        """The origin of a local file or folder."""
        return cls("/".join(Path(path).resolve().parts[1:][-2:]), repo_type=repo_type)

    @classmethod
    def of_source(cls, source: Source, commit: str | None) -> "Origin":
        """The origin of what was read from a source."""
        if source.path is not None:
            return cls.local(source.path, source.repo_type)
        return cls(str(source), source.repo_id, commit, source.repo_type)

    @classmethod
    def of_model(cls, model: Any) -> "Origin":
        """The origin of a model in memory, as far as its config tells it; else the name of its class."""
        name = str(model.config.get("_name_or_path") or "")
        transformer = getattr(model, "transformer", model)
        folder = str(transformer.config.get("_name_or_path") or "")
        if cached := re.search(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})", f"{name} {folder}"):
            owner, repo, commit = cached.groups()
            return cls(f"{owner}/{repo}", f"{owner}/{repo}", commit)
        if name and Path(name).exists():
            return cls.local(name)
        return cls(name, name) if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else cls(type(model).__name__)

    @property
    def url(self) -> str | None:
        """Its page at that commit, for what is on the Hub."""
        if self.repo_id is None:
            return None
        return _page(self.repo_id, self.repo_type) + (f"/tree/{self.commit}" if self.commit else "")


def _page(repo_id: str, repo_type: str) -> str:
    return f"https://huggingface.co/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"


def parse_source(text: str | Path, *, kind: str = "LoRA", repo_type: str = "model") -> Source:
    """
    Parses `"owner/repo"`, `"owner/repo/sub/folder"` or `"owner/repo/sub/folder@revision"`, or a local path.

    A file or folder that exists on disk wins over a Hub repository of the same name.

    Args:
        text (`str` or `Path`):
            The location. A `Path`, and a string that starts with `/`, `.` or `~`, is always local.
        kind (`str`, *optional*, defaults to `"LoRA"`):
            What it is the location of, for the error messages.
        repo_type (`str`, *optional*, defaults to `"model"`):
            `"model"` or `"dataset"`.

    Returns:
        [`Source`]: the parsed location. Nothing is looked up on the Hub.
    """
    path = Path(os.path.expanduser(text))
    if isinstance(text, Path) or text.startswith(("/", ".", "~")) or (text and path.exists()):
        return Source(path=path, repo_type=repo_type)
    if "://" in text:
        raise ValueError(
            f"A {kind} location is `owner/repo/subfolder@revision` or a local path, not a URL, but is {text!r}."
        )
    location, at, revision = text.partition("@")
    parts = location.split("/")
    if len(parts) < 2 or not all(parts) or (at and not revision):
        raise ValueError(
            f"A {kind} location must be an existing local path or `owner/repo`, `owner/repo/subfolder` or "
            f"`owner/repo/subfolder@revision`, but is {text!r}, which is neither (there is no such path on disk)."
        )
    subfolder = "/".join(parts[2:]) or None
    return Source("/".join(parts[:2]), subfolder, revision or None, repo_type=repo_type)


def is_absolute(value: Any) -> bool:
    """Whether a value is the path of a place on this machine, which names the machine or its user."""
    return isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~"))


def check_not_pickle(name: str | Path, owner: str) -> None:
    """Raises a `ValueError` if the file called `name` is a pickle, because loading one can run any code."""
    if Path(name).suffix.lower() in PICKLE_SUFFIXES:
        raise ValueError(
            f"{owner}: {Path(name).name!r} is a pickle file and only safetensors is loaded, because reading a pickle "
            "can run code hidden in it. If you trust the file, convert it once: `safetensors.torch.save_file("
            f"torch.load({Path(name).name!r}, weights_only=True), {Path(name).stem + '.safetensors'!r})`."
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
        raise SourceError(f"{owner}: there is no file {name!r} in {source}. Check the spelling.")
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
    raise SourceError(f"{owner}: there is no file {name!r} in {source}. {hint}")
