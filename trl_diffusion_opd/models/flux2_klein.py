# SPDX-License-Identifier: Apache-2.0
"""FLUX.2-klein, base and distilled: all that is particular to them."""

from collections.abc import Sequence

import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch.nn.functional import pixel_shuffle

from .family import Configs, Defaults, ModelFamily, Prompt, widened


class Flux2Klein(ModelFamily):
    """FLUX.2-klein: latents of 2 x 2 patches, normalized by the VAE's running statistics, and a padded Qwen3 prompt."""

    pipeline_class = Flux2KleinPipeline
    transformer_class = Flux2Transformer2DModel
    # A regular expression: `attn.to_out` is a list of modules in blocks of one kind and a module in those of the other.
    lora_targets = (
        r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    )
    text_encoders = ("text_encoder",)
    same_transformer = ("in_channels", "joint_attention_dim")
    same_vae = ("latent_channels", "batch_norm_eps")
    states_per_block = 26

    def defaults(self, configs: Configs) -> Defaults:
        # The padding of a prompt is attended to: another length is another model.
        if configs("").get("is_distilled"):
            return Defaults(4, rollout_steps=4, guidance_scale=1.0, max_sequence_length=512)
        return Defaults(50, rollout_steps=10, guidance_scale=4.0, max_sequence_length=512)

    def encode(
        self, pipe: Flux2KleinPipeline, prompts: Sequence[str], *, device: torch.device, max_sequence_length: int
    ) -> list[Prompt]:
        # The language model without its head: the logits of a batch take gigabytes, and nobody asks for them.
        embeds = pipe._get_qwen3_prompt_embeds(
            pipe.text_encoder.model,
            pipe.tokenizer,
            list(prompts),
            device=device,
            max_sequence_length=max_sequence_length,
        )
        return [{"prompt_embeds": tokens} for tokens in embeds.cpu()]

    def pixels_per_latent(self, pipe: Flux2KleinPipeline) -> int:
        return 2 * pipe.vae_scale_factor

    def decode_batch(self, pipe: Flux2KleinPipeline, latents: torch.Tensor) -> torch.Tensor:
        norm, latents = pipe.vae.bn, latents.to(pipe.vae.dtype)
        std = torch.sqrt(norm.running_var.view(1, -1, 1, 1) + pipe.vae.config.batch_norm_eps)
        latents = latents * std + norm.running_mean.view(1, -1, 1, 1)
        return pipe.vae.decode(pixel_shuffle(latents, 2), return_dict=False)[0]

    def mu(self, pipe: Flux2KleinPipeline, image_tokens: int, num_steps: int) -> float:
        return compute_empirical_mu(image_tokens, num_steps)

    def predict(
        self,
        transformer: Flux2Transformer2DModel,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        prompt: Prompt,
        guidance_scale: float,
    ) -> torch.Tensor:
        dtype, (batch, _, height, width) = next(transformer.parameters()).dtype, sample.shape
        embeds = prompt["prompt_embeds"].to(dtype)
        output = transformer(
            hidden_states=sample.to(dtype).flatten(2).mT,
            timestep=(timestep.to(dtype) / 1000).expand(batch),
            guidance=None,
            encoder_hidden_states=embeds,
            txt_ids=_ids(1, 1, embeds.shape[1], sample.device),
            img_ids=_ids(height, width, 1, sample.device),
            return_dict=False,
        )[0]
        return widened(output.mT.reshape(sample.shape))

    def check_guidance(self, configs: Configs, guidance_scale: float) -> None:
        if self.needs_negative(guidance_scale) and configs("").get("is_distilled"):
            raise ValueError(
                f"`guidance_scale` is {guidance_scale:g}, but a distilled FLUX.2-klein takes no guidance. Set it to 1."
            )


def _ids(height: int, width: int, length: int, device: torch.device) -> torch.Tensor:
    """Places `(frame, y, x, position in the text)` of tokens, `[height width length, 4]`."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in (1, height, width, length)))
