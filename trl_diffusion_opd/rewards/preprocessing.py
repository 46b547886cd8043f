# SPDX-License-Identifier: Apache-2.0
"""From images in `[0, 1]` to the input of a vision model, with PIL and torch alone."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


# Of the channels red, green, blue: what CLIP, HPSv2.1 and ImageReward were trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Rounds `[B, 3, H, W]` in `[0, 1]` to bytes `[B, H, W, 3]`."""
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Rounds `[B, 3, H, W]` in `[0, 1]` to B images."""
    return [Image.fromarray(image) for image in to_uint8(images)]


def normalize(
    images: torch.Tensor, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD
) -> torch.Tensor:
    """Subtracts the mean of each channel and divides by its standard deviation."""
    mean, std = (
        torch.tensor(values, device=images.device, dtype=images.dtype).view(3, 1, 1) for values in (mean, std)
    )
    return (images - mean) / std


def shortest_edge(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width after a resize that brings the shorter of the two to `size`."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def clip_pixels(
    images: list[Image.Image], size: int = 224, *, center: Callable[[float], int] = math.floor
) -> torch.Tensor:
    """
    CLIP's own preprocessing: shorter edge to `size` (PIL, bicubic), center crop, normalization.

    Equal to `transformers.CLIPImageProcessorPil` to the bit, or with `center=round` to `torchvision.transforms` `Resize`,
    `CenterCrop` and `Normalize` on PIL's images: the two libraries round the margin of the crop differently.

    Returns:
        `torch.Tensor`: `[B, 3, size, size]`, float32, on the CPU.
    """
    pixels = []
    for image in images:
        height, width = shortest_edge(image.height, image.width, size)
        resized = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
        top, left = center((height - size) / 2), center((width - size) / 2)
        pixels.append(torch.from_numpy(resized[top : top + size, left : left + size].copy()))
    return normalize(torch.stack(pixels).permute(0, 3, 1, 2).float() / 255)


def clip_pixels_bilinear(images: torch.Tensor, size: int = 224) -> torch.Tensor:
    """
    The preprocessing of ClipScore: as CLIP's own, but bilinear and on the floats, without rounding to bytes.

    Equal to `torchvision.transforms` `Resize`, `CenterCrop` and `Normalize` on tensors.
    """
    height, width = shortest_edge(*images.shape[-2:], size)
    images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return normalize(images[..., top : top + size, left : left + size])


def hps_pixels(images: torch.Tensor, size: int = 224) -> torch.Tensor:
    """
    The preprocessing of HPSv2.1: longer edge to `size` (bicubic, on the floats), black around it, normalization.
    """
    height, width = images.shape[-2:]
    if max(height, width) != size:
        scale = size / max(height, width)
        height, width = round(height * scale), round(width * scale)
        images = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
    above, left = (size - height) // 2, (size - width) // 2
    return normalize(F.pad(images, (left, size - width - left, above, size - height - above)))
