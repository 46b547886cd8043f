# SPDX-License-Identifier: Apache-2.0
"""The module that is trained: a transformer as a velocity field, guidance included."""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import nn

from .family import ModelFamily, Prompt


class Conditioning:
    """
    Text conditioning of a batch of `B` prompts.

    Args:
        family ([`ModelFamily`]):
            Whose embeddings these are.
        prompts (`list[dict]`):
            `B` encoded prompts.
        negative (`dict`, *optional*):
            The encoded negative prompt. Needed for guidance.
        device (`torch.device`, *optional*):
            Where to put them.
    """

    def __init__(
        self,
        family: ModelFamily,
        prompts: list[Prompt],
        negative: Prompt | None = None,
        device: torch.device | None = None,
    ):
        self.family = family
        self.positive = _moved(family.collate(prompts), device)
        self._negative, self._size, self._device = negative, len(prompts), device

    def batch(self, guidance_scale: float) -> tuple[Prompt, Prompt | None]:
        """
        What [`VelocityModel`] takes: the prompts, and as many negative ones if this guidance needs them.

        Raises:
            `ValueError`: it needs them, and there are none.
        """
        return self.positive, self.negative if self.family.needs_negative(guidance_scale) else None

    @cached_property
    def negative(self) -> Prompt:
        if self._negative is None:
            raise ValueError(
                "Guidance needs the embeddings of a negative prompt, but there are none. Encode "
                f"{self.family.negative_prompt!r} too, or set `guidance_scale=1.0`."
            )
        return self.family.collate([_moved(self._negative, self._device)] * self._size)


class Branches(NamedTuple):
    """
    A velocity with what guidance made it of, each `[B, C, H, W]`.

    Args:
        velocity (`torch.Tensor`):
            With guidance.
        positive (`torch.Tensor`), negative (`torch.Tensor`, *optional*):
            The conditional velocity, and the unconditional one if there is guidance.
    """

    velocity: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor | None


class VelocityModel(nn.Module):
    """
    The module that the trainer trains: a diffusers transformer, called as `velocity(state, time, prompt)`.

    A wrapper rather than the transformer itself, so that classifier-free guidance is inside of the one forward that
    DistributedDataParallel and autocast see, and so that there is no `config` for integrations to misread.

    Args:
        transformer (`torch.nn.Module`):
            With the LoRA adapters injected.
        family ([`ModelFamily`]):
            How it is called.
    """

    def __init__(self, transformer: nn.Module, family: ModelFamily):
        super().__init__()
        self.transformer = transformer
        self.family = family

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
        positive: Prompt,  # as made by `Conditioning.batch`
        negative: Prompt | None,
        guidance_scale: float,
        keep_branches: bool = False,
    ) -> "torch.Tensor | Branches":
        """The guided velocity, of shape `[B, C, H, W]`, or with its branches."""
        conditional, unconditional = self.family.branches(
            self.transformer, sample, timestep, positive, negative, guidance_scale
        )
        velocity = conditional
        if unconditional is not None:
            velocity = self.family.guide(conditional, unconditional, guidance_scale)
        return Branches(velocity, conditional, unconditional) if keep_branches else velocity


def _moved(prompt: Prompt, device: torch.device | None) -> Prompt:
    def move(value: torch.Tensor | list[torch.Tensor] | None) -> torch.Tensor | list[torch.Tensor] | None:
        if isinstance(value, list):
            return [move(item) for item in value]
        return value if value is None else value.to(device, non_blocking=True)

    return {name: move(value) for name, value in prompt.items()}
