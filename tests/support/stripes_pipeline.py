# SPDX-License-Identifier: Apache-2.0
"""A pipeline as a library of models would ship it: it samples by itself, without our code."""

import torch
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import nn
from torch.nn.functional import pad

from tests.support.tiny import WORDS


class StripesTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Takes a list of texts `[L, D]`; attends from image tokens to the words; predicts minus the velocity."""

    @register_to_config
    def __init__(self, in_channels: int = 4, width: int = 16):
        super().__init__()
        self.embed, self.time = nn.Linear(4 * in_channels, width), nn.Linear(1, width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, 4 * in_channels)

    def forward(self, tokens, time, texts):
        x = self.embed(tokens) + self.time(time[:, None])[:, None]
        longest = max(map(len, texts))
        words = torch.stack([pad(text, (0, 0, 0, longest - len(text))) for text in texts])
        real = torch.stack([torch.arange(longest) < len(text) for text in texts])
        scores = self.to_q(x) @ self.to_k(words).mT / 4
        weights = scores.masked_fill(~real[:, None], -torch.inf).softmax(-1)
        return -self.out(torch.tanh(x + weights @ self.to_v(words)))


class StripesPipeline(DiffusionPipeline):
    """What a library of models would ship: strength 0 is no guidance, and it is added on top."""

    def __init__(
        self, transformer: StripesTransformer, vae: AutoencoderKL, scheduler: FlowMatchEulerDiscreteScheduler
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.vae_scale_factor = 2

    def words(self, prompt: str) -> torch.Tensor:
        numbers = torch.tensor([float(WORDS.index(word) + 1) for word in prompt.split()] or [0.0])
        return torch.sin(numbers[:, None] * torch.arange(1, self.transformer.config.width + 1))

    @torch.no_grad()
    def __call__(self, prompt, latents, num_inference_steps, strength=0.0):
        self.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist())
        sigmas, texts, empty = self.scheduler.sigmas, [self.words(p) for p in prompt], [self.words("")] * len(prompt)
        for s, t in zip(sigmas[:-1], sigmas[1:], strict=True):
            time = (1 - s).expand(len(latents))
            v = -unpack(self.transformer(pack(latents), time, texts), latents.shape)
            if strength > 0:
                v = v + strength * (v + unpack(self.transformer(pack(latents), time, empty), latents.shape))
            latents = latents + (t - s) * v
        return (self.vae.decode(latents / 2).sample / 2 + 0.5).clamp(0, 1)


def pack(latents):
    return nn.functional.pixel_unshuffle(latents, 2).flatten(2).mT


def unpack(tokens, shape):
    return nn.functional.pixel_shuffle(tokens.mT.reshape(shape[0], -1, shape[2] // 2, shape[3] // 2), 2)
