# SPDX-License-Identifier: Apache-2.0
"""
A second model family, of the tests: packed latents, prompts of different lengths, a velocity of the other sign, time
that runs from 0 to 1, no text encoders, and a rule of guidance of its own.
"""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from tests.support.stripes_pipeline import StripesPipeline, StripesTransformer, pack, unpack
from trl_diffusion_opd.models.family import Defaults, ModelFamily
from trl_diffusion_opd.models.registry import register_family


class Stripes(ModelFamily):
    pipeline_class, transformer_class, lora_targets = StripesPipeline, StripesTransformer, ["to_q", "to_k", "to_v"]
    text_encoders, longest_prompt = (), 64

    def encode(self, pipe, prompts, *, device, max_sequence_length):
        return [{"words": pipe.words(prompt)[:max_sequence_length]} for prompt in prompts]

    def collate(self, prompts):
        return {"words": [prompt["words"] for prompt in prompts]}

    def defaults(self, configs):
        return Defaults(8, rollout_steps=4, guidance_scale=3.0, max_sequence_length=32)

    def default_size(self, pipe):
        return 16, 16

    def decode_batch(self, pipe, latents):
        return pipe.vae.decode(latents / 2).sample

    def predict(self, transformer, sample, timestep, prompt, guidance_scale):
        time, dtype = (1 - timestep / 1000).expand(len(sample)), next(transformer.parameters()).dtype
        return -unpack(transformer(pack(sample).to(dtype), time.to(dtype), prompt["words"]), sample.shape).float()

    def guide(self, positive, negative, guidance_scale):
        return positive + (guidance_scale - 1) * (positive - negative)

    def call_arguments(self, guidance_scale, max_sequence_length):
        return {"strength": guidance_scale - 1}

    def blocks(self, transformer):
        return 1, transformer.config.width


register_family(Stripes())


def stripes_pipeline(seed: int = 0) -> StripesPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(4, 8),
            latent_channels=4,
            norm_num_groups=1,
        )
        return StripesPipeline(StripesTransformer(), vae.eval(), FlowMatchEulerDiscreteScheduler(shift=2.0))
