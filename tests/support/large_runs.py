# SPDX-License-Identifier: Apache-2.0
"""A distillation from a larger base by Hub ids, for the tests that run it in a process of its own."""

from dataclasses import asdict
from pathlib import Path

import torch

from tests.support.push_runs import report
from tests.support.runs import make_trainer
from trl_diffusion_opd import TeacherConfig
from trl_diffusion_opd.models.sd3 import StableDiffusion3
from trl_diffusion_opd.models.transformer_places import find_base, load_transformer


TEACHERS = {
    "lora": TeacherConfig("me/loras/large_count", base="me/large@v1"),
    "folder": TeacherConfig("me/large", subfolder="transformer", revision="v1"),
    "path": "me/large/transformer@v1",
    "pipeline": "me/large@v1",
    "own": "me/base",
}


def attempt(base: str) -> str:
    """What comes of loading the transformer of a pipeline."""
    family = StableDiffusion3()
    try:
        return type(load_transformer(find_base(base, "base of teacher 'ocr'", family), torch.float32, family)).__name__
    except (OSError, ValueError) as error:
        return f"{type(error).__name__} {error}"


def distil(folder: str, *bases: str) -> None:
    """Trains a round, tells what its teachers are, and what comes of loading other bases."""
    trainer = make_trainer(
        Path(folder),
        pipeline="me/base",
        teachers=TEACHERS,
        data={task: ["a red circle"] for task in TEACHERS},
        max_steps=1,
    )
    trainer.train()
    report(
        {
            "origins": {task: asdict(teacher.origin) for task, teacher in trainer.loaded_teachers.items()},
            "bases": {
                task: teacher.base and asdict(teacher.base) for task, teacher in trainer.loaded_teachers.items()
            },
            "fingerprints": {task: teacher.fingerprint for task, teacher in trainer.loaded_teachers.items()},
            "backbones": len(trainer.backbones),
            "others": {base: attempt(base) for base in bases},
        }
    )
