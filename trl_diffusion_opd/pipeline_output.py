# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class StableDiffusion3SDEPipelineOutput(BaseOutput):
    """
    Images of a rollout together with the rollout itself. `B` is the number of images, `N` the number of steps.

    Args:
        images (`list[PIL.Image.Image]` or `np.ndarray` or `torch.Tensor`):
            The denoised images, or the last latents for `output_type="latent"`.
        latents (`torch.Tensor` of shape `[B, N + 1, C, H, W]`):
            Every state of the trajectory, from the initial noise to the result, in float32.
        log_probs (`torch.Tensor` of shape `[B, N]`):
            Log-density of each step taken, averaged over the latent dimensions; 0 for deterministic steps.
        means (`torch.Tensor` of shape `[B, N, C, H, W]`):
            Mean of each transition (Eq. 7 of the DiffusionOPD paper).
        stds (`torch.Tensor` of shape `[N]`):
            Standard deviation of each transition, `sqrt(-dt)` included.
        sigmas (`torch.Tensor` of shape `[N + 1]`):
            Noise levels visited.
        timesteps (`torch.Tensor` of shape `[N]`):
            What the transformer was told at each step: `1000 * sigma`.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    latents: torch.Tensor
    log_probs: torch.Tensor
    means: torch.Tensor
    stds: torch.Tensor
    sigmas: torch.Tensor
    timesteps: torch.Tensor
