# SPDX-License-Identifier: Apache-2.0
"""The Average column of the paper's Table 1: scores relative to those of a fixed set of models."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True)
class Reference:
    """
    The rows that scores are seen relative to. They are fixed, so that a new model never moves the numbers of others.

    Args:
        source (`str`):
            Where they are from.
        columns (`tuple[str, ...]`):
            The metrics.
        rows (`dict[str, dict[str, float]]`):
            Scores by model and metric.
        published (`dict[str, float]`):
            The average that was published of each model.
    """

    source: str
    columns: tuple[str, ...]
    rows: dict[str, dict[str, float]]
    published: dict[str, float]


@cache
def paper_table() -> Reference:
    """The 12 rows of the paper's Table 1."""
    text = (resources.files(__package__) / "table1.json").read_text(encoding="utf-8")
    content = json.loads(text)
    columns = tuple(content["columns"])
    return Reference(
        source=content["source"],
        columns=columns,
        rows={name: dict(zip(columns, row["scores"], strict=True)) for name, row in content["rows"].items()},
        published={name: row["average"] for name, row in content["rows"].items()},
    )


def average(scores: Mapping[str, float], reference: Reference | None = None) -> float | None:
    """
    The mean over all metrics of `(score - min) / (max - min)`, where `min` and `max` are those of the reference rows.

    It is not clipped: above 1 is better than the best.

    Args:
        scores (`Mapping[str, float]`):
            Scores by metric, in the scale of the reference.
        reference ([`Reference`], *optional*):
            By default [`paper_table`].

    Returns:
        `float` or `None`: `None` unless all metrics are there.
    """
    reference = reference or paper_table()
    if not set(reference.columns) <= set(scores):
        return None
    shares = []
    for column in reference.columns:
        values = [row[column] for row in reference.rows.values()]
        shares.append((scores[column] - min(values)) / (max(values) - min(values)))
    return sum(shares) / len(shares)
