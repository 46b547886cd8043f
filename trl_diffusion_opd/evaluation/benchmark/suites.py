# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: where their prompts are and which rewards score their images."""

import hashlib
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml


if TYPE_CHECKING:
    from ...hub.locations import Origin

BENCHMARK_FILE = re.compile(r"(?P<file>.+\.ya?ml)(:(?P<name>.+))?", re.IGNORECASE)
_LOCAL = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".py")
_RESERVED = ("index",)  # the page of the tables
GENERATED = "generated"  # a source of prompts: GenEval's own rules
# GenEval draws four images of each of its 553 prompts.
_GENEVAL_REPEATS = 4


@dataclass(frozen=True)
class Benchmark:
    """
    A prompt set with its rewards.

    Args:
        name (`str`):
            Its name in options, folders and files.
        title (`str`):
            Its name in tables. Benchmarks whose titles begin with the same words before a comma share a table, in
            which the words after it tell them apart.
        source (`str`):
            Where the prompts are: an address, a local file or folder, a dataset of the Hub, or `"generated"`.
        rewards (`tuple[str, ...]`):
            Names of built-in rewards, or `file.py:function`.
    """

    name: str
    title: str
    source: str
    rewards: tuple[str, ...]


def read_benchmarks(file: str | Path) -> dict[str, Benchmark]:
    """
    Reads a file of benchmarks.

    Args:
        file (`str` or `Path`):
            YAML with a mapping `name`, `title` (by default the name), `prompts`, `rewards` (one or a list of them), or a
            list of such mappings. Paths are as seen from the folder of the file.

    Returns:
        `dict[str, Benchmark]`: the benchmarks by name.

    Raises:
        `ValueError`: there is no such file, or it is not of this form.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise ValueError(f"There is no file of benchmarks {str(file)!r}. Check the path after `--benchmarks`.")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is no YAML: {error}") from error
    benchmarks = {}
    for number, entry in enumerate(content if isinstance(content, list) else [content], 1):
        benchmark = _read_benchmark(entry, file, f"{str(file)!r}, benchmark {number}")
        if benchmark.name in benchmarks:
            raise ValueError(f"{str(file)!r} has two benchmarks {benchmark.name!r}. Rename one of them.")
        benchmarks[benchmark.name] = benchmark
    if not benchmarks:
        raise ValueError(f"{str(file)!r} holds no benchmark. Give it `name`, `prompts` and `rewards`.")
    return benchmarks


def _read_benchmark(entry: Any, file: Path, where: str) -> Benchmark:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: must have `name`, `prompts` and `rewards`, but is a {type(entry).__name__}.")
    if unknown := [key for key in entry if key not in ("name", "title", "prompts", "rewards")]:
        raise ValueError(f"{where}: there is no {unknown[0]!r}. It has `name`, `title`, `prompts` and `rewards`.")
    rewards = entry.get("rewards")
    rewards = [rewards] if isinstance(rewards, str) else rewards
    texts = {key: entry.get(key) for key in ("name", "prompts")} | {"title": entry.get("title", entry.get("name"))}
    for key, value in texts.items():
        if not isinstance(value, str) or not value:
            raise ValueError(f"{where}: `{key}` must be text, but is {reprlib.repr(value)}.")
    if not isinstance(rewards, list) or not rewards or not all(isinstance(spec, str) for spec in rewards):
        raise ValueError(f"{where}: `rewards` must be a name or a list of names, but is {reprlib.repr(rewards)}.")
    specs = tuple(_beside(file, spec) for spec in rewards)
    return Benchmark(texts["name"], texts["title"], _beside(file, texts["prompts"]), specs)


def _beside(file: Path, value: str) -> str:
    """A path, or `path.py:function`, as seen from the folder of a file; an address or a name as it is."""
    path, colon, function = value.rpartition(":") if ".py:" in value else (value, "", "")
    found = (file.parent / path).resolve()
    local = "://" not in value and (found.suffix in _LOCAL or found.exists())
    return f"{found}{colon}{function}" if local else value


BENCHMARKS = read_benchmarks(Path(__file__).with_name("benchmarks.yaml"))


def choose_benchmarks(
    names: Sequence[str],
    prompts: Mapping[str, str] | None = None,
    rewards: Mapping[str | None, Sequence[str]] | None = None,
) -> list[Benchmark]:
    """
    The benchmarks of these names.

    Args:
        names (`Sequence[str]`):
            Of `BENCHMARKS`, files as [`read_benchmarks`] takes them (`"benchmarks.yaml"` is all of its benchmarks,
            `"benchmarks.yaml:name"` one), or others that have prompts and rewards.
        prompts (`Mapping[str, str]`, *optional*):
            Prompts to use instead, by benchmark.
        rewards (`Mapping[str | None, Sequence[str]]`, *optional*):
            Rewards to use instead, by benchmark; under `None` those of all others.

    Raises:
        `ValueError`: a benchmark that is not known, or prompts or rewards of one that was not chosen.
    """
    prompts, rewards = prompts or {}, rewards or {}
    chosen = {}
    for known in (benchmark for name in names for benchmark in _named(name)):
        name = known.name
        if name in _RESERVED or not re.fullmatch(r"\w[\w.+-]*", name):
            raise ValueError(
                f"A benchmark cannot be called {name!r}, as its pages and folders are. Name it in letters, digits and "
                f"`._+-`, and not {', '.join(_RESERVED)}."
            )
        source, specs = prompts.get(name, known.source), tuple(rewards.get(name, rewards.get(None, known.rewards)))
        if not source or not specs:
            raise ValueError(
                f"There is no benchmark {name!r}. The benchmarks are {', '.join(BENCHMARKS)}; one of your own is a file "
                f"(`--benchmarks path/to/benchmarks.yaml`), or needs `--prompts {name}=...` and `--rewards {name}=...`."
            )
        if source == GENERATED and name != "geneval":
            raise ValueError(f"Only the prompts of geneval can be {GENERATED!r}, not those of {name!r}. Name a file.")
        benchmark = Benchmark(name, known.title, source, specs)
        if chosen.setdefault(name, benchmark) != benchmark:
            raise ValueError(f"`--benchmarks` has two benchmarks {name!r}. Rename one of them.")
    for option, mapping in (("prompts", prompts), ("rewards", rewards)):
        if idle := [name for name in mapping if name is not None and name not in chosen]:
            raise ValueError(
                f"`--{option}` names {idle[0]!r}, which is not among the benchmarks: {', '.join(chosen)}."
            )
    return list(chosen.values())


def _named(word: str) -> list[Benchmark]:
    """The benchmarks that a word of `--benchmarks` stands for; one without prompts and rewards if it is not known."""
    match = BENCHMARK_FILE.fullmatch(word)
    if match is None:
        return [BENCHMARKS.get(word, Benchmark(word, word, "", ()))]
    found = read_benchmarks(match["file"])
    if match["name"] is None:
        return list(found.values())
    if match["name"] not in found:
        raise ValueError(f"{match['file']!r} has no benchmark {match['name']!r}, only {', '.join(found)}.")
    return [found[match["name"]]]


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
    """Seed of the noise of an image: the same for all models, whatever the batch and the process."""
    from ...data.rounds import sample_seed

    return sample_seed(seed, f"benchmark/{benchmark}", 0, position)
