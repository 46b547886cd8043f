# SPDX-License-Identifier: Apache-2.0
"""What a process of its own does with Hub ids alone: `python -c "from tests.support.pull_runs import train; ..."`."""

import hashlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from tests.support.push_runs import report
from tests.support.runs import make_config, small_lora, student_state
from trl_diffusion_opd import DiffusionOPDTrainer
from trl_diffusion_opd.data.prompt_sets import origin_of, task_datasets
from trl_diffusion_opd.data.rounds import num_prompts, prompt_at
from trl_diffusion_opd.models.loading import check_pipeline, load_pipeline
from trl_diffusion_opd.models.sd3 import StableDiffusion3
from trl_diffusion_opd.teachers.config import normalize_teachers
from trl_diffusion_opd.teachers.loading import fetch_teachers


PROMPTS = {
    "count": {"path": "me/prompts", "name": "counts", "column": "caption"},
    "scene": {"path": "me/stream", "data_files": "train-*.jsonl", "streaming": True},
}


def hub_trainer(folder: str, scene: dict = PROMPTS["scene"], **settings) -> DiffusionOPDTrainer:
    return DiffusionOPDTrainer(
        model=settings.pop("model", "me/base@v1"),
        teachers=settings.pop("teachers", {"count": "me/teachers/count", "scene": "me/teachers/deep/scene@v1"}),
        args=make_config(Path(folder), save_strategy="steps", save_steps=2, num_eval_images=2, **settings),
        train_dataset={**PROMPTS, "scene": scene},
        eval_dataset={"count": {**PROMPTS["count"], "split": "test"}, "scene": scene},
        peft_config=small_lora(),
    )


def origins(trainer: DiffusionOPDTrainer) -> dict:
    return {
        "base": asdict(trainer.base_origin),
        "teachers": {task: asdict(teacher.origin) for task, teacher in trainer.loaded_teachers.items()},
        "prompts": {task: asdict(origin) for task, origin in trainer.prompt_origins.items()},
        "eval_prompts": {task: asdict(origin) for task, origin in trainer.eval_prompt_origins.items()},
    }


def train(folder: str) -> None:
    """Trains four rounds from Hub ids, then the last two again from the checkpoint."""
    trainer = hub_trainer(f"{folder}/first", max_steps=4, num_grid_prompts=1, eval_strategy="steps", eval_steps=2)
    trainer.train()
    resumed = hub_trainer(f"{folder}/second", max_steps=4)
    resumed.train(resume_from_checkpoint=f"{folder}/first/out/checkpoint-2")
    states = [student_state(one) for one in (trainer, resumed)]
    rows = {task: [] for task in PROMPTS}
    for round_index in range(4):
        for batch in trainer.rounds.batches(round_index):
            rows[batch.task] += batch.rows
    report(
        {
            "origins": origins(trainer),
            "of_cached_dataset": asdict(origin_of(trainer.datasets["count"])),
            "rows": rows,
            "num_prompts": {task: num_prompts(data) for task, data in trainer.datasets.items()},
            "log": [sorted(entry) for entry in trainer.state.log_history],
            "same": {name: torch.equal(tensor, states[1][name]) for name, tensor in states[0].items()},
        }
    )


def rebuild(folder: str) -> None:
    """Builds the trainer again, without the stream, then tries what was never fetched."""
    trainer = hub_trainer(f"{folder}/third", scene=PROMPTS["count"], max_steps=1)
    report({"origins": origins(trainer), "absent": attempts(sys.argv[2:])})


def attempts(items: list[str]) -> list[dict]:
    """Tries to get each of `kind|location`; tells what came of it and how long the clients wanted to wait."""
    results = []
    for item in items:
        kind, _, location = item.partition("|")
        time.waits.clear()
        try:
            outcome = _TRY[kind](location)
        except (OSError, ValueError) as error:
            outcome = f"{type(error).__name__} {error}"
        results.append({"item": item, "outcome": outcome, "waits": list(time.waits)})
    return results


def _teacher(location: str) -> str:
    (files,) = fetch_teachers(normalize_teachers({"ocr": location}), StableDiffusion3()).values()
    return f"OK {hashlib.sha256(files.lora.path.read_bytes()).hexdigest()}"


def _base(location: str) -> str:
    origin, family = check_pipeline(location)
    return f"OK {type(load_pipeline(location, torch.float32, origin=origin, family=family)).__name__}"


def _prompts(location: str | dict) -> str:
    data = task_datasets({"ocr": location}, ["ocr"])[0]["ocr"]
    return f"OK {json.dumps([prompt_at(data, position) for position in range(10)])}"


_TRY = {
    "teacher": _teacher,
    "base": _base,
    "prompts": _prompts,
    "stream": lambda location: _prompts({"path": location, "streaming": True}),
    "trainer": lambda location: str(hub_trainer(".", teachers={"count": location, "scene": location}, max_steps=1)),
}
