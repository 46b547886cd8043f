# SPDX-License-Identifier: Apache-2.0
"""
Text and pictures in and out of the model, and scores.

`sample` gives what `pipe(...)` gives, without its overhead: a few milliseconds a call matter at this size.
"""

from collections.abc import Sequence

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from .model import LATENT_CHANNELS, LATENT_SIZE, MAX_TOKENS
from .rewards import REWARDS
from .world import TASKS, Split, prompts, sample_prompts


SCORE_SEED = 7
Embeddings = tuple[torch.Tensor, torch.Tensor]  # of the tokens: [B, 20, 64]; pooled: [B, 64]


class PromptEmbeddings:
    """The embeddings of every prompt of the world and of the empty one, computed once."""

    def __init__(self, pipe: StableDiffusion3Pipeline):
        texts = [prompt for task in TASKS for split in ("train", "test") for prompt in prompts(task, split)] + [""]
        self.index = {text: i for i, text in enumerate(texts)}
        with torch.no_grad():
            self.tokens, _, self.pooled, _ = pipe.encode_prompt(
                texts, None, None, do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS
            )

    def rows(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([self.index[text] for text in texts])

    def __call__(self, texts: Sequence[str]) -> Embeddings:
        rows = self.rows(texts)
        return self.tokens[rows], self.pooled[rows]


@torch.no_grad()
def encode(pipe: StableDiffusion3Pipeline, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
    """Latents of pictures in [0, 1]: [B, 3, 32, 32] to [B, 4, 16, 16]."""
    config = pipe.vae.config
    latents = [pipe.vae.encode(2 * chunk - 1).latent_dist.mode() for chunk in images.split(batch_size)]
    return (torch.cat(latents) - config.shift_factor) * config.scaling_factor


@torch.no_grad()
def decode(pipe: StableDiffusion3Pipeline, latents: torch.Tensor, batch_size: int = 128) -> torch.Tensor:
    """Pictures in [0, 1] from latents: [B, 4, 16, 16] to [B, 3, 32, 32]."""
    config = pipe.vae.config
    latents = latents / config.scaling_factor + config.shift_factor
    images = torch.cat([pipe.vae.decode(chunk).sample for chunk in latents.split(batch_size)])
    return (images / 2 + 0.5).clamp(0, 1)


def noise(num_images: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_images, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=generator)


@torch.no_grad()
def sample(
    transformer: SD3Transformer2DModel,
    latents: torch.Tensor,
    embeddings: Embeddings,
    sigmas: torch.Tensor,
    guidance_scale: float = 1.0,
    negative: Embeddings | None = None,
) -> torch.Tensor:
    """Integrate the probability flow from noise to latents with Euler steps along `sigmas`."""
    if guidance_scale != 1.0:
        embeddings = tuple(torch.cat([a, b.expand_as(a)]) for a, b in zip(embeddings, negative, strict=True))
    for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:], strict=True):
        inputs = latents if guidance_scale == 1.0 else torch.cat([latents, latents])
        velocity = transformer(inputs, *embeddings, 1000 * sigma.expand(len(inputs)), return_dict=False)[0]
        if guidance_scale != 1.0:
            conditional, unconditional = velocity.chunk(2)
            velocity = unconditional + guidance_scale * (conditional - unconditional)
        latents = latents + (next_sigma - sigma) * velocity
    return latents


def draw(
    pipe: StableDiffusion3Pipeline,
    embeddings: PromptEmbeddings,
    texts: Sequence[str],
    seed: int = 0,
    num_steps: int = 10,
    guidance_scale: float = 1.0,
    batch_size: int = 64,
) -> torch.Tensor:
    """Pictures in [0, 1] for prompts: [B, 3, 32, 32]."""
    pipe.scheduler.set_timesteps(num_steps)
    negative = embeddings([""])
    chunks = zip(noise(len(texts), seed).split(batch_size), embeddings.rows(texts).split(batch_size), strict=True)
    latents = [
        sample(
            pipe.transformer,
            start,
            (embeddings.tokens[rows], embeddings.pooled[rows]),
            pipe.scheduler.sigmas,
            guidance_scale,
            negative,
        )
        for start, rows in chunks
    ]
    return decode(pipe, torch.cat(latents))


def score(
    pipe: StableDiffusion3Pipeline,
    embeddings: PromptEmbeddings,
    num_images: int = 200,
    split: Split = "test",
    seed: int = SCORE_SEED,
    **options,
) -> dict[str, tuple[float, float]]:
    """Mean reward and its standard error on every task; prompts and noise depend on `seed` only."""
    scores = {}
    for task in TASKS:
        texts = sample_prompts(task, split, num_images, seed)
        rewards = torch.tensor(REWARDS[task](draw(pipe, embeddings, texts, seed, **options), texts))
        scores[task] = (rewards.mean().item(), rewards.std().item() / num_images**0.5)
    return scores


def format_scores(scores: dict[str, tuple[float, float]]) -> str:
    return "  ".join(f"{task} {mean:.3f} ({error:.3f})" for task, (mean, error) in scores.items())
