# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5: all that is particular to them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import nn

from .family import ModelFamily, Prompt


class StableDiffusion3(ModelFamily):
    """Stable Diffusion 3 and 3.5: two CLIPs and a T5, joint attention, a static shift, one batch for both branches."""

    pipeline_class = StableDiffusion3Pipeline
    transformer_class = SD3Transformer2DModel
    # The attention projections of image and text stream: what the published teachers were trained on.
    lora_targets = [
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    ]
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    longest_prompt = 512
    skip_last_steps = 1  # the scheduler shifts its smallest sigma twice: the last step moves next to nothing
    same_transformer = ("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim")
    same_vae = ("latent_channels", "scaling_factor", "shift_factor")
    states_per_block = 20

    def encode(
        self,
        pipe: StableDiffusion3Pipeline,
        prompts: Sequence[str],
        *,
        device: torch.device,
        max_sequence_length: int,
    ) -> list[Prompt]:
        embeds, _, pooled, _ = pipe.encode_prompt(
            list(prompts),
            None,
            None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
        pairs = zip(embeds.cpu(), pooled.cpu(), strict=True)
        return [{"prompt_embeds": tokens, "pooled_prompt_embeds": vector} for tokens, vector in pairs]

    def text_tokens(self, pipe: StableDiffusion3Pipeline, max_sequence_length: int) -> int:
        return pipe.tokenizer_max_length + max_sequence_length

    def default_size(self, pipe: StableDiffusion3Pipeline) -> tuple[int, int]:
        edge = pipe.default_sample_size * pipe.vae_scale_factor
        return edge, edge

    def latent_shape(
        self, pipe: StableDiffusion3Pipeline, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        default = self.default_size(pipe)
        multiple = pipe.vae_scale_factor * pipe.patch_size
        size = {"height": height or default[0], "width": width or default[1]}
        for name, pixels in size.items():
            if pixels % multiple:
                raise ValueError(
                    f"`{name}` must be a multiple of {multiple} (VAE factor x patch size), but is {pixels}. Use "
                    f"{max(1, round(pixels / multiple)) * multiple}."
                )
            if pixels // multiple > pipe.transformer.config.pos_embed_max_size:
                most = pipe.transformer.config.pos_embed_max_size * multiple
                raise ValueError(f"`{name}` must be at most {most} for this model, but is {pixels}.")
        channels = pipe.transformer.config.in_channels
        return channels, size["height"] // pipe.vae_scale_factor, size["width"] // pipe.vae_scale_factor

    def image_tokens(self, pipe: StableDiffusion3Pipeline, latent_shape: tuple[int, int, int]) -> int:
        return math.prod(latent_shape[1:]) // pipe.patch_size**2

    def decode_batch(self, pipe: StableDiffusion3Pipeline, latents: torch.Tensor) -> torch.Tensor:
        latents = (latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).to(pipe.vae.dtype)
        return pipe.vae.decode(latents, return_dict=False)[0]

    def mu(self, pipe: StableDiffusion3Pipeline, image_tokens: int, num_steps: int) -> float | None:
        config = pipe.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return None
        return calculate_shift(
            image_tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.16),
        )

    def predict(
        self,
        transformer: SD3Transformer2DModel,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        prompt: Prompt,
        guidance_scale: float = 1.0,
        joint_attention_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As of the base class; `sample` is repeated as often as there are prompts for it, `[2 B]` for both branches."""
        embeds, pooled = prompt["prompt_embeds"], prompt["pooled_prompt_embeds"]
        repeats = len(embeds) // len(sample)
        sample = sample.repeat(repeats, *[1] * (sample.ndim - 1))
        timestep = timestep.repeat(repeats) if timestep.ndim else timestep.expand(len(sample))
        # `transformer.dtype` walks over all modules, which on a small model takes as long as half a forward.
        dtype = next(transformer.parameters()).dtype
        output = transformer(
            hidden_states=sample.to(dtype),
            timestep=timestep,
            encoder_hidden_states=embeds.to(dtype),
            pooled_projections=pooled.to(dtype),
            joint_attention_kwargs=joint_attention_kwargs,
            return_dict=False,
            **kwargs,
        )[0]
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def velocity(
        self,
        transformer: nn.Module,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        positive: Prompt,
        negative: Prompt | None,
        guidance_scale: float,
    ) -> torch.Tensor:
        if negative is None:
            return self.predict(transformer, sample, timestep, positive)
        # Both branches in one forward, as the stock pipeline has them.
        both = {name: torch.cat([negative[name], positive[name]]) for name in positive}
        unconditional, conditional = self.predict(transformer, sample, timestep, both).chunk(2)
        return self.guide(conditional, unconditional, guidance_scale)

    def card_tags(self, base: str | None) -> list[str]:
        is_35 = base is not None and base.startswith("stabilityai/stable-diffusion-3.5-")
        return ["sd3.5", "sd3.5-diffusers"] if is_35 else []

    def blocks(self, transformer: SD3Transformer2DModel) -> tuple[int, int]:
        config = transformer.config
        return config.num_layers, config.num_attention_heads * config.attention_head_dim
