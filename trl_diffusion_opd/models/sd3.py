# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5: all that is particular to them."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn

from .family import JOINT_ATTENTION, Configs, Defaults, ModelFamily, Prompt, widened


class StableDiffusion3(ModelFamily):
    """Stable Diffusion 3 and 3.5: two CLIPs and a T5, joint attention, a static shift, one batch for both branches."""

    pipeline_class = StableDiffusion3Pipeline
    transformer_class = SD3Transformer2DModel
    lora_targets = JOINT_ATTENTION  # what the published teachers were trained on
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    same_transformer = ("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim")

    def defaults(self, configs: Configs) -> Defaults:
        # The scheduler shifts its smallest sigma twice: the last step moves next to nothing.
        return Defaults(40, rollout_steps=10, guidance_scale=4.5, max_sequence_length=128, skip_last_steps=1)

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

    def latent_shape(
        self, pipe: StableDiffusion3Pipeline, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        shape = super().latent_shape(pipe, height, width)
        most = pipe.transformer.config.pos_embed_max_size * pipe.patch_size * pipe.vae_scale_factor
        for name, pixels in zip(("height", "width"), self.image_size(pipe, shape), strict=True):
            if pixels > most:
                raise ValueError(f"`{name}` must be at most {most} for this model, but is {pixels}.")
        return shape

    def sigmas(self, num_steps: int) -> None:
        return None

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
        return widened(output)

    def branches(
        self,
        transformer: nn.Module,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        positive: Prompt,
        negative: Prompt | None,
        guidance_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if negative is None:
            return self.predict(transformer, sample, timestep, positive), None
        # Both branches in one forward, as the stock pipeline has them.
        both = {name: torch.cat([negative[name], positive[name]]) for name in positive}
        unconditional, conditional = self.predict(transformer, sample, timestep, both).chunk(2)
        return conditional, unconditional

    def card_tags(self, base: str | None) -> list[str]:
        is_35 = base is not None and base.startswith("stabilityai/stable-diffusion-3.5-")
        return ["sd3.5", "sd3.5-diffusers"] if is_35 else []
