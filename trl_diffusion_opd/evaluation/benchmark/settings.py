# SPDX-License-Identifier: Apache-2.0
"""What an evaluation is, written down beside its results so that different ones are never mixed."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...hub.locations import Origin
from ...lora.merging import DARE_DROP, TIES_DENSITY
from .entries import Entry, Lora
from .scoring import Scorer
from .suites import Benchmark, rows_sha256


# What else decides what a merge is, and what it is called then.
_MERGES = {"ties": f"TIES, density {TIES_DENSITY:g}", "dare": f"DARE, drop {DARE_DROP:g}"}


def base_identity(model: str | Path, origin: Origin) -> str | None:
    """What tells a base from others: its commit, or the fingerprint of its files."""
    if origin.repo_id is not None:
        return origin.commit
    digest = hashlib.sha256()
    folder = Path(model).expanduser()
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".safetensors", ".json", ".model", ".txt"):
            with open(file, "rb") as content:
                digest.update(f"{file.relative_to(folder).as_posix()} ".encode())
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def entry_settings(entry: Entry, loras: Mapping[str, Lora]) -> dict[str, Any]:
    """What a row of the table is."""
    own = [loras[name] for name in entry.loras]
    return {
        "guidance_scale": entry.guidance_scale,
        "weights": sorted(lora.sha256 for lora in own),
        **({} if entry.weight == 1 else {"weight": entry.weight}),
        **({} if entry.method is None else {"merge": _MERGES[entry.method]}),
        "origins": [asdict(lora.origin) for lora in own],
    }


def benchmark_settings(
    benchmark: Benchmark,
    rows: Sequence[Mapping[str, Any]],
    origin: Origin,
    num_images: int | None,
    scorers: Sequence[Scorer],
) -> dict[str, Any]:
    """What is drawn for a benchmark, and which scorers it has."""
    own = [scorer for scorer in scorers if benchmark.name in scorer.benchmarks]
    return {
        "title": benchmark.title,
        "origin": asdict(origin),
        # A local path is nobody else's business, and the fingerprint tells enough.
        **({} if Path(benchmark.source).exists() else {"source": benchmark.source}),
        "prompts": rows_sha256(rows),
        "num_prompts": len({row["prompt"] for row in rows}),
        "num_images": num_images or len(rows),
        "rewards": {scorer.name: scorer.description for scorer in own},
        "functions": {scorer.name: scorer.sha256 for scorer in own if scorer.sha256},
    }
