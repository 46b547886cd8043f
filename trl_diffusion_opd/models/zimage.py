# SPDX-License-Identifier: Apache-2.0
"""Z-Image, base and Turbo: all that is particular to them."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel

from .family import Configs, Defaults, ModelFamily, Prompt, widened


TURBO_SHIFT = 3.0  # of the scheduler; that of the base is 6


class ZImage(ModelFamily):
    """Z-Image: a Qwen3 prompt of any length, time that runs from 0 to 1, minus the velocity, guidance from 0 on."""

    pipeline_class = ZImagePipeline
    transformer_class = ZImageTransformer2DModel
    lora_targets = ["attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"]
    text_encoders = ("text_encoder",)
    same_transformer = ("in_channels", "cap_feat_dim")
    states_per_block = 35

    def defaults(self, configs: Configs) -> Defaults:
        if configs("scheduler").get("shift") == TURBO_SHIFT:
            return Defaults(8, rollout_steps=8, guidance_scale=1.0, max_sequence_length=512)
        return Defaults(28, rollout_steps=10, guidance_scale=5.0, max_sequence_length=512)

    def encode(
        self, pipe: ZImagePipeline, prompts: Sequence[str], *, device: torch.device, max_sequence_length: int
    ) -> list[Prompt]:
        embeds, _ = pipe.encode_prompt(
            list(prompts),  # a copy: the pipeline writes its template into it
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
        return [{"prompt_embeds": tokens.cpu()} for tokens in embeds]

    def collate(self, prompts: Sequence[Prompt]) -> Prompt:
        return {"prompt_embeds": [prompt["prompt_embeds"] for prompt in prompts]}

    def default_size(self, pipe: ZImagePipeline) -> tuple[int, int]:
        return 1024, 1024

    def sigmas(self, num_steps: int) -> list[float]:
        return torch.linspace(1.0, 1 / num_steps, num_steps).tolist()

    def predict(
        self,
        transformer: ZImageTransformer2DModel,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        prompt: Prompt,
        guidance_scale: float,
    ) -> torch.Tensor:
        dtype = next(transformer.parameters()).dtype
        output = transformer(
            list(sample.to(dtype).unsqueeze(2)),  # images of one frame, [C, 1, H, W]
            ((1000 - timestep) / 1000).expand(len(sample)),
            [tokens.to(dtype) for tokens in prompt["prompt_embeds"]],
            return_dict=False,
        )[0]
        return -widened(torch.stack(output).squeeze(2))

    def call_arguments(self, guidance_scale: float, max_sequence_length: int) -> dict[str, Any]:
        # Its guidance is what is added: 0 is none.
        return super().call_arguments(max(0.0, guidance_scale - 1), max_sequence_length)

    def blocks(self, transformer: ZImageTransformer2DModel) -> tuple[int, int]:
        config = transformer.config
        return config.n_layers + 2 * config.n_refiner_layers, config.dim
