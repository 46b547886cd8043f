# SPDX-License-Identifier: Apache-2.0
"""Statistics of images: values worked out by hand, and independence of the batch."""

import colorsys

import numpy as np
import pytest
import torch

from tests.support.random_images import pictures
from trl_diffusion_opd.evaluation.statistics import STATISTICS, diversity, measure


def plain(*color: float, size: int = 8) -> torch.Tensor:
    return torch.tensor(color, dtype=torch.float64).view(3, 1, 1).expand(3, size, size)


def gray(values: torch.Tensor) -> torch.Tensor:
    return values.double().expand(3, *values.shape)


# brightness, contrast, saturation, sharpness
CASES = {
    "black": (plain(0, 0, 0), (0, 0, 0, 0)),
    "white": (plain(1, 1, 1), (1, 0, 0, 0)),
    "gray": (plain(0.25, 0.25, 0.25), (0.25, 0, 0, 0)),
    "red": (plain(1, 0, 0), (0.299, 0, 1, 0)),
    "dark green": (plain(0, 0.5, 0), (0.587 / 2, 0, 1, 0)),
    "pale blue": (plain(0.5, 0.75, 1), (0.299 / 2 + 0.587 * 0.75 + 0.114, 0, 0.5, 0)),
    # 0, 1/7, ..., 1: variance (8^2 - 1) / 12 / 7^2. The Laplacian of a plane is 0.
    "even gradient": (gray((torch.arange(8.0).double() / 7).expand(8, 8)), (0.5, (63 / 12) ** 0.5 / 7, 0, 0)),
    # Every neighbor is the other color: -4 and 4.
    "checkerboard": (gray((torch.arange(8)[:, None] + torch.arange(8)) % 2), (0.5, 0.5, 0, 4)),
    # Half black, half white: next to the border the Laplacian is 1 or -1, in 2 of 6 columns.
    "halves": (gray((torch.arange(8) > 3).expand(8, 8)), (0.5, 0.5, 0, (2 / 6) ** 0.5)),
    # One white pixel of 25: the Laplacian is -4, four times 1 and four times 0, its mean is 0.
    "one pixel": (gray(torch.eye(25)[12].view(5, 5)), (0.04, 0.04**0.5 * 0.96**0.5, 0, (20 / 9) ** 0.5)),
    # Half red, half gray.
    "half red": (torch.cat([plain(1, 0, 0)[..., :4], plain(0.299, 0.299, 0.299)[..., :4]], 2), (0.299, 0, 0.5, 0)),
}


@pytest.mark.parametrize(("image", "expected"), CASES.values(), ids=CASES)
def test_values_by_hand(image, expected):
    found = measure(image[None])
    assert list(found) == list(STATISTICS) and all(value.dtype == torch.float64 for value in found.values())
    assert [value.item() for value in found.values()] == pytest.approx(expected, abs=1e-12)
    # Images come as float32.
    assert [value.item() for value in measure(image[None].float()).values()] == pytest.approx(expected, abs=1e-6)


def test_noise_against_numpy_and_the_standard_library():
    images = pictures(2, 11, 7)
    found = measure(images)
    for index, image in enumerate(images.double().numpy()):
        y = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
        laplacian = [
            y[i - 1, j] + y[i + 1, j] + y[i, j - 1] + y[i, j + 1] - 4 * y[i, j]
            for i in range(1, 10)
            for j in range(1, 6)
        ]
        hsv = [colorsys.rgb_to_hsv(*image[:, i, j])[1] for i in range(11) for j in range(7)]
        expected = (y.mean(), y.std(), np.mean(hsv), np.std(laplacian))
        assert [found[name][index].item() for name in STATISTICS] == pytest.approx(expected, rel=1e-9)


def test_no_number_depends_on_the_batch():
    images = pictures(5, 40, 33)
    together = measure(images)
    for index in range(5):
        alone = measure(images[index : index + 1])
        assert all(alone[name].item() == together[name][index].item() for name in STATISTICS)
    assert measure(images.flip(0))["sharpness"].flip(0).equal(together["sharpness"])


def test_diversity_by_hand():
    black, white, middle = plain(0, 0, 0), plain(1, 1, 1), plain(0.5, 0.5, 0.5)
    assert diversity(torch.stack([black, white])).tolist() == [1, 1]
    assert diversity(torch.stack([middle] * 3)).tolist() == [0, 0, 0]
    # Distances 0, 1, 1: their mean is 2/3, and so is that of the values.
    found = diversity(torch.stack([black, black, white]))
    assert found.tolist() == [0.5, 0.5, 1] and found.mean() == pytest.approx(2 / 3)
    # One channel of three differs, by 0.5: sqrt(0.25 / 3).
    assert diversity(torch.stack([black, plain(0, 0.5, 0)])).tolist() == pytest.approx([(0.25 / 3) ** 0.5] * 2)


def test_diversity_is_blind_to_texture_and_not_to_composition():
    board = gray((torch.arange(64)[:, None] + torch.arange(64)) % 2)
    assert diversity(torch.stack([board, 1 - board])).tolist() == [0, 0]  # 64 to 32 pixels: both are gray
    halves = gray((torch.arange(64) > 31).expand(64, 64))
    assert diversity(torch.stack([halves, 1 - halves])).tolist() == [1, 1]
    # Small images are compared as they are.
    assert diversity(torch.stack([board, 1 - board])[..., :8, :8]).tolist() == [1, 1]


def test_other_shapes_are_refused():
    for images in (torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 2, 8)):
        with pytest.raises(
            ValueError, match=r"must be `\[B, 3, H, W\]` with 3 pixels or more along each edge, but is"
        ):
            measure(images)
    with pytest.raises(ValueError, match="compares two or more images, but got 1. Draw more of a prompt"):
        diversity(torch.zeros(1, 3, 8, 8))
