# SPDX-License-Identifier: Apache-2.0
"""How long to wait for the Hub: an attempt that failed is made again, and a server that asks for too much time is not waited for."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar


if TYPE_CHECKING:
    from huggingface_hub.utils.httpx import Response

T = TypeVar("T")
logger = logging.getLogger(__name__)
WAITS = (1, 2, 4)  # seconds before the second, third and fourth attempt
# Seconds. The Hub counts requests over five minutes; who asks for more than that is not waited for.
LONGEST_WAIT = 300
_lock = threading.Lock()


def retried(
    call: Callable[[], T],
    what: str = "Asking the Hub",
    *,
    may_pass: Callable[[Exception], bool],
    waits: Iterable[float] = WAITS,
    sleep: Callable[[float], None] | None = None,
) -> T:
    """
    Calls a function again if it fails for a reason that may pass. Says so before each wait.

    Args:
        call (`Callable[[], T]`):
            What to do.
        what (`str`, *optional*, defaults to `"Asking the Hub"`):
            What it is called in the log.
        may_pass (`Callable[[Exception], bool]`):
            Whether to try again after an error.
        waits (`Iterable[float]`, *optional*, defaults to `WAITS`):
            Seconds before each further attempt; more if the server asks for more, up to `LONGEST_WAIT`.
        sleep (`Callable[[float], None]`, *optional*):
            Instead of `time.sleep`.

    Raises:
        What the last attempt raises, or one whose reason will not pass or that asks to wait too long.
    """
    limit_waits()
    for wait in (*waits, None):
        try:
            return call()
        except Exception as error:
            asked = seconds_asked(error)
            if wait is None or asked > LONGEST_WAIT or not may_pass(error):
                raise
            wait = max(wait, asked)
            logger.warning(f"{what} failed ({_in_short(error)}). Trying again in {wait:g} s.")
            (sleep or time.sleep)(wait)


def limit_waits() -> None:
    """
    Has `huggingface_hub` give up at once where a server asks to wait longer than `LONGEST_WAIT`: its own attempts wait
    for as long as they are asked to, up to five times. Works on whatever HTTP client it was told to use.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    with _lock:
        factory = _http._GLOBAL_CLIENT_FACTORY  # there is no public way to ask for it
        if getattr(factory, "limits_waits", False):
            return

        def limited():
            client = factory()
            hooks = client.event_hooks
            client.event_hooks = {**hooks, "response": [*hooks["response"], _check_wait]}
            return client

        limited.limits_waits = True
        set_client_factory(limited)


def _check_wait(response: "Response") -> None:
    from huggingface_hub.utils import hf_raise_for_status

    asked = _asked_by(response) if response.status_code >= 400 else 0
    if asked > LONGEST_WAIT:
        response.read()  # for the message in it
        hf_raise_for_status(response)
    if asked and not logging.getLogger("huggingface_hub").isEnabledFor(logging.WARNING):  # which else says so itself
        logger.warning(f"The Hub asks to wait {asked} s (HTTP {response.status_code}).")


def seconds_asked(error: BaseException) -> int:
    """The seconds that a server asked to wait by the answer that is behind an error, 0 if it did not."""
    answers = (getattr(cause, "response", None) for cause in chain(error))
    return max((_asked_by(answer) for answer in answers if answer is not None), default=0)


def _asked_by(response: "Response") -> int:
    from huggingface_hub.utils import parse_ratelimit_headers

    limit = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    asked = response.headers.get("Retry-After", "").strip()
    return int(asked) if asked.isdecimal() else 0


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its cause, the cause of that, ..., each once: `raise error.__cause__` makes a circle."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _in_short(error: Exception) -> str:
    for cause in chain(error):
        if getattr(cause, "response", None) is not None:
            return f"HTTP {cause.response.status_code}"
    return type(error).__name__
