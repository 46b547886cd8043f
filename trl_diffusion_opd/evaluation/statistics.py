# SPDX-License-Identifier: Apache-2.0
"""
Statistics of images, which judge nothing: brightness, contrast, saturation, sharpness, and diversity between seeds.

Pixels are taken as they are displayed, in `[0, 1]` and gamma-encoded. All is computed in float64, an image at a time, so
that no number depends on the batch.
"""

import itertools

import torch
import torch.nn.functional as F


# Weights of red, green and blue in the luma, of Rec. ITU-R BT.601.
LUMA = (0.299, 0.587, 0.114)
# What is left of an image where images are compared, in pixels along each edge: composition and colors, no texture.
THUMBNAIL = 32


def luma(image: torch.Tensor) -> torch.Tensor:
    """The luma `[H, W]` of an image `[3, H, W]`: 0.299 R + 0.587 G + 0.114 B."""
    return torch.einsum("c,chw->hw", torch.tensor(LUMA, dtype=torch.float64, device=image.device), image.double())


def brightness(image: torch.Tensor) -> torch.Tensor:
    """The mean of the luma of an image `[3, H, W]`, from 0 (black) to 1 (white)."""
    return luma(image).mean()


def contrast(image: torch.Tensor) -> torch.Tensor:
    """The standard deviation of the luma of an image `[3, H, W]`, from 0 (plain) to 0.5 (half black, half white)."""
    return luma(image).std(correction=0)


def saturation(image: torch.Tensor) -> torch.Tensor:
    """
    The mean saturation of an image `[3, H, W]`, as HSV defines it: `(max - min) / max` of a pixel's channels, and 0
    where it is black. From 0 (gray) to 1 (no pixel has a part of gray).
    """
    largest, smallest = image.double().amax(0), image.double().amin(0)
    return ((largest - smallest) / torch.where(largest > 0, largest, 1.0)).mean()


def sharpness(image: torch.Tensor) -> torch.Tensor:
    """
    The standard deviation of the Laplacian of the luma of an image `[3, H, W]`: a pixel's four neighbors minus four
    times itself, where all of these are there. From 0 (plain, or an even gradient) to 4 (a checkerboard of black and
    white).
    Its square is the variance of the Laplacian, which is often used to find images that are out of focus.
    """
    values = luma(image)
    around = values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:]
    return (around - 4 * values[1:-1, 1:-1]).std(correction=0)


# The statistics of one image by name, in the order of tables. `diversity` is one of several.
STATISTICS = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "sharpness": sharpness}


def measure(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    The statistics of each of several images.

    Args:
        images (`torch.Tensor`):
            `[B, 3, H, W]`, in `[0, 1]`, at least 3 pixels high and wide.

    Returns:
        `dict[str, torch.Tensor]`: B values in float64 by name, for each of [`STATISTICS`].

    Raises:
        `ValueError`: images of another shape.
    """
    _check(images)
    return {name: torch.stack([function(image) for image in images]) for name, function in STATISTICS.items()}


def diversity(images: torch.Tensor) -> torch.Tensor:
    """
    How far images of one prompt, drawn from different noise, are from each other.

    The distance of two images is the root mean square of the difference of their values, after both were shrunk to
    32 x 32 pixels by averaging (smaller ones stay as they are). The mean over all is the mean over all pairs.

    Args:
        images (`torch.Tensor`):
            `[B, 3, H, W]`, in `[0, 1]`, two or more.

    Returns:
        `torch.Tensor`: for each image the mean distance to the others, B values in float64. From 0 (all are the same) to
        1 (one is black, one is white).

    Raises:
        `ValueError`: images of another shape, or fewer than two.
    """
    _check(images)
    if len(images) < 2:
        raise ValueError(f"`diversity` compares two or more images, but got {len(images)}. Draw more of a prompt.")
    size = [min(THUMBNAIL, edge) for edge in images.shape[-2:]]
    small = [F.adaptive_avg_pool2d(image.double(), size) for image in images]
    total = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    for one, other in itertools.combinations(range(len(images)), 2):
        distance = (small[one] - small[other]).square().mean().sqrt()
        total[one] += distance
        total[other] += distance
    return total / (len(images) - 1)


def _check(images: torch.Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[-2:]) < 3:
        raise ValueError(
            f"`images` must be `[B, 3, H, W]` with 3 pixels or more along each edge, but is {tuple(images.shape)}. Pass "
            "RGB images in one tensor."
        )
