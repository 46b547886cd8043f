# SPDX-License-Identifier: Apache-2.0
"""What a student is asked where its teacher is asked the prompt: other words for it, or a tag before it."""

from collections.abc import Mapping
from typing import Any

from .rounds import Prompts, StreamedPrompts, StudentPrompt


def student_prompts(given: str | StudentPrompt | None, datasets: Mapping[str, Prompts]) -> StudentPrompt | None:
    """
    Makes a function of rows out of what the user gave.

    Args:
        given (`str` or `Callable`, *optional*):
            The name of a column, or `f(row, seed) -> str`.
        datasets (`Mapping`):
            Prompts of each task.

    Raises:
        `ValueError`: a set has no such column. The function raises one for a row for which there is no text.
    """
    if given is None:
        return None
    if isinstance(given, str):
        for task, data in datasets.items():
            if not isinstance(data, StreamedPrompts) and given not in data.column_names:
                raise ValueError(
                    f"`student_prompt` is the column {given!r}, but the prompts of task {task!r} have only "
                    f"{', '.join(data.column_names)}. Add the column, or give a function."
                )
    elif not callable(given):
        raise ValueError(f"`student_prompt` must be the name of a column or a function of a row, but is {given!r}.")

    def asked(row: dict[str, Any], seed: int) -> str:
        text = row.get(given) if isinstance(given, str) else given(dict(row), seed)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"`student_prompt` must give a text for each row, but gives {text!r} for {row!r}.")
        return text

    return asked
