# SPDX-License-Identifier: Apache-2.0
"""What an evaluation is, written down beside its results so that different ones are never mixed."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..sources import Origin
from .contestants import Contestant, Lora
from .scoring import Judge
from .suites import Benchmark, rows_sha256


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


def contestant_settings(contestant: Contestant, loras: Mapping[str, Lora]) -> dict[str, Any]:
    """What a row of the table is."""
    own = [loras[name] for name in contestant.loras]
    return {
        "guidance_scale": contestant.guidance_scale,
        "weights": sorted(lora.sha256 for lora in own),
        **({} if contestant.weight == 1 else {"weight": contestant.weight}),
        "origins": [asdict(lora.origin) for lora in own],
    }


def benchmark_settings(
    benchmark: Benchmark,
    rows: Sequence[Mapping[str, Any]],
    origin: Origin,
    num_images: int | None,
    judges: Sequence[Judge],
) -> dict[str, Any]:
    """What is drawn for a benchmark, and who judges it."""
    own = [judge for judge in judges if benchmark.name in judge.benchmarks]
    return {
        "title": benchmark.title,
        "origin": asdict(origin),
        # A local path is nobody else's business, and the fingerprint tells enough.
        **({} if Path(benchmark.source).exists() else {"source": benchmark.source}),
        "prompts": rows_sha256(rows),
        "num_prompts": len({row["prompt"] for row in rows}),
        "num_images": num_images or len(rows),
        "rewards": {judge.name: judge.description for judge in own},
        "functions": {judge.name: judge.sha256 for judge in own if judge.sha256},
    }
