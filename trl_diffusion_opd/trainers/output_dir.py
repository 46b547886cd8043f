# SPDX-License-Identifier: Apache-2.0
"""Check that a run can write into its output folder, before anything is loaded."""

import tempfile
from pathlib import Path


def check_output_dir(folder: str | Path) -> None:
    """
    Creates the output folder of a run and writes a temporary file into it.

    Args:
        folder (`str` or `Path`):
            The folder.

    Raises:
        `ValueError`: it is named by an empty text.
        `OSError`: it cannot be created or written to; the message says why.
    """
    if not str(folder):
        raise ValueError("`output_dir` is empty. Name a folder.")
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        if path.is_symlink() and not path.exists():
            reason = "it is a link to nothing"
        else:
            reason = "it is a file" if path.is_file() else error.strerror or str(error)
        raise OSError(
            f"`output_dir` {str(folder)!r} cannot be written to: {reason}. Choose another folder."
        ) from error
