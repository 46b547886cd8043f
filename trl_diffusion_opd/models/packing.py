# SPDX-License-Identifier: Apache-2.0
"""Latents as tokens, for transformers that take 2 x 2 of them as one."""

import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


def pack(latents: torch.Tensor) -> torch.Tensor:
    """`[B, C, H, W]` to tokens `[B, H W / 4, 4 C]`, channels first: `(c, dy, dx)`."""
    return pixel_unshuffle(latents, 2).flatten(2).mT


def unpack(tokens: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Tokens `[B, H W / 4, 4 C]` to latents of `shape`, `[B, C, H, W]`."""
    batch, _, height, width = shape
    return pixel_shuffle(tokens.mT.reshape(batch, -1, height // 2, width // 2), 2)
