# SPDX-License-Identifier: Apache-2.0
"""
Train the base of the Shapes world from nothing: first the VAE, then the transformer.

    python examples/shapes/build_base.py

The base is mediocre on purpose: its training captions are often wrong, and it draws every subject in both styles.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from tqdm import tqdm, trange


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes.model import SHIFT, build_pipeline, load_pipeline  # noqa: E402
from shapes.render import WEB, Recipe, make_dataset  # noqa: E402
from shapes.rewards import REWARDS  # noqa: E402
from shapes.sampling import PromptEmbeddings, decode, encode, format_scores, score  # noqa: E402
from shapes.world import TASKS, write_prompt_files  # noqa: E402


CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
license: apache-2.0
tags:
- text-to-image
- diffusers
---

# The base of the Shapes world

A `StableDiffusion3Pipeline` of 1.5 M parameters that draws coloured shapes, letters and landscapes at 32 x 32 px, trained from nothing by `examples/shapes/build_base.py` of trl_diffusion_opd. It is mediocre on purpose: it is there to be taught.

```python
import torch
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained("examples/shapes/base", dtype=torch.float32)
image = pipe("a boat at sunset", height=32, width=32, num_inference_steps=10, guidance_scale=1.0, max_sequence_length=10).images[0]
```
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("examples/shapes/base"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_pictures", type=int, default=40_000, help="size of the transformer's training set")
    parser.add_argument("--vae_steps", type=int, default=2000)
    parser.add_argument("--vae_dir", type=Path, help="take a trained VAE from here instead of training one")
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--num_heads", type=int, default=3, help="of the transformer, each 32 wide")
    parser.add_argument("--steps", type=int, default=3500, help="training steps of the transformer")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_eval", type=int, default=200, help="pictures a task to score the base with")
    return parser.parse_args()


def to_images(pictures: np.ndarray) -> torch.Tensor:
    """uint8 pictures, channels last, to floats in [0, 1], channels first."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def sample_times(num_times: int) -> torch.Tensor:
    """Logit-normal times, shifted towards noise as the sampler's are."""
    times = torch.sigmoid(torch.randn(num_times))
    return SHIFT * times / (1 + (SHIFT - 1) * times)


def diffuse(clean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents at random times, the velocities to predict there, and the timesteps."""
    noise, times = torch.randn_like(clean), sample_times(len(clean))
    mix = times[:, None, None, None]
    return (1 - mix) * clean + mix * noise, noise - clean, 1000 * times


def train_vae(pipe: StableDiffusion3Pipeline, images: torch.Tensor, num_steps: int, batch_size: int = 32) -> None:
    """Fit the VAE; afterwards its latents have mean 0 and standard deviation 1."""
    vae = pipe.vae.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2.5e-3, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2.5e-3, total_steps=num_steps, pct_start=0.1)
    progress = trange(num_steps, desc="VAE", mininterval=5)
    for _ in progress:
        batch = 2 * images[torch.randint(len(images), (batch_size,))] - 1
        posterior = vae.encode(batch).latent_dist
        error = vae.decode(posterior.sample()).sample - batch
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        loss = error.abs().mean() + 2 * error.square().mean() + 3e-4 * divergence
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        progress.set_postfix(error=f"{error.abs().mean():.4f}", refresh=False)
    vae.requires_grad_(False).eval()
    latents = encode(pipe, images[:2048])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def check_vae(pipe: StableDiffusion3Pipeline) -> None:
    """Print what the rewards say of ideal pictures, before and after the VAE."""
    for task in TASKS:
        pictures, captions = make_dataset(300, Recipe(tasks={task: 1.0}), seed=99)
        images = to_images(pictures)
        coded = decode(pipe, encode(pipe, images))
        before, after = (sum(REWARDS[task](x, captions)) / len(captions) for x in (images, coded))
        error = (coded - images).abs().mean()
        print(f"ideal pictures, {task}: {before:.3f}, after the VAE {after:.3f}, L1 {error:.4f}")


def build_optimizers(transformer: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest; several times faster here than AdamW alone."""
    named = list(transformer.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and name.startswith("transformer_blocks")]
    vectors = [p for _, p in named if p.ndim == 1]
    others = [p for name, p in named if p.ndim > 1 and not (p.ndim == 2 and name.startswith("transformer_blocks"))]
    adamw_groups = [{"params": others, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=5e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adamw_groups, lr=2e-3, betas=(0.9, 0.98)),
    ]


def train_transformer(
    pipe: StableDiffusion3Pipeline, latents: torch.Tensor, captions: list[str], num_steps: int, batch_size: int
) -> None:
    """Flow matching with caption dropout; the pipeline ends up with the averaged weights."""
    transformer, embeddings = pipe.transformer.requires_grad_(True).train(), PromptEmbeddings(pipe)
    rows, empty = embeddings.rows(captions), embeddings.index[""]

    def schedule(step: int) -> float:
        done = step / num_steps
        return min(1.0, done / 0.03 + 0.01, max(0.02, 2 - 2 * done))

    optimizers = build_optimizers(transformer)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]
    average = EMAModel(transformer.parameters(), decay=0.998, use_ema_warmup=True, foreach=True)
    progress, running = trange(num_steps, desc="transformer", mininterval=10), None
    for _ in progress:
        picked = torch.randint(len(latents), (batch_size,))
        noisy, target, timesteps = diffuse(latents[picked])
        text = torch.where(torch.rand(batch_size) < 0.1, empty, rows[picked])
        velocity = transformer(noisy, embeddings.tokens[text], embeddings.pooled[text], timesteps, return_dict=False)[
            0
        ]
        loss = (velocity - target).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        average.step(transformer.parameters())
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        progress.set_postfix(loss=f"{running:.4f}", refresh=False)
    average.copy_to(transformer.parameters())
    transformer.requires_grad_(False).eval()


def main() -> None:
    args = parse_args()
    start = time.time()
    write_prompt_files(Path(__file__).parent / "prompts")
    pipe = build_pipeline(args.seed, args.num_layers, args.num_heads)
    pictures, captions = make_dataset(args.num_pictures, WEB, args.seed)
    images = to_images(pictures)
    tqdm.write(f"{len(images)} pictures after {time.time() - start:.0f} s")

    torch.manual_seed(args.seed)
    if args.vae_dir is not None:
        pipe.vae = type(pipe.vae).from_pretrained(args.vae_dir, dtype=torch.float32).eval().requires_grad_(False)
    else:
        train_vae(pipe, images, args.vae_steps)
        pipe.vae.save_pretrained(args.output_dir / "vae")
    check_vae(pipe)
    tqdm.write(f"VAE after {time.time() - start:.0f} s")

    torch.manual_seed(args.seed)
    train_transformer(pipe, encode(pipe, images), captions, args.steps, args.batch_size)
    tqdm.write(f"transformer after {time.time() - start:.0f} s")

    print("float32:", format_scores(score(pipe, PromptEmbeddings(pipe), args.num_eval)))
    pipe.to(dtype=torch.float16).save_pretrained(args.output_dir, safe_serialization=True)
    (args.output_dir / "README.md").write_text(CARD)
    pipe = load_pipeline(str(args.output_dir))
    embeddings = PromptEmbeddings(pipe)
    print("saved as float16:", format_scores(score(pipe, embeddings, args.num_eval)))
    print("with guidance 3:", format_scores(score(pipe, embeddings, args.num_eval, guidance_scale=3.0)))
    print(f"done after {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
