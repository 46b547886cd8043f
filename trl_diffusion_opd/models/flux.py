# SPDX-License-Identifier: Apache-2.0
"""FLUX.1, dev and schnell: all that is particular to them."""

from collections.abc import Sequence

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from .family import JOINT_ATTENTION, Configs, Defaults, ModelFamily, Prompt, widened
from .packing import pack, unpack


class Flux(ModelFamily):
    """FLUX.1: packed latents, a CLIP and a padded T5, and a guidance that is an input of the model."""

    pipeline_class = FluxPipeline
    transformer_class = FluxTransformer2DModel
    lora_targets = JOINT_ATTENTION
    text_encoders = ("text_encoder", "text_encoder_2")
    same_transformer = ("in_channels", "joint_attention_dim", "pooled_projection_dim")
    guidance_info = "An input of the model"
    states_per_block = 19

    def defaults(self, configs: Configs) -> Defaults:
        # The padding of a prompt is attended to: another length is another model.
        if configs("transformer").get("guidance_embeds"):
            return Defaults(28, rollout_steps=10, guidance_scale=3.5, max_sequence_length=512)
        return Defaults(4, rollout_steps=4, guidance_scale=1.0, max_sequence_length=256)

    def encode(
        self, pipe: FluxPipeline, prompts: Sequence[str], *, device: torch.device, max_sequence_length: int
    ) -> list[Prompt]:
        embeds, pooled, _ = pipe.encode_prompt(list(prompts), device=device, max_sequence_length=max_sequence_length)
        pairs = zip(embeds.cpu(), pooled.cpu(), strict=True)
        return [{"prompt_embeds": tokens, "pooled_prompt_embeds": vector} for tokens, vector in pairs]

    def channels(self, pipe: FluxPipeline) -> int:
        return super().channels(pipe) // 4

    def needs_negative(self, guidance_scale: float) -> bool:
        return False

    def predict(
        self,
        transformer: FluxTransformer2DModel,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        prompt: Prompt,
        guidance_scale: float,
    ) -> torch.Tensor:
        dtype, (batch, _, height, width) = next(transformer.parameters()).dtype, sample.shape
        embeds = prompt["prompt_embeds"].to(dtype)
        places = (torch.arange(size, device=sample.device) for size in (1, height // 2, width // 2))
        guided = transformer.config.guidance_embeds
        output = transformer(
            hidden_states=pack(sample.to(dtype)),
            timestep=(timestep.to(dtype) / 1000).expand(batch),
            guidance=torch.full([batch], guidance_scale, device=sample.device) if guided else None,
            pooled_projections=prompt["pooled_prompt_embeds"].to(dtype),
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=sample.device),
            img_ids=torch.cartesian_prod(*places),
            return_dict=False,
        )[0]
        return widened(unpack(output, sample.shape))

    def card_tags(self, base: str | None) -> list[str]:
        return ["flux", "flux-diffusers"]

    def check_guidance(self, configs: Configs, guidance_scale: float) -> None:
        if guidance_scale != 1 and not configs("transformer").get("guidance_embeds"):
            raise ValueError(
                f"`guidance_scale` is {guidance_scale:g}, but this FLUX.1 takes no guidance. Set it to 1."
            )
