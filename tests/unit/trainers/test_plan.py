# SPDX-License-Identifier: Apache-2.0
"""The estimates of memory in the plan of a run."""

import weakref

import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trl_diffusion_opd.models.sd3 import StableDiffusion3


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made while it is entered have held at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return result

    def free(self, key, size):
        self.known.remove(key)
        self.now -= size


@pytest.mark.parametrize("number", [1, 4])
def test_peak_of_decoding_by_the_vae_of_stable_diffusion_3(number):
    """Its shapes alone, without memory."""
    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        latents = torch.empty(number, 16, 64, 64)
        with LiveBytes() as live:
            vae.decode(latents)
    assert StableDiffusion3().decoding_bytes(vae, number * 512**2) == pytest.approx(live.peak, rel=0.02)
    assert live.peak == pytest.approx(0.81e9 * number, rel=0.01)
