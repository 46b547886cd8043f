# SPDX-License-Identifier: Apache-2.0
"""What the trainings of the base and of the teachers have in common: flow matching with Stable Diffusion 3's times."""

import numpy as np
import torch

from .model import SHIFT


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
