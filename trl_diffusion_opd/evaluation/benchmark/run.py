# SPDX-License-Identifier: Apache-2.0
"""An evaluation from start to end: checks, images, scores, report. What is on disk already is not made again."""

import gc
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object

from ...hub.locations import Origin
from ...models.loading import check_pipeline
from ...utils.distributed import check_processes, use_all_cores
from .drawing import EntrySampler, ImageSpec, draw_images
from .entries import DEFAULT_GUIDANCE, Entry, choose_entries, load_loras
from .folder import ResultsFolder
from .report import write_report
from .scoring import Scorer, check_scorers, make_scorers, score_images
from .settings import base_identity, benchmark_settings, entry_settings
from .suites import Benchmark, choose_benchmarks, image_seed, load_rows, positions


logger = logging.getLogger(__name__)
T = TypeVar("T")
Rows = list[dict[str, Any]]
# The paper's Table 1.
DEFAULT_BENCHMARKS = ("geneval", "ocr", "drawbench")
# Processes wait for the slowest of them.
_PATIENCE = timedelta(days=7)


def evaluate(
    model: str | Path,
    *,
    loras: Mapping[str, str | Path] | None = None,
    base: bool = True,
    merge: Sequence[str] = (),
    benchmarks: Sequence[str] = DEFAULT_BENCHMARKS,
    prompts: Mapping[str, str] | None = None,
    rewards: Mapping[str | None, Sequence[str]] | None = None,
    reward_options: Mapping[str, Mapping[str, Any]] | None = None,
    num_images: int | None = None,
    output_dir: str | Path = "evaluation",
    num_inference_steps: int = 40,
    guidance_scale: float | Mapping[str | None, Sequence[float]] = DEFAULT_GUIDANCE,
    resolution: int | None = None,
    max_sequence_length: int = 128,
    seed: int = 42,
    dtype: str | None = None,
    batch_size: int = 8,
    use_cpu: bool = False,
) -> dict[str, Any]:
    """
    Draws the prompts of benchmarks with a base and LoRAs on it, and scores the images.

    A image depends on its benchmark, prompt, place and model alone, up to rounding: not on the batch, on the number
    of processes, or on what else is evaluated.

    Args:
        model (`str` or `Path`):
            The base: `owner/repo[@revision]` on the Hub or a local folder.
        loras (`Mapping[str, str | Path]`, *optional*):
            LoRAs by name: `owner/repo[/sub/folder][@revision]`, a folder or a file, in the format of diffusers or PEFT.
        base (`bool`, *optional*, defaults to `True`):
            Whether to evaluate the base itself.
        merge (`Sequence[str]`, *optional*):
            Merges to evaluate: `"sum"`, `"mean"` of all LoRAs, `"sum=a,b"` of some.
        benchmarks (`Sequence[str]`, *optional*, defaults to `("geneval", "ocr", "drawbench")`):
            See [`~benchmark.suites.choose_benchmarks`].
        prompts (`Mapping[str, str]`, *optional*), rewards (`Mapping[str | None, Sequence[str]]`, *optional*):
            What to use instead of the usual prompts and rewards, by benchmark.
        reward_options (`Mapping[str, Mapping[str, Any]]`, *optional*):
            Arguments of built-in rewards.
        num_images (`int`, *optional*):
            Images of each model and benchmark; by default one of each prompt. Fewer are spread over the prompts, more
            start over with other noise.
        output_dir (`str` or `Path`, *optional*, defaults to `"evaluation"`):
            Where everything is kept. What is there already is not made again; what was made with other settings is
            refused.
        num_inference_steps (`int`, *optional*, defaults to `40`):
            Steps of the first-order ODE.
        guidance_scale (`float` or `Mapping[str | None, Sequence[float]]`, *optional*, defaults to `4.5`):
            Classifier-free guidance, see [`~benchmark.entries.choose_entries`].
        resolution (`int`, *optional*):
            Height and width; by default 512 or the base's own size if that is smaller.
        max_sequence_length (`int`, *optional*, defaults to `128`):
            Length of a prompt in tokens.
        seed (`int`, *optional*, defaults to `42`):
            Seed of all noise.
        dtype (`str`, *optional*):
            Precision of the base; by default `"bfloat16"`, on the CPU `"float32"`.
        batch_size (`int`, *optional*, defaults to `8`):
            Images that each process draws at once.
        use_cpu (`bool`, *optional*, defaults to `False`):
            Whether to leave GPUs alone.

    Returns:
        `dict`: what `summary.json` holds.

    Raises:
        `ValueError`: an argument or a file that makes no sense, settings that differ from those of the results on disk,
            or a reward that failed as a whole (then the rest is done and written).
        `SourceError`: something cannot be found or fetched.
    """
    for name, value in (("num_images", num_images), ("batch_size", batch_size), ("resolution", resolution)):
        if value is not None and value < 1:
            raise ValueError(f"`--{name}` must be at least 1, but is {value}.")
    if num_inference_steps < 1 or not 1 <= max_sequence_length <= 512:
        raise ValueError(
            "`--num_inference_steps` must be at least 1 and `--max_sequence_length` from 1 to 512, but they are "
            f"{num_inference_steps} and {max_sequence_length}."
        )
    accelerator = Accelerator(cpu=use_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)])
    check_processes(accelerator.num_processes)
    use_all_cores(accelerator.device)
    main, folder = accelerator.is_main_process, ResultsFolder(output_dir)

    # 1. Find everything and check it, before anything large is loaded
    entries = choose_entries(list(loras or {}), guidance_scale, base=base, merge=merge)
    suites = choose_benchmarks(benchmarks, prompts, rewards)
    scorers = make_scorers(suites, accelerator.device, reward_options)
    with accelerator.main_process_first():
        origin, family = check_pipeline(model)
        loaded = load_loras(loras or {})
    sets = _by_main(accelerator, lambda: {suite.name: _load_prompts(folder, suite) for suite in suites})
    rows = {name: found for name, (found, _) in sets.items()}
    check_scorers(scorers, rows)
    dtype = dtype or ("float32" if accelerator.device.type == "cpu" else "bfloat16")
    settings = {
        "base": {"origin": asdict(origin), "weights": _by_main(accelerator, lambda: base_identity(model, origin))},
        "num_inference_steps": num_inference_steps,
        "max_sequence_length": max_sequence_length,
        "seed": seed,
        "dtype": dtype,
        "resolution": resolution or folder.load_settings().get("resolution"),
        "models": {row.name: entry_settings(row, loaded) for row in entries},
        "benchmarks": {
            suite.name: benchmark_settings(suite, *sets[suite.name], num_images, scorers) for suite in suites
        },
    }
    _by_main(accelerator, lambda: folder.check_settings(settings))

    # 2. Draw what is missing
    places = {suite.name: positions(len(rows[suite.name]), num_images or len(rows[suite.name])) for suite in suites}
    missing = _missing_images(folder, entries, places, rows, seed)
    accelerator.wait_for_everyone()  # all have looked: now files may come
    sampler = None
    if missing:
        sampler = EntrySampler(
            model,
            origin,
            family,
            loaded,
            dtype=getattr(torch, dtype),
            device=accelerator.device,
            num_inference_steps=num_inference_steps,
            resolution=settings["resolution"],
            max_sequence_length=max_sequence_length,
            show_progress=main,
        )
        settings["resolution"] = sampler.resolution
    _by_main(accelerator, lambda: _start(folder, settings, rows))
    if sampler is not None:
        # Shared by prompt, so that each is encoded once.
        own = missing[accelerator.process_index :: accelerator.num_processes]
        wanted = [image for images in own for image in images]
        draw_images(sampler, folder, wanted, batch_size=batch_size, show_progress=main)
    del sampler
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    accelerator.wait_for_everyone()

    # 3. Score what is missing. A scorer that fails as a whole does not keep the others from theirs.
    problems = []
    unscored = {scorer: _missing_scores(folder, scorer, entries, places) for scorer in scorers}
    accelerator.wait_for_everyone()
    for scorer, images in unscored.items():
        own = _grouped(images[accelerator.process_index :: accelerator.num_processes])
        if own:
            try:
                process = accelerator.process_index
                score_images(scorer, folder, own, rows, process=process, show_progress=main)
            except Exception as error:
                if not isinstance(error, (ValueError, OSError, ImportError)):  # its message may not say enough
                    logger.warning(f"The reward `{scorer.name}` failed.", exc_info=True)
                problems.append(f"{scorer.name}: {error or type(error).__name__}")
    problems = list(dict.fromkeys(gather_object(problems)))

    # 4. Report
    summary = write_report(folder) if main else {}
    if main:
        sys.stdout.write(f"{(folder.path / 'table.md').read_text(encoding='utf-8')}\n{folder.path / 'index.html'}\n")
    accelerator.wait_for_everyone()
    if problems:
        raise ValueError(
            f"{'; '.join(problems)} (All else is in {str(folder.path)!r}. The same command goes on from there.)"
        )
    return summary


