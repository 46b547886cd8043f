# SPDX-License-Identifier: Apache-2.0
"""What a method adds to the plan of a run."""

from dataclasses import dataclass, field

from ..hub.locations import Origin


@dataclass
class MethodPlan:
    """
    What a method adds to the plan of a run.

    Args:
        objective (`str`):
            What is trained, in a few words.
        tasks (`dict[str, str]`):
            What each task is learned from.
        lines (`dict[str, str]`, *optional*):
            More lines by their titles.
        memory (`dict[str, int]`, *optional*):
            Bytes that it keeps on the training device during rounds.
        models (`int`, *optional*, defaults to `0`):
            Bytes of its other models on the training device.
    """

    objective: str
    tasks: dict[str, str]
    lines: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    models: int = 0


def format_origin(origin: Origin) -> str:
    """Name and commit of a model, in short."""
    return origin.name + (f" ({origin.commit[:7]})" if origin.commit else "")
