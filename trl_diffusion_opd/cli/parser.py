# SPDX-License-Identifier: Apache-2.0
"""Command lines that say in one line what is wrong."""

import argparse
import dis
import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


PROG = "trl-diffusion-opd"
# After one process has failed, the launcher ends the others within this time, on a busy machine too.
SECONDS_TO_END_ALL = 10
BAD_INPUT = (ValueError, OSError, ImportError)
CLOSED_PIPE = 128 + 13  # what shells call a program that SIGPIPE has ended


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message}. See `{self.prog} --help`.")


def fail(error: str | Exception, exit_code: int = 2) -> NoReturn:
    """
    Ends the process with `error: ...` in one line. Of several processes the first prints it; another one only if the
    first did not fail too, in which case the launcher ends it before.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(SECONDS_TO_END_ALL)
    sys.stderr.write(f"error{f' (process {rank})' if rank else ''}: {' '.join(str(error).split())}\n")
    raise SystemExit(exit_code)


@contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """
    Ends the process with one line and exit code 2 for errors of these kinds, and for what this package itself refuses.
    Any other error is a bug and keeps its traceback. If nobody reads the output any more (`| head`), it ends silently.

    Args:
        kinds (`type`):
            Classes of errors that are bad input whoever raises them. Where code of others runs that may have bugs, none.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # or Python would do so as it exits, and complain itself
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            raise SystemExit(CLOSED_PIPE) from None
        if isinstance(error, kinds) or _is_refusal(error):
            fail(error)
        raise


def _nobody_reads() -> bool:
    """Whether the standard output is closed at its other end, in which case nothing more is written to it."""
    output, poll = sys.stdout.fileno(), select.poll()
    poll.register(output, 0)  # errors are always told
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _is_refusal(error: Exception) -> bool:
    """Whether a `raise` in this package said what is wrong, and not a function that it called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if not isinstance(error, (*BAD_INPUT, TypeError, FloatingPointError)) or trace is None:
        return False
    package = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    return package == __package__.partition(".")[0] and (
        trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    )


def silence_imports() -> None:
    # Without torchvision transformers warns about image processors that are not used here, and the client of the Hub
    # has a line for each retry, before the error that says what to do.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def disable_bars() -> None:
    """Turns off the progress bars that libraries show while they load."""
    import datasets
    import diffusers
    import huggingface_hub.utils
    import transformers

    datasets.disable_progress_bars()
    diffusers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