def _by_main(accelerator: Accelerator, call: Callable[[], T]) -> T:
    """What a call returns in the main process, in all of them. If it raises, the launcher ends the others."""
    box = [call() if accelerator.is_main_process else None]
    return broadcast_object_list(box)[0]


def _start(folder: ResultsFolder, settings: Mapping[str, Any], rows: Mapping[str, Rows]) -> None:
    folder.save_settings(settings)
    for name, own in rows.items():
        folder.save_prompts(name, own)


def _load_prompts(folder: ResultsFolder, benchmark: Benchmark) -> tuple[Rows, Origin]:
    """The prompts of a benchmark: what is not of this machine is fetched once and read from the folder after that."""
    known = folder.load_settings().get("benchmarks", {}).get(benchmark.name, {})
    if known.get("source") == benchmark.source and folder.prompts_file(benchmark.name).is_file():
        return folder.load_prompts(benchmark.name), Origin(**known["origin"])
    return load_rows(benchmark)


def _missing_images(
    folder: ResultsFolder,
    entries: Sequence[Entry],
    places: Mapping[str, Sequence[int]],
    rows: Mapping[str, Rows],
    seed: int,
) -> list[list[ImageSpec]]:
    """The images that are not on disk, those of a prompt together."""
    missing = []
    for name, own in places.items():
        for position in own:
            prompt = rows[name][position % len(rows[name])]["prompt"]
            absent = [row for row in entries if not folder.image_file(row.name, name, position).is_file()]
            if absent:
                noise = image_seed(seed, name, position)
                missing.append([ImageSpec(row, name, position, prompt, noise) for row in absent])
    return missing


def _missing_scores(
    folder: ResultsFolder, scorer: Scorer, entries: Sequence[Entry], places: Mapping[str, Sequence[int]]
) -> list[tuple[str, str, int]]:
    """Model, benchmark and position of the images that a scorer has not seen, or could not score."""
    return [
        (row.name, name, position)
        for row in entries
        for name in scorer.benchmarks
        for scores in [folder.scores(row.name, name, scorer.name)]
        for position in places[name]
        if math.isnan(scores.get(position, math.nan))
    ]


def _grouped(images: Sequence[tuple[str, str, int]]) -> dict[tuple[str, str], list[int]]:
    groups: dict[tuple[str, str], list[int]] = {}
    for model, benchmark, position in images:
        groups.setdefault((model, benchmark), []).append(position)
    return groups
