# SPDX-License-Identifier: Apache-2.0
"""An evaluation from start to end: checks, images, statistics, scores, report. What is on disk already is not made again."""

import gc
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object

from ...hub.locations import Origin
from ...models.family import ModelFamily
from ...models.loading import check_pipeline, read_configs
from ...utils.distributed import check_processes, use_all_cores
from .arguments import EvaluationArguments
from .drawing import EntrySampler, ImageSpec, draw_images
from .entries import Entry, Lora, check_merges, choose_entries, load_loras
from .folder import ResultsFolder
from .measuring import measure_images, unmeasured
from .report import write_report
from .scoring import Scorer, check_scorers, make_scorers, score_images
from .settings import base_identity, benchmark_settings, entry_settings
from .suites import Benchmark, choose_benchmarks, image_seed, load_rows, positions


logger = logging.getLogger(__name__)
T = TypeVar("T")
Rows = list[dict[str, Any]]
# Processes wait for the slowest of them.
_PATIENCE = timedelta(days=7)


def evaluate(arguments: EvaluationArguments) -> dict[str, Any]:
    """
    Draws the prompts of benchmarks with a base and LoRAs on it, and scores the images.

    An image depends on its benchmark, prompt, place and model alone, up to rounding: not on the batch, on the number
    of processes, or on what else is evaluated.

    Args:
        arguments ([`~benchmark.arguments.EvaluationArguments`]):
            What to evaluate, and how.

    Returns:
        `dict`: what `summary.json` holds.

    Raises:
        `ValueError`: an argument or a file that makes no sense, settings that differ from those of the results on disk,
            or a reward that failed as a whole (then the rest is done and written).
        `SourceError`: something cannot be found or fetched.
    """
    accelerator = Accelerator(cpu=arguments.use_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)])
    check_processes(accelerator.num_processes)
    use_all_cores(accelerator.device)
    plan = _prepare(arguments, accelerator)
    _draw(plan, accelerator)
    _measure(plan, accelerator)
    problems = _score(plan, accelerator)
    summary = _report(plan, accelerator)
    if problems:
        raise ValueError(
            f"{'; '.join(problems)} (All else is in {str(plan.folder.path)!r}. The same command goes on from there.)"
        )
    return summary


@dataclass
class _Plan:
    """
    What is going to be drawn and scored, found and checked before anything large is loaded.

    Args:
        arguments ([`~benchmark.arguments.EvaluationArguments`]):
            What was asked for.
        folder ([`ResultsFolder`]):
            Where everything is kept.
        origin ([`Origin`]), family ([`ModelFamily`]):
            Where the base comes from, and what it is.
        loras (`dict[str, Lora]`):
            The LoRAs by name.
        entries (`list[Entry]`):
            The rows of the table.
        scorers (`list[Scorer]`):
            The rewards.
        rows (`dict[str, Rows]`):
            The prompts of each benchmark.
        settings (`dict`):
            What is written down of all this.
    """

    arguments: EvaluationArguments
    folder: ResultsFolder
    origin: Origin
    family: ModelFamily
    loras: dict[str, Lora]
    entries: list[Entry]
    scorers: list[Scorer]
    rows: dict[str, Rows]
    settings: dict[str, Any]

    @property
    def places(self) -> dict[str, list[int]]:
        """Positions of the images of each benchmark."""
        return {name: positions(len(own), self.arguments.num_images or len(own)) for name, own in self.rows.items()}


def _prepare(arguments: EvaluationArguments, accelerator: Accelerator) -> _Plan:
    """Finds everything and checks it."""
    folder = ResultsFolder(arguments.output_dir)
    suites = choose_benchmarks(arguments.benchmarks, arguments.prompts, arguments.rewards)
    scorers = make_scorers(suites, accelerator.device, arguments.reward_options)
    with accelerator.main_process_first():
        origin, family = check_pipeline(arguments.model)
        configs = read_configs(arguments.model, origin)
        defaults = family.defaults(configs)
    entries = choose_entries(
        list(arguments.loras),
        arguments.guidance_scale,
        default_scale=defaults.guidance_scale,
        base=arguments.base,
        merge=arguments.merge,
    )
    for entry in entries:
        family.check_guidance(configs, entry.guidance_scale)
    with accelerator.main_process_first():
        loras = load_loras(arguments.loras, family)
    check_merges(entries, loras)
    length = arguments.max_sequence_length or defaults.max_sequence_length
    family.check_length(length)
    sets = _by_main(accelerator, lambda: {suite.name: _load_prompts(folder, suite) for suite in suites})
    rows = {name: found for name, (found, _) in sets.items()}
    check_scorers(scorers, rows)
    weights = _by_main(accelerator, lambda: base_identity(arguments.model, origin))
    settings = {
        "base": {"origin": asdict(origin), "weights": weights},
        "num_inference_steps": arguments.num_inference_steps or defaults.num_inference_steps,
        "max_sequence_length": length,
        "seed": arguments.seed,
        "dtype": arguments.dtype or ("float32" if accelerator.device.type == "cpu" else "bfloat16"),
        "resolution": arguments.resolution or folder.load_settings().get("resolution"),
        "models": {row.name: entry_settings(row, loras) for row in entries},
        "benchmarks": {
            suite.name: benchmark_settings(suite, *sets[suite.name], arguments.num_images, scorers) for suite in suites
        },
    }
    _by_main(accelerator, lambda: folder.check_settings(settings))
    return _Plan(arguments, folder, origin, family, loras, entries, scorers, rows, settings)


