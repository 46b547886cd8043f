# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image: all that is particular to it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from .family import JOINT_ATTENTION, Configs, Defaults, ModelFamily, Prompt, widened
from .packing import pack, unpack


class QwenImage(ModelFamily):
    """Qwen-Image: packed latents, a prompt of any length, a video VAE, and guidance that keeps the length of a token."""

    pipeline_class = QwenImagePipeline
    transformer_class = QwenImageTransformer2DModel
    lora_targets = JOINT_ATTENTION
    text_encoders = ("text_encoder",)
    negative_prompt = " "
    longest_prompt = 1024
    same_transformer = ("in_channels", "joint_attention_dim")
    same_vae = ("z_dim", "latents_mean", "latents_std")
    states_per_block = 21

    def defaults(self, configs: Configs) -> Defaults:
        # The schedule ends at a sigma of .02: the last step moves next to nothing.
        return Defaults(50, rollout_steps=10, guidance_scale=4.0, max_sequence_length=512, skip_last_steps=1)

    def lora_options(self, transformer: Mapping[str, Any]) -> dict[str, Any]:
        # Nothing reads the text of the last block: a weight without a gradient stops training on several processes.
        last = transformer.get("num_layers", 60) - 1
        names = "|".join(map(re.escape, self.lora_targets))
        return {"target_modules": rf"(?!.*\.{last}\.attn\.to_add_out).*\.({names})"}

    def encode(
        self, pipe: QwenImagePipeline, prompts: Sequence[str], *, device: torch.device, max_sequence_length: int
    ) -> list[Prompt]:
        embeds, mask = pipe.encode_prompt(list(prompts), device, max_sequence_length=max_sequence_length)
        lengths = [embeds.shape[1]] * len(embeds) if mask is None else mask.sum(1).tolist()
        return [{"prompt_embeds": row[:length].cpu()} for row, length in zip(embeds, lengths, strict=True)]

    def collate(self, prompts: Sequence[Prompt]) -> Prompt:
        rows = [prompt["prompt_embeds"] for prompt in prompts]
        mask = pad_sequence([row.new_ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
        embeds = pad_sequence(rows, batch_first=True)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": None if mask.all() else mask}

    def channels(self, pipe: QwenImagePipeline) -> int:
        return super().channels(pipe) // 4

    def decode_batch(self, pipe: QwenImagePipeline, latents: torch.Tensor) -> torch.Tensor:
        config, latents = pipe.vae.config, latents.to(pipe.vae.dtype)
        mean, std = (
            latents.new_tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std)
        )
        return pipe.vae.decode((latents * std + mean).unsqueeze(2), return_dict=False)[0][:, :, 0]

    def decoding_bytes(self, vae: nn.Module, num_pixels: int) -> int:
        return 3 * 4 * num_pixels * vae.config.base_dim * max(vae.config.dim_mult[:2])

    def predict(
        self,
        transformer: QwenImageTransformer2DModel,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        prompt: Prompt,
        guidance_scale: float,
    ) -> torch.Tensor:
        dtype, (batch, _, height, width) = next(transformer.parameters()).dtype, sample.shape
        output = transformer(
            hidden_states=pack(sample.to(dtype)),
            timestep=(timestep.to(dtype) / 1000).expand(batch),
            encoder_hidden_states_mask=prompt["prompt_embeds_mask"],
            encoder_hidden_states=prompt["prompt_embeds"].to(dtype),
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            return_dict=False,
        )[0]
        return widened(unpack(output, sample.shape))

    def guide(self, positive: torch.Tensor, negative: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        """Each token of the guided velocity gets the length that it has without guidance."""
        guided, unguided = pack(super().guide(positive, negative, guidance_scale)), pack(positive)
        scale = unguided.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return unpack(guided * scale, positive.shape)

    def call_arguments(self, guidance_scale: float, max_sequence_length: int) -> dict[str, Any]:
        # Without a negative prompt the pipeline leaves guidance out.
        negative = {"negative_prompt": self.negative_prompt} if self.needs_negative(guidance_scale) else {}
        return {"true_cfg_scale": guidance_scale, **negative, "max_sequence_length": max_sequence_length}

    def card_tags(self, base: str | None) -> list[str]:
        return ["qwen-image", "qwen-image-diffusers"]
