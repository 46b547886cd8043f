# SPDX-License-Identifier: Apache-2.0
"""One run at a time writes into an `output_dir`."""

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".lock"
# Folders that this process holds, and how often. A POSIX lock belongs to the process: it goes with it, however it ends,
# is not inherited by its children, and is lost when any handle of the file is closed, so there must be one alone.
_HELD: dict[Path, int] = {}


@contextmanager
def holding(output_dir: str | Path) -> Iterator[None]:
    """
    Holds a folder against other processes. It can be entered again by the process that holds it.

    Args:
        output_dir (`str` or `Path`):
            The folder; created if needed.

    Raises:
        `BlockingIOError`: another process holds it; the message names that.
    """
    folder = Path(output_dir).resolve()
    if fcntl is None or folder in _HELD:
        _HELD[folder] = _HELD.get(folder, 0) + 1
        try:
            yield
        finally:
            _HELD[folder] -= 1
            if not _HELD[folder]:
                del _HELD[folder]
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK_FILE, "a+", encoding="utf-8") as file:
        _lock(file, output_dir)
        _HELD[folder] = 1
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield
        finally:
            del _HELD[folder]
            file.truncate(0)


def _lock(file, output_dir: str | Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # which of the two depends on the system
        file.seek(0)
        raise BlockingIOError(
            f"`output_dir` {str(output_dir)!r} is in use by another run ({file.read() or 'an unknown process'}). Wait for "
            "its end or stop it, or choose another `output_dir`."
        ) from error
    except OSError as error:  # some network file systems
        warnings.warn(
            f"`output_dir` {str(output_dir)!r} cannot be locked ({error}). See to it that no other run uses it.",
            stacklevel=4,
        )
