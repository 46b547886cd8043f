# SPDX-License-Identifier: Apache-2.0
"""Where models and prompts are: a local path or a repository on the Hub."""

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit


PEFT_CONFIG_NAME = "adapter_config.json"
PEFT_WEIGHT_NAME = "adapter_model.safetensors"
DIFFUSERS_WEIGHT_NAME = "pytorch_lora_weights.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".ckpt", ".pth", ".pkl")
# Where `huggingface_hub` keeps the files of a commit.
_CACHED = re.compile(
    r"[/\\](model|dataset)s--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]([0-9a-f]{40})(?![^/\\])((?:[/\\].*)?)$"
)


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
        """The origin of a local file or folder; for one in the cache of the Hub, the repository it was fetched from."""
        # The links of the cache are not followed: they lead to where nothing tells the repository.
        if cached := _CACHED.search(os.path.abspath(os.path.expanduser(path))):
            kind, owner, repo, commit, inside = cached.groups()
            folder = PurePosixPath(inside.replace("\\", "/").strip("/"))
            folder = folder.parent if Path(path).expanduser().is_file() else folder
            name = "/".join([owner, repo, *folder.parts])
            return cls(name, f"{owner}/{repo}", commit, kind)
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
        for place in (name, folder):
            if _CACHED.search(place):
                origin = cls.local(place)
                return cls(origin.repo_id, origin.repo_id, origin.commit)
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


def shown(path: str | Path) -> str:
    """A path as it may be printed: an address without its user, password and query, which may be secret."""
    if "://" not in str(path):
        return str(path)
    parts = urlsplit(str(path))
    return f"{parts.scheme}://{parts.hostname}{parts.path}"


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

    Raises:
        `ValueError`: it is neither an existing path nor of that form, or a part of it is `.` or `..`.
    """
    path = Path(os.path.expanduser(text))
    if isinstance(text, Path) or text.startswith(("/", ".", "~")) or (text and path.exists()):
        return Source(path=path, repo_type=repo_type)
    if "://" in text:
        raise ValueError(
            f"A {kind} location is `owner/repo/subfolder@revision` or a local path, not a URL, but is {shown(text)!r}."
        )
    location, at, revision = text.partition("@")
    parts = location.split("/")
    if len(parts) < 2 or not all(parts) or (at and not revision):
        raise ValueError(
            f"A {kind} location must be an existing local path or `owner/repo`, `owner/repo/subfolder` or "
            f"`owner/repo/subfolder@revision`, but is {text!r}, which is neither (there is no such path on disk)."
        )
    check_inside(location, kind)
    subfolder = "/".join(parts[2:]) or None
    return Source("/".join(parts[:2]), subfolder, revision or None, repo_type=repo_type)


def check_inside(location: str, kind: str = "LoRA") -> None:
    """Raises a `ValueError` if a location in a repository has a part `.` or `..`: it might lead out of it."""
    if {".", ".."} & set(location.split("/")):
        raise ValueError(
            f"A {kind} location on the Hub must not have `.` or `..` among its parts, but is {location!r}. Name the "
            "repository and the folder themselves, as in `owner/repo/subfolder`."
        )


def check_not_pickle(name: str | Path, owner: str) -> None:
    """Raises a `ValueError` if the file called `name` is a pickle, because loading one can run any code."""
    if Path(name).suffix.lower() in PICKLE_SUFFIXES:
        raise ValueError(
            f"{owner}: {Path(name).name!r} is a pickle file and only safetensors is loaded, because reading a pickle "
            "can run code hidden in it. If you trust the file, convert it once: `safetensors.torch.save_file("
            f"torch.load({Path(name).name!r}, weights_only=True), {Path(name).stem + '.safetensors'!r})`."
        )
