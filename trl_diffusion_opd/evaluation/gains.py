# SPDX-License-Identifier: Apache-2.0
"""What the scores of a comparison say."""

from typing import Any


def gains(results: dict[str, Any]) -> dict[str, float]:
    """
    Share of each teacher's gain over the base, on its own task, that the student has.

    Args:
        results (`dict`):
            The table of [`compare`].
    """
    return {
        task: (results["student"][task] - results["base"][task]) / (teacher[task] - results["base"][task])
        for task, teacher in results.get("teachers", {}).items()
        if task in teacher and teacher[task] != results["base"][task]
    }
