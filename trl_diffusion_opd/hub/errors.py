# SPDX-License-Identifier: Apache-2.0
"""What an error of the Hub means, and what is tried again."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar


if TYPE_CHECKING:
    from .locations import Source

T = TypeVar("T")
_WAITS = (1, 2, 4)  # seconds before the second, third and fourth attempt
_LONGEST_WAIT = 60  # what a server asks for beyond this is told to the user instead


class SourceError(OSError):
    """Something could not be found or fetched; the message names who asked for it and the remedy."""


def retried(call: Callable[[], T]) -> T:
    """
    Calls a function again if it fails for a reason that may pass: a server error, a rate limit, a broken connection.

    `huggingface_hub` asks again itself for the size and hash of a file, and goes on with a download that broke off; it
    gives up at once on other questions to the Hub, on server errors at the start of a download, and on connections
    that were reset.
    """
    for wait in (*_WAITS, None):
        try:
            return call()
        except Exception as error:
            asked = _retry_after(error)
            if wait is None or not _may_pass(error) or asked > _LONGEST_WAIT:
                raise
            time.sleep(max(wait, asked))


@contextmanager
def hub_errors(source: "Source", owner: str) -> Iterator[None]:
    """Turns what goes wrong with the Hub into one [`SourceError`] that says what to do."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import httpx

    try:
        yield
    except SourceError:
        raise
    except HFValidationError as error:
        raise SourceError(
            f"{owner}: {source.repo_id!r} is not a valid Hub repository name. Check the spelling. {error}"
        ) from error
    except (OSError, httpx.TransportError) as error:
        raise SourceError(f"{owner}: {explain(error, source)}") from error


def explain(error: Exception, source: "Source") -> str:
    """What an error of the Hub's clients means, and the remedy."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cause = _hub_cause(error)
    repo, page = source.repo_id, source.page
    if isinstance(cause, GatedRepoError):  # a subclass of RepositoryNotFoundError: it must come first
        return (
            f"the repository {repo!r} is gated. Accept its license at {page} and log in with `hf auth login` (or set "
            "HF_TOKEN)."
        )
    if isinstance(cause, RepositoryNotFoundError):
        return (
            f"the repository {repo!r} was not found on the Hub. Check the spelling; if it is private, log in with "
            "`hf auth login` (or set HF_TOKEN) using an account that can see it."
        )
    if isinstance(cause, RevisionNotFoundError):
        return (
            f"the repository {repo!r} has no revision {source.revision or 'main'!r}. Pass an existing branch, tag or "
            f"commit: {page}/commits."
        )
    if constants.HF_HUB_OFFLINE or isinstance(cause, OfflineModeIsEnabled):
        return (
            f"{source} is not in the local cache and HF_HUB_OFFLINE is set. Unset it, or download the files once "
            "while online."
        )
    reason = explain_failure(cause, page)
    return f"{source} is not in the local cache and {reason}" if reason else f"downloading {source} failed: {error}"


def explain_failure(error: Exception, page: str) -> str | None:
    """What kept the Hub from answering, and the remedy; `None` for an error of another kind."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    cause = _hub_cause(error)
    if isinstance(cause, httpx.ConnectError):
        return f"{constants.ENDPOINT} could not be reached. Check the connection and HF_ENDPOINT."
    if isinstance(cause, httpx.TimeoutException):
        return (
            f"{constants.ENDPOINT} did not answer in time. Check the connection, or give it more seconds with "
            "HF_HUB_DOWNLOAD_TIMEOUT and HF_HUB_ETAG_TIMEOUT."
        )
    if isinstance(cause, httpx.TransportError):
        return f"the connection to {constants.ENDPOINT} broke off. Check the connection and run it again."
    if not isinstance(cause, HfHubHTTPError):
        return None
    status, seconds = cause.response.status_code, _retry_after(cause)
    if status == 401:
        return (
            "the Hub refused access (HTTP 401): it does not know the token. Log in again with `hf auth login` (or set "
            "HF_TOKEN to a valid token)."
        )
    if status == 403:
        return (
            "the Hub refused access (HTTP 403). Log in with `hf auth login` (or set HF_TOKEN) using an account and a "
            f"token that can read {page}."
        )
    if status == 404:
        return f"the Hub does not have it (HTTP 404). Check the spelling at {page}."
    if status == 429:
        when = f"in {seconds} seconds" if seconds else "later"
        return (
            f"the Hub answered with HTTP 429, too many requests. Try again {when}; those who log in (`hf auth login`) "
            "may ask more often."
        )
    return f"the Hub answered with HTTP {status}. Try again later."


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _hub_cause(error: BaseException) -> BaseException:
    """The error of `huggingface_hub` that is behind one of the libraries that use it."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    for cause in _chain(error):
        if isinstance(cause, (HfHubHTTPError, httpx.TransportError, OfflineModeIsEnabled)):
            if not isinstance(cause, EntryNotFoundError):  # to look for a file that may be absent is no failure
                return cause
    return error


def _may_pass(error: BaseException) -> bool:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import httpx

    # So `huggingface_hub` and `datasets` end after attempts of their own.
    if any(isinstance(cause, LocalEntryNotFoundError) or type(cause) is ConnectionError for cause in _chain(error)):
        return False
    cause = _hub_cause(error)
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code in (408, 429) or cause.response.status_code >= 500
    return isinstance(cause, httpx.TransportError) and not isinstance(cause, httpx.TimeoutException)


def _retry_after(error: BaseException) -> int:
    """The seconds that the server asks to wait, 0 if it does not."""
    response = getattr(_hub_cause(error), "response", None)
    value = response.headers.get("Retry-After", "") if response is not None else ""
    return int(value) if value.isdigit() else 0
