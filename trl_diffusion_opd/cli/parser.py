# SPDX-License-Identifier: Apache-2.0
"""Command lines that say in one line what is wrong."""

import argparse
import os
import sys
import time
from typing import NoReturn


PROG = "trl-diffusion-opd"
# After one process has failed, the launcher ends the others within this time.
SECONDS_TO_END_ALL = 3


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


def silence_imports() -> None:
    # Without torchvision transformers warns about image processors that are not used here, and the client of the Hub
    # has a line for each retry, before the error that says what to do.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
