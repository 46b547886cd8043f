# SPDX-License-Identifier: Apache-2.0
"""
Score the base, the teachers, their merges, and a student, all on the same held-out prompts and the same noise.

    python examples/shapes/evaluate.py
    python examples/shapes/evaluate.py --student outputs/shapes --pictures shapes.png
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes.model import load_pipeline  # noqa: E402
from shapes.sampling import PromptEmbeddings, draw, score  # noqa: E402
from shapes.world import TASKS, sample_prompts  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="examples/shapes/base")
    parser.add_argument("--teachers", type=Path, default=Path("examples/shapes/teachers"))
    parser.add_argument("--student", type=Path, help="folder with the LoRA weights of a student")
    parser.add_argument("--num_images", type=int, default=200, help="pictures a task and model")
    parser.add_argument("--num_steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--pictures", type=Path, help="save examples here: a row a model, five pictures a task")
    return parser.parse_args()


def contact_sheet(rows: list[torch.Tensor], scale: int = 3, gap: int = 2) -> Image.Image:
    """Pictures side by side, one row a tensor of pictures."""
    padded = [torch.nn.functional.pad(row, (gap, gap, gap, gap), value=1.0) for row in rows]
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in padded], dim=1)
    pixels = (sheet.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    return Image.fromarray(pixels).resize((scale * pixels.shape[1], scale * pixels.shape[0]), Image.Resampling.NEAREST)


def use_adapters(pipe: StableDiffusion3Pipeline, weights: dict[str, float]) -> None:
    """Let the weighted sum of adapters work; of none, if there are no weights."""
    if weights:
        pipe.enable_lora()
        pipe.set_adapters(list(weights), list(weights.values()))
    else:
        pipe.disable_lora()


def main() -> None:
    args = parse_args()
    pipe = load_pipeline(args.base)
    embeddings = PromptEmbeddings(pipe)
    for task in TASKS:
        pipe.load_lora_weights(args.teachers / task, adapter_name=task)

    models = [("base", {}, 1.0), ("base, guidance 3", {}, 3.0)]
    models += [(f"teacher {task}", {task: 1.0}, 1.0) for task in TASKS]
    models += [("merge, sum", dict.fromkeys(TASKS, 1.0), 1.0), ("merge, mean", dict.fromkeys(TASKS, 1 / 3), 1.0)]
    if args.student is not None:
        pipe.load_lora_weights(args.student, adapter_name="student")
        models.append(("student", {"student": 1.0}, 1.0))

    print("| model | " + " | ".join(TASKS) + " |\n|---|" + "---|" * len(TASKS))
    rows = []
    for name, weights, guidance_scale in models:
        use_adapters(pipe, weights)
        options = {"num_steps": args.num_steps, "guidance_scale": guidance_scale}
        scores = score(pipe, embeddings, args.num_images, seed=args.seed, **options)
        print(f"| {name} | " + " | ".join(f"{mean:.3f} ({error:.3f})" for mean, error in scores.values()) + " |")
        if args.pictures is not None:
            texts = [text for task in TASKS for text in sample_prompts(task, "test", 5, args.seed)]
            rows.append(draw(pipe, embeddings, texts, args.seed, **options))
    if args.pictures is not None:
        contact_sheet(rows).save(args.pictures)


if __name__ == "__main__":
    main()
