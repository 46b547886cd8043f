# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: where their prompts are and which rewards judge their images."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ...hub.locations import Origin

SHAPES = "shapes"  # stands for the benchmarks of the three tasks of examples/shapes
_RESERVED = ("index",)  # the page of the tables
GENERATED = "generated"  # a source of prompts: GenEval's own rules
# GenEval draws four images of each of its 553 prompts.
_GENEVAL_REPEATS = 4
_MODEL_BASED = ("pickscore", "clipscore", "hpsv2", "aesthetic", "imagereward", "unifiedreward")
_FLOW_GRPO = "https://raw.githubusercontent.com/yifan123/flow_grpo/main/dataset"
_DIFFUSION_NFT = "https://raw.githubusercontent.com/NVlabs/DiffusionNFT/main/dataset"


@dataclass(frozen=True)
class Benchmark:
    """
    A prompt set with its scorers.

    Args:
        name (`str`):
            Its name in options, folders and files.
        title (`str`):
            Its name in tables.
        source (`str`):
            Where the prompts are: an address, a local file or folder, a dataset of the Hub, or `"generated"`.
        rewards (`tuple[str, ...]`):
            Names of built-in rewards, or `file.py:function`.
    """

    name: str
    title: str
    source: str
    rewards: tuple[str, ...]


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("geneval", "GenEval", f"{_FLOW_GRPO}/geneval/test_metadata.jsonl", ("geneval",)),
        Benchmark("ocr", "OCR", f"{_FLOW_GRPO}/ocr/test.txt", ("ocr",)),
        Benchmark("drawbench", "DrawBench", f"{_DIFFUSION_NFT}/drawbench/test.txt", _MODEL_BASED),
        Benchmark("pickapic", "Pick-a-Pic", f"{_FLOW_GRPO}/pickscore/test.txt", _MODEL_BASED),
    )
}


def shapes_benchmarks() -> dict[str, Benchmark]:
    """
    The held-out prompts and the rules of the Shapes world, a benchmark per task.

    Raises:
        `ValueError`: this is not a checkout of the repository.
    """
    folder = Path(__file__).resolve().parents[3] / "examples" / "shapes"
    if not (folder / "rewards.py").is_file():
        raise ValueError(
            f"The benchmark {SHAPES!r} is part of the repository, not of the installed package. Clone the repository and "
            "install it with `pip install -e .`."
        )
    return {
        f"{SHAPES}_{task}": Benchmark(
            f"{SHAPES}_{task}",
            f"Shapes, {task}",
            str(folder / "prompts" / f"{task}_test.txt"),
            (f"{folder / 'rewards.py'}:{task}",),
        )
        for task in ("geneval", "ocr", "aesthetic")
    }


def choose_benchmarks(
    names: Sequence[str],
    prompts: Mapping[str, str] | None = None,
    rewards: Mapping[str | None, Sequence[str]] | None = None,
) -> list[Benchmark]:
    """
    The benchmarks of these names.

    Args:
        names (`Sequence[str]`):
            Of `BENCHMARKS`, `"shapes"`, or others that have prompts and rewards.
        prompts (`Mapping[str, str]`, *optional*):
            Prompts to use instead, by benchmark.
        rewards (`Mapping[str | None, Sequence[str]]`, *optional*):
            Rewards to use instead, by benchmark; under `None` those of all others.

    Raises:
        `ValueError`: a benchmark that is not known, or prompts or rewards of one that was not chosen.
    """
    prompts, rewards = prompts or {}, rewards or {}
    known = dict(BENCHMARKS)
    if SHAPES in names or any(name.startswith(f"{SHAPES}_") for name in names):
        known |= shapes_benchmarks()
    expanded = [
        each for name in names for each in ([n for n in known if n.startswith(SHAPES)] if name == SHAPES else [name])
    ]
    chosen = {}
    for name in expanded:
        if name in _RESERVED or not re.fullmatch(r"\w[\w.+-]*", name):
            raise ValueError(
                f"A benchmark cannot be called {name!r}, as its pages and folders are. Name it in letters, digits and "
                f"`._+-`, and not {', '.join(_RESERVED)}."
            )
        own = known.get(name, Benchmark(name, name, "", ()))
        source, scorers = prompts.get(name, own.source), tuple(rewards.get(name, rewards.get(None, own.rewards)))
        if not source or not scorers:
            raise ValueError(
                f"There is no benchmark {name!r}. The benchmarks are {', '.join([*BENCHMARKS, SHAPES])}; one of your own "
                f"needs `--prompts {name}=...` and `--rewards {name}=...`."
            )
        if source == GENERATED and name != "geneval":
            raise ValueError(f"Only the prompts of geneval can be {GENERATED!r}, not those of {name!r}. Name a file.")
        chosen[name] = Benchmark(name, own.title, source, scorers)
    for option, mapping in (("prompts", prompts), ("rewards", rewards)):
        if idle := [name for name in mapping if name is not None and name not in chosen]:
            raise ValueError(
                f"`--{option}` names {idle[0]!r}, which is not among the benchmarks: {', '.join(chosen)}."
            )
    return list(chosen.values())


def load_rows(benchmark: Benchmark) -> tuple[list[dict[str, Any]], "Origin"]:
    """
    The prompts of a benchmark with their other columns, as far as JSON can hold these, and where they came from.

    Raises:
        `SourceError`: they cannot be found or fetched.
        `ValueError`: they cannot be read.
    """
    from ...data.prompt_sets import task_datasets
    from ...data.rounds import is_plain
    from ...hub.locations import Origin
    from ...rewards.geneval_prompts import geneval_prompts, metadata_column

    if benchmark.source == GENERATED:
        rows = [row for row in geneval_prompts() for _ in range(_GENEVAL_REPEATS)]
        texts = [row["prompt"] for row in rows]
        rows = [{"prompt": p, "metadata": m} for p, m in zip(texts, metadata_column(rows), strict=True)]
        return rows, Origin("GenEval's rules", repo_type="dataset")
    data, origins = task_datasets({benchmark.name: benchmark.source}, None, argument="prompts")
    rows = [{name: value for name, value in row.items() if is_plain(value)} for row in data[benchmark.name]]
    return rows, origins[benchmark.name]


def rows_sha256(rows: Sequence[Mapping[str, Any]]) -> str:
    """Fingerprint of prompts."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def positions(total: int, num_images: int) -> list[int]:
    """
    Which images are drawn of `total` prompts: spread over the set if there are fewer than prompts. Positions beyond
    the end start over, with other noise.
    """
    if num_images <= total:
        return [index * total // num_images for index in range(num_images)]
    return list(range(num_images))


def image_seed(seed: int, benchmark: str, position: int) -> int:
    """Seed of the noise of a image: the same for all models, whatever the batch and the process."""
    from ...data.rounds import sample_seed

    return sample_seed(seed, f"benchmark/{benchmark}", 0, position)
