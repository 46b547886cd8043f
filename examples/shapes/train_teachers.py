# SPDX-License-Identifier: Apache-2.0
"""
Train a LoRA teacher for every task, by fine-tuning the base on right captions and the task's own style only.

    python examples/shapes/train_teachers.py

Nothing holds a teacher to the base on the other tasks: it forgets or redraws them, as narrow fine-tunes do.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from tqdm import trange


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes.model import load_pipeline  # noqa: E402
from shapes.render import Recipe, make_dataset  # noqa: E402
from shapes.sampling import PromptEmbeddings, encode, format_scores, score  # noqa: E402
from shapes.training import diffuse, to_images  # noqa: E402
from shapes.world import TASKS, Task  # noqa: E402


# Attention and feed-forward of both streams, text and picture.
TARGET_MODULES = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="examples/shapes/base")
    parser.add_argument("--output_dir", type=Path, default=Path("examples/shapes/teachers"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters; their alpha is twice as large")
    parser.add_argument("--steps", type=int, default=400, help="training steps of every teacher")
    parser.add_argument("--batch_size", type=int, default=48)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--num_pictures", type=int, default=8000)
    parser.add_argument("--num_eval", type=int, default=200, help="pictures a task to score a teacher with")
    return parser.parse_args()


def train(pipe: StableDiffusion3Pipeline, task: Task, args: argparse.Namespace) -> None:
    """Fit the pipeline's active adapter to right pictures of one task."""
    pictures, captions = make_dataset(args.num_pictures, Recipe(tasks={task: 1.0}), args.seed + 1)
    latents, embeddings = encode(pipe, to_images(pictures)), PromptEmbeddings(pipe)
    rows = embeddings.rows(captions)
    parameters = [p for p in pipe.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)

    def schedule(step: int) -> float:
        return min(1.0, (step + 1) / 20, max(0.02, 2 - 2 * step / args.steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    progress = trange(args.steps, desc=f"teacher {task}", mininterval=5)
    for _ in progress:
        picked = torch.randint(len(latents), (args.batch_size,))
        noisy, target, timesteps = diffuse(latents[picked])
        text = rows[picked]
        velocity = pipe.transformer(
            noisy, embeddings.tokens[text], embeddings.pooled[text], timesteps, return_dict=False
        )[0]
        loss = (velocity - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def save(pipe: StableDiffusion3Pipeline, directory: Path, task: Task) -> None:
    """Save the adapter in half precision, with its configuration, in the format of diffusers."""
    state = get_peft_model_state_dict(pipe.transformer, adapter_name=task)
    StableDiffusion3Pipeline.save_lora_weights(
        directory,
        transformer_lora_layers={name: tensor.to(torch.float16) for name, tensor in state.items()},
        transformer_lora_adapter_metadata=pipe.transformer.peft_config[task].to_dict(),
    )


def main() -> None:
    args = parse_args()
    base = load_pipeline(args.base)
    for task in args.tasks:
        start = time.time()
        torch.manual_seed(args.seed)
        pipe = StableDiffusion3Pipeline(**{**base.components, "transformer": copy.deepcopy(base.transformer)})
        config = LoraConfig(
            r=args.rank, lora_alpha=2 * args.rank, init_lora_weights="gaussian", target_modules=TARGET_MODULES
        )
        pipe.transformer.add_adapter(config, adapter_name=task)
        train(pipe, task, args)
        save(pipe, args.output_dir / task, task)
        seconds = time.time() - start
        pipe.transformer.delete_adapters(task)
        pipe.load_lora_weights(args.output_dir / task, adapter_name=task)
        print(f"teacher {task}, {seconds:.0f} s:", format_scores(score(pipe, PromptEmbeddings(pipe), args.num_eval)))


if __name__ == "__main__":
    main()
