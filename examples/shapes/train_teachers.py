# SPDX-License-Identifier: Apache-2.0
"""
Train a LoRA teacher for every task by reinforcement learning, with the methods that the paper used: DiffusionNFT for
composition, GRPO-Guard for text and beauty. Then put their weights and model cards where they are shipped.

    python examples/shapes/train_teachers.py

Nothing holds a teacher to the base on the other tasks: it forgets or redraws them, as narrow trainings do.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path


SHAPES = Path(__file__).resolve().parent
WEIGHTS, CARD = "pytorch_lora_weights.safetensors", ("README.md", "run.json", "curves.png", "images")
# By which command, for how many optimizer steps.
TEACHERS = {"geneval": ("nft", 80), "ocr": ("grpo", 60), "aesthetic": ("grpo", 60)}
RECIPES = {"nft": "shapes_nft.yaml", "grpo": "shapes_grpo_guard.yaml", "opd": "shapes.yaml"}


def command(method: str, output_dir: Path, seed: int, *options: str) -> list[str]:
    """What trains with a recipe of the Shapes world."""
    recipe = SHAPES.parent / "configs" / RECIPES[method]
    settings = ["--config", str(recipe), "--output_dir", str(output_dir), "--seed", str(seed), "--use_cpu"]
    return [sys.executable, "-m", "trl_diffusion_opd", method, *settings, *options]


def teacher_command(task: str, output_dir: Path, seed: int) -> list[str]:
    method, max_steps = TEACHERS[task]
    return command(method, output_dir, seed, "--tasks", task, "--max_steps", str(max_steps))


def ship(run: Path, weights: Path, card: Path) -> None:
    """Copy the weights and the card of a run, which replace what was there."""
    shutil.rmtree(card, ignore_errors=True)
    for folder in (weights, card):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / WEIGHTS, weights / WEIGHTS)
    for name in CARD:
        if (run / name).is_dir():
            shutil.copytree(run / name, card / name)
        elif (run / name).is_file():
            shutil.copy(run / name, card / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("shapes-teachers"), help="folder of the runs")
    parser.add_argument("--tasks", nargs="+", choices=TEACHERS, default=TEACHERS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ship_only", action="store_true", help="train nothing: the runs are there already")
    args = parser.parse_args()
    for task in args.tasks:
        run = args.runs / f"shapes-teacher-{task}"
        if not args.ship_only:
            subprocess.run(teacher_command(task, run, args.seed), check=True)
        ship(run, SHAPES / "teachers" / task, SHAPES.parents[1] / "model_cards" / f"shapes_teacher_{task}")


if __name__ == "__main__":
    main()
