# SPDX-License-Identifier: Apache-2.0
"""Where a LoRA comes from: a local path or a Hub repository, and how its files get onto this machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


PEFT_CONFIG_NAME = "adapter_config.json"
PEFT_WEIGHT_NAME = "adapter_model.safetensors"
DIFFUSERS_WEIGHT_NAME = "pytorch_lora_weights.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".ckpt", ".pth", ".pkl")


class SourceError(OSError):
    """The files of a LoRA could not be found or fetched; the message names who asked for them and the remedy."""


@dataclass(frozen=True)
class Source:
    """
    A parsed LoRA location: exactly one of `path` and `repo_id` is set.

    Args:
        repo_id (`str`, *optional*):
            Hub repository, as `owner/name`.
        subfolder (`str`, *optional*):
            Folder inside the repository.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.
        path (`Path`, *optional*):
            Local file or folder.
    """

    repo_id: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    path: Path | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return str(self.path)
        subfolder = f"/{self.subfolder}" if self.subfolder else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo_id}{subfolder}{revision}"


@dataclass(frozen=True)
class Resolved:
    """
    A LoRA that is on this machine.

    Args:
        path (`Path`):
            The local file or folder; for a Hub source, the downloaded weights file.
        commit (`str`, *optional*):
            The Hub commit the files belong to; not set for a local source.
    """

    path: Path
    commit: str | None = None


def parse_source(text: str | Path) -> Source:
    """
    Parses `"owner/repo"`, `"owner/repo/sub/folder"` or `"owner/repo/sub/folder@revision"`, or a local path.

    A file or folder that exists on disk wins over a Hub repository of the same name.

    Args:
        text (`str` or `Path`):
            The location. A `Path`, and a string that starts with `/`, `.` or `~`, is always local.

    Returns:
        [`Source`]: the parsed location. Nothing is looked up on the Hub.
    """
    path = Path(text).expanduser()
    if isinstance(text, Path) or text.startswith(("/", ".", "~")) or (text and path.exists()):
        return Source(path=path)
    if "://" in text:
        raise ValueError(
            f"A LoRA location is `owner/repo/subfolder@revision` or a local path, not a URL, but is {text!r}."
        )
    location, at, revision = text.partition("@")
    parts = location.split("/")
    if len(parts) < 2 or not all(parts) or (at and not revision):
        raise ValueError(
            f"A LoRA location must be an existing local path or `owner/repo`, `owner/repo/subfolder` or "
            f"`owner/repo/subfolder@revision`, but is {text!r}, which is neither (there is no such path on disk)."
        )
    return Source(repo_id="/".join(parts[:2]), subfolder="/".join(parts[2:]) or None, revision=revision or None)


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
        commit, error = _fetch(source, PEFT_CONFIG_NAME)[1:]
        # Not asked or no answer: the weights may still be in the cache, and asking again would only take time.
        cached_only = error is not None and not _is_absent(error)
        name = weight_name or (DIFFUSERS_WEIGHT_NAME if commit is None else PEFT_WEIGHT_NAME)
        # All files come from one commit, also if somebody pushes in the meantime.
        pinned = source if commit is None else Source(source.repo_id, source.subfolder, commit)
        path, commit, weights_error = _fetch(pinned, name, cached_only)
        if path is not None:
            return Resolved(path, commit)
        if cached_only:
            raise error
        if not _is_absent(weights_error):
            raise weights_error
        names = _list_names(pinned)
    _raise_absent(source, name, names, owner)


def fetch(source: Source, name: str, owner: str, **kwargs) -> Resolved:
    """
    Makes sure that one file of a Hub repository is on this machine; raises a [`SourceError`] that says what to do.
    `kwargs` (`token`, `cache_dir`, ...) go to `hf_hub_download`.
    """
    with hub_errors(source, owner):
        path, commit, error = _fetch(source, name, **kwargs)
        if error is not None and not _is_absent(error):
            raise error
    if path is None:
        raise SourceError(f"{owner}: there is no file {name!r} in {source}. Check the spelling.")
    return Resolved(path, commit)


def _fetch(
    source: Source, name: str, local_files_only: bool = False, **kwargs
) -> tuple[Path | None, str | None, Exception | None]:
    """Downloads one file; returns its path and commit, or why it is not there."""
    # Imported here because local teachers do not need the Hub client.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    filename = f"{source.subfolder}/{name}" if source.subfolder else name
    try:
        file = hf_hub_download(
            source.repo_id, filename, revision=source.revision, local_files_only=local_files_only, **kwargs
        )
    except EntryNotFoundError as error:
        return None, None, error
    # The cache stores a file at `snapshots/<commit>/<filename>`.
    path = Path(file)
    return path, path.parents[len(PurePosixPath(filename).parts) - 1].name, None


def _is_absent(error: Exception) -> bool:
    """Whether the Hub said that there is no such file, as opposed to not being asked or not answering."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return not isinstance(error, LocalEntryNotFoundError)


def _list_names(source: Source) -> list[str]:
    from huggingface_hub import HfApi

    return HfApi().list_repo_files(source.repo_id, revision=source.revision)


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


@contextmanager
def hub_errors(source: Source, owner: str) -> Iterator[None]:
    """Turns the errors of `huggingface_hub` into one [`SourceError`] that says what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo = source.repo_id
    try:
        yield
    except HFValidationError as error:
        raise SourceError(
            f"{owner}: {repo!r} is not a valid Hub repository name. Check the spelling. {error}"
        ) from error
    except GatedRepoError as error:  # a subclass of RepositoryNotFoundError: it must come first
        raise SourceError(
            f"{owner}: the repository {repo!r} is gated. Accept its licence at https://huggingface.co/{repo} and log "
            "in with `hf auth login` (or set HF_TOKEN)."
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{owner}: the repository {repo!r} was not found on the Hub. Check the spelling; if it is private, log in "
            "with `hf auth login` (or set HF_TOKEN) using an account that can see it."
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(
            f"{owner}: the repository {repo!r} has no revision {source.revision or 'main'!r}. Pass an existing "
            f"branch, tag or commit: https://huggingface.co/{repo}/commits."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        raise SourceError(f"{owner}: {source} is not in the local cache and {_explain(cause, repo)}") from error
    except OSError as error:
        raise SourceError(f"{owner}: downloading {source} failed: {error}") from error


def _explain(error: BaseException, repo: str) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if constants.HF_HUB_OFFLINE or isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it, or download the files once while online."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return (
                f"the Hub refused access (HTTP {status}). Log in with `hf auth login` (or set HF_TOKEN) using an "
                f"account that can see https://huggingface.co/{repo}."
            )
        return f"the Hub answered with HTTP {status}. Try again later."
    return f"{constants.ENDPOINT} could not be reached ({type(error).__name__}). Check the connection and HF_ENDPOINT."
