# SPDX-License-Identifier: Apache-2.0
"""What an error of the Hub means, what is to be done about it, and what is tried again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from . import waiting
from .waiting import chain, limit_waits, seconds_asked


if TYPE_CHECKING:
    from .locations import Source

T = TypeVar("T")
PASSING = (408, 409, 412, 429)  # time-outs, somebody else's commit, rate limits; and what is wrong with the server


class SourceError(OSError):
    """Something could not be found or fetched; the message names who asked for it and the remedy."""


class AbsentError(SourceError):
    """A repository is there, but does not have such a file."""


def retried(call: Callable[[], T], what: str = "Asking the Hub", **options) -> T:
    """
    Calls a function again if it fails for a reason that may pass: a server error, a rate limit, a broken connection.

    `huggingface_hub` asks again itself for the size and hash of a file, and goes on with a download that broke off; it
    gives up at once on other questions to the Hub, on server errors at the start of a download, and on connections
    that were reset. For `what` and the `options` see [`waiting.retried`].
    """
    return waiting.retried(call, what, **{"may_pass": _may_pass, **options})


@contextmanager
def hub_errors(source: "Source", owner: str) -> Iterator[None]:
    """Turns what goes wrong with the Hub into one [`SourceError`] that says what to do."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import httpx

    limit_waits()
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
    return explain_answer(cause, page)


def explain_answer(error: Exception, page: str, *, writing: bool = False) -> str:
    """
    What the Hub means by an answer that is an error, and the remedy.

    Args:
        error ([`~huggingface_hub.errors.HfHubHTTPError`]):
            The error that was made of the answer.
        page (`str`):
            Page of the repository that was asked for.
        writing (`bool`, *optional*, defaults to `False`):
            Whether something was to be written.
    """
    status = error.response.status_code
    said = error.server_message or error.response.headers.get("X-Error-Message")
    answer = f"HTTP {status}, {said!r}" if said and writing else f"HTTP {status}"
    if status == 401:
        refused = "the Hub" if writing else f"the Hub refused access ({answer}): it"
        return (
            f"{refused} does not know the token{f' ({answer})' if writing else ''}. Log in again with `hf auth login` "
            "(or set HF_TOKEN to a valid token)."
        )
    if status == 403 and writing:
        return (
            f"the account may not write there ({answer}). Log in with a token that can (`hf auth login`, "
            "https://huggingface.co/settings/tokens), or choose another `owner/name`."
        )
    if status == 403:
        return (
            f"the Hub refused access ({answer}). Log in with `hf auth login` (or set HF_TOKEN) using an account and a "
            f"token that can read {page}."
        )
    if status == 404:
        return (
            f"the Hub does not have it ({answer}): no such repository, revision or file. Check the spelling at {page}."
        )
    if status == 413:
        return (
            f"what was sent is too large for the Hub ({answer}). Leave files out or make them smaller: to send the same "
            "again will not help. Its limits: https://huggingface.co/docs/hub/storage-limits."
        )
    seconds = seconds_asked(error)
    when = f"in {seconds} seconds" if seconds else "later"
    if status == 429:
        return (
            f"the Hub answered with {answer}, too many requests. Try again {when}; those who log in (`hf auth login`) "
            "may ask more often."
        )
    return f"the Hub answered with {answer}. Try again {when}."


def _hub_cause(error: BaseException) -> BaseException:
    """The error of `huggingface_hub` that is behind one of the libraries that use it."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    for cause in chain(error):
        if isinstance(cause, (HfHubHTTPError, httpx.TransportError, OfflineModeIsEnabled)):
            if not isinstance(cause, EntryNotFoundError):  # to look for a file that may be absent is no failure
                return cause
    return error


def _may_pass(error: BaseException) -> bool:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import httpx

    # So `huggingface_hub` and `datasets` end after attempts of their own.
    if any(isinstance(cause, LocalEntryNotFoundError) or type(cause) is ConnectionError for cause in chain(error)):
        return False
    cause = _hub_cause(error)
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code in PASSING or cause.response.status_code >= 500
    return isinstance(cause, httpx.TransportError) and not isinstance(cause, httpx.TimeoutException)
