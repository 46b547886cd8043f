# SPDX-License-Identifier: Apache-2.0
"""What a task may be called: its name is part of file names, metrics and tables."""

from typing import Any


_MOST_BYTES = 200  # a file name holds 255, of which others are spent on what the file is


def check_task_name(task: Any) -> None:
    """
    Raises a `ValueError` if a task cannot be called so.

    Args:
        task (`Any`):
            The name.
    """
    if not isinstance(task, str) or not task or task != task.strip():
        raise ValueError(f"A task must be a non-empty string without spaces around it, but is {task!r}.")
    if (size := len(task.encode(errors="replace"))) > _MOST_BYTES:
        raise ValueError(
            f"A task must be named in at most {_MOST_BYTES} bytes, since files are named after it, but "
            f"'{task[:20]}...' has {size}. Choose a shorter name."
        )
    if wrong := [sign for sign in task if sign in "/\\" or not sign.isprintable()]:
        raise ValueError(
            f"A task must be a name that files can have, but {task!r} has {wrong[0]!r}. Use letters, digits, spaces "
            "and signs like . _ - + instead."
        )
    if task[0] in ".-":
        raise ValueError(f"A task must not start with {task[0]!r}, since files are named after it, but is {task!r}.")
