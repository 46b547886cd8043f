# SPDX-License-Identifier: Apache-2.0
"""A recipe on tiny components, in a folder of its own."""

from pathlib import Path

import yaml

from tests.support.runs import PROMPTS, make_teachers
from tests.support.tiny import tiny_pipeline


def write_recipe(folder: Path, **settings) -> Path:
    """Base, teachers and recipe of a tiny distillation; `settings` replace or, if `None`, leave out those of the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_pipeline().save_pretrained(folder / "base")
    make_teachers(folder)
    content = {
        "model_name_or_path": "base",
        "teachers": {"count": "count", "scene": {"name_or_path": "scene", "guidance_scale": 1.0}},
        "datasets": PROMPTS,
        "lora_r": 4,
        "lora_target_modules": ["attn.to_q"],
        "max_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "num_inference_steps": 3,
        "max_sequence_length": 16,
        "num_grid_prompts": 0,
        "save_curves": False,
        "save_strategy": "no",
        "use_cpu": True,
        "output_dir": str(folder / "out"),
        **settings,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path