def _draw(plan: _Plan, accelerator: Accelerator) -> None:
    """Draws the images that are missing. The models leave memory afterwards."""
    missing = _missing_images(plan)
    accelerator.wait_for_everyone()  # all have looked: now files may come
    sampler = None
    if missing:
        sampler = EntrySampler(
            plan.arguments.model,
            plan.origin,
            plan.family,
            plan.loras,
            dtype=getattr(torch, plan.settings["dtype"]),
            device=accelerator.device,
            num_inference_steps=plan.settings["num_inference_steps"],
            resolution=plan.settings["resolution"],
            max_sequence_length=plan.settings["max_sequence_length"],
            show_progress=accelerator.is_main_process,
        )
        plan.settings["resolution"] = sampler.resolution
    _by_main(accelerator, lambda: _start(plan))
    if sampler is not None:
        # Shared by prompt, so that each is encoded once.
        own = missing[accelerator.process_index :: accelerator.num_processes]
        wanted = [image for images in own for image in images]
        batch_size, show_progress = plan.arguments.batch_size, accelerator.is_main_process
        draw_images(sampler, plan.folder, wanted, batch_size=batch_size, show_progress=show_progress)
    del sampler
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    accelerator.wait_for_everyone()


def _measure(plan: _Plan, accelerator: Accelerator) -> None:
    """Measures the images that are not measured, read from disk: nothing is decoded again."""
    groups = unmeasured(plan.folder, [row.name for row in plan.entries], plan.rows, plan.places)
    accelerator.wait_for_everyone()
    process, show_progress = accelerator.process_index, accelerator.is_main_process
    own = groups[process :: accelerator.num_processes]
    measure_images(plan.folder, own, process=process, show_progress=show_progress)


def _score(plan: _Plan, accelerator: Accelerator) -> list[str]:
    """
    Scores the images that have no score. A reward that fails as a whole does not keep the others from theirs: what went
    wrong is returned.
    """
    problems = []
    process = accelerator.process_index
    unscored = {scorer: _missing_scores(plan, scorer) for scorer in plan.scorers}
    accelerator.wait_for_everyone()
    for scorer, images in unscored.items():
        own = _grouped(images[process :: accelerator.num_processes])
        if not own:
            continue
        try:
            show_progress = accelerator.is_main_process
            score_images(scorer, plan.folder, own, plan.rows, process=process, show_progress=show_progress)
        except Exception as error:
            if not isinstance(error, (ValueError, OSError, ImportError)):  # its message may not say enough
                logger.warning(f"The reward `{scorer.name}` failed.", exc_info=True)
            problems.append(f"{scorer.name}: {error or type(error).__name__}")
    return list(dict.fromkeys(gather_object(problems)))


def _report(plan: _Plan, accelerator: Accelerator) -> dict[str, Any]:
    """Writes what came of it, in the main process, and shows the tables."""
    summary = {}
    if accelerator.is_main_process:
        summary = write_report(plan.folder)
        path = plan.folder.path
        sys.stdout.write(f"{(path / 'table.md').read_text(encoding='utf-8')}\n{path / 'index.html'}\n")
    accelerator.wait_for_everyone()
    return summary


def _by_main(accelerator: Accelerator, call: Callable[[], T]) -> T:
    """What a call returns in the main process, in all of them. If it raises, the launcher ends the others."""
    box = [call() if accelerator.is_main_process else None]
    return broadcast_object_list(box)[0]


def _start(plan: _Plan) -> None:
    plan.folder.save_settings(plan.settings)
    for name, own in plan.rows.items():
        plan.folder.save_prompts(name, own)


def _load_prompts(folder: ResultsFolder, benchmark: Benchmark) -> tuple[Rows, Origin]:
    """The prompts of a benchmark: what is not of this machine is fetched once and read from the folder after that."""
    known = folder.load_settings().get("benchmarks", {}).get(benchmark.name, {})
    if known.get("source") == benchmark.source and folder.prompts_file(benchmark.name).is_file():
        return folder.load_prompts(benchmark.name), Origin(**known["origin"])
    return load_rows(benchmark)


def _missing_images(plan: _Plan) -> list[list[ImageSpec]]:
    """The images that are not on disk, those of a prompt together."""
    missing = []
    for name, own in plan.places.items():
        rows = plan.rows[name]
        for position in own:
            prompt = rows[position % len(rows)]["prompt"]
            absent = [row for row in plan.entries if not plan.folder.image_file(row.name, name, position).is_file()]
            if absent:
                noise = image_seed(plan.arguments.seed, name, position)
                missing.append([ImageSpec(row, name, position, prompt, noise) for row in absent])
    return missing


def _missing_scores(plan: _Plan, scorer: Scorer) -> list[tuple[str, str, int]]:
    """Model, benchmark and position of the images that a scorer has not seen, or could not score."""
    return [
        (row.name, name, position)
        for row in plan.entries
        for name in scorer.benchmarks
        for scores in [plan.folder.scores(row.name, name, scorer.name)]
        for position in plan.places[name]
        if math.isnan(scores.get(position, math.nan))
    ]


def _grouped(images: Sequence[tuple[str, str, int]]) -> dict[tuple[str, str], list[int]]:
    groups: dict[tuple[str, str], list[int]] = {}
    for model, benchmark, position in images:
        groups.setdefault((model, benchmark), []).append(position)
    return groups
