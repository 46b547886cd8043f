# SPDX-License-Identifier: Apache-2.0
"""The transformer as a velocity field: prompt conditioning, classifier-free guidance, and the module that is trained."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn


@dataclass
class Conditioning:
    """
    Text conditioning of a batch of `B` prompts.

    Args:
        prompt_embeds (`torch.Tensor`):
            Of shape `[B, L, D]`.
        pooled_prompt_embeds (`torch.Tensor`):
            Of shape `[B, P]`.
        negative_prompt_embeds (`torch.Tensor`, *optional*), negative_pooled_prompt_embeds (`torch.Tensor`, *optional*):
            The same of the negative prompt, of shape `[B, ...]` or `[1, ...]`. Needed for a guidance scale above 1.
    """

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None = None
    negative_pooled_prompt_embeds: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def to(self, device: torch.device) -> "Conditioning":
        tensors = (getattr(self, f.name) for f in fields(self))
        return Conditioning(*(t if t is None else t.to(device, non_blocking=True) for t in tensors))

    def batch(self, guidance_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What the transformer takes: embeddings and pooled embeddings, `[negative, positive]` stacked along the batch if
        `guidance_scale > 1`, the positive ones alone otherwise.
        """
        if not guidance_scale > 1:
            return self.prompt_embeds, self.pooled_prompt_embeds
        if self.negative_prompt_embeds is None:
            raise ValueError(
                f"`guidance_scale={guidance_scale}` needs the embeddings of a negative prompt, but there are none. "
                "Encode the empty prompt too, or set `guidance_scale=1.0`."
            )
        negative = self.negative_prompt_embeds.expand_as(self.prompt_embeds)
        pooled_negative = self.negative_pooled_prompt_embeds.expand_as(self.pooled_prompt_embeds)
        return torch.cat([negative, self.prompt_embeds]), torch.cat([pooled_negative, self.pooled_prompt_embeds])


def predict(
    transformer: nn.Module,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
    **kwargs,
) -> torch.Tensor:
    """
    Runs the transformer once on `sample`, repeated as often as the embeddings ask for.

    Returns:
        `torch.Tensor` of shape `[len(prompt_embeds), ...]`, in float32 at least.
    """
    repeats = len(prompt_embeds) // len(sample)
    sample = sample.repeat(repeats, *[1] * (sample.ndim - 1))
    timestep = timestep.repeat(repeats) if timestep.ndim else timestep.expand(len(sample))
    # `transformer.dtype` walks over all modules, which on a small model takes as long as half a forward.
    dtype = next(transformer.parameters()).dtype
    output = transformer(
        hidden_states=sample.to(dtype),
        timestep=timestep,
        encoder_hidden_states=prompt_embeds.to(dtype),
        pooled_projections=pooled_prompt_embeds.to(dtype),
        joint_attention_kwargs=joint_attention_kwargs,
        return_dict=False,
        **kwargs,
    )[0]
    return output.to(torch.promote_types(output.dtype, torch.float32))


def apply_guidance(prediction: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """`v = v_neg + g (v_pos - v_neg)` of a stacked `[negative, positive]` prediction; the prediction itself if `g <= 1`."""
    if not guidance_scale > 1:
        return prediction
    negative, positive = prediction.chunk(2)
    return negative + guidance_scale * (positive - negative)


class VelocityModel(nn.Module):
    """
    The module that the trainer trains: a diffusers transformer, called as `velocity(state, time, prompt)`.

    A wrapper rather than the transformer itself, so that classifier-free guidance is inside of the one forward that
    DistributedDataParallel and autocast see, and so that there is no `config` for integrations to misread.

    Args:
        transformer ([`~diffusers.SD3Transformer2DModel`]):
            With the LoRA adapters injected.
    """

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """What `Trainer` calls, by the name that diffusers has for it."""
        if activation_checkpointing_kwargs or every_n_layers != 1 or offload:
            raise ValueError(
                "`activation_checkpointing_kwargs` is not supported: diffusers checkpoints every block of a transformer. "
                "Leave it out."
            )
        self.transformer.enable_gradient_checkpointing()

    def forward(
        self,
        sample: torch.Tensor,  # [B, C, H, W]
        timestep: torch.Tensor,  # [] or [B]
        prompt_embeds: torch.Tensor,  # [B or 2B, L, D], as made by `Conditioning.batch`
        pooled_prompt_embeds: torch.Tensor,  # [B or 2B, P]
        guidance_scale: float,
    ) -> torch.Tensor:
        """The velocity, of shape `[B, C, H, W]`."""
        prediction = predict(self.transformer, sample, timestep, prompt_embeds, pooled_prompt_embeds)
        return apply_guidance(prediction, guidance_scale)
