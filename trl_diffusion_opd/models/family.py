# SPDX-License-Identifier: Apache-2.0
"""The seam between everything else and one family of text-to-image models."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..lora.foreign import to_diffusers
from ..lora.names import names_of
from ..sampling.denoising import Schedule, make_schedule


# What a text is to a transformer: tensors by name, of a batch, or of one prompt without the batch dimension. What is
# ragged over the batch is a list of tensors.
Prompt = dict[str, "torch.Tensor | list[torch.Tensor] | None"]

# From the name of a pipeline's component to its config, and from "" to the pipeline's own.
Configs = Callable[[str], Mapping[str, Any]]

# The attention projections of image and text stream in blocks that join the two.
JOINT_ATTENTION = [
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
]

# Four images of 512 x 512 are decoded at once. A VAE takes about 0.8 GB for each, in float32.
PIXELS_AT_ONCE = 4 * 512 * 512


@dataclass(frozen=True)
class Defaults:
    """
    What a model is made for: the settings of runs that do not set them.

    Args:
        num_inference_steps (`int`):
            Denoising steps of a finished image.
        rollout_steps (`int`):
            Denoising steps of a rollout in training: the model's own for one that takes few steps, so that it goes on
            taking few.
        guidance_scale (`float`):
            Guidance, in which 1 is none (but where guidance is an input of the model).
        max_sequence_length (`int`):
            Length of a prompt in tokens.
        skip_last_steps (`int`, *optional*, defaults to `0`):
            Number of steps at the end of the schedule that are not worth training.
    """

    num_inference_steps: int
    rollout_steps: int
    guidance_scale: float
    max_sequence_length: int
    skip_last_steps: int = 0

    def of_a_run(self) -> dict[str, int | float]:
        """The settings of a training, by name."""
        return {
            "num_inference_steps": self.rollout_steps,
            "guidance_scale": self.guidance_scale,
            "max_sequence_length": self.max_sequence_length,
            "skip_last_steps": self.skip_last_steps,
        }


class ModelFamily(ABC):
    """
    What has to be known of a family of text-to-image flow models. A subclass is all that a new family needs.

    A family has no state: its methods are given the pipeline or the transformer. Everywhere else states are `[B, C, H,
    W]` with `x_sigma = (1 - sigma) x_0 + sigma eps`, velocities are `eps - x_0` of that shape, times are `1000 sigma`,
    and `guidance_scale` is `w` in `v_neg + w (v_pos - v_neg)`, where 1 means none. A family translates.

    Attributes:
        pipeline_class (`type`):
            The stock pipeline of diffusers, also found by its name.
        transformer_class (`type`):
            Class of its `transformer`.
        lora_targets (`str` or `list[str]`):
            Modules that get a LoRA by default: names, or a regular expression.
        text_encoders (`tuple[str, ...]`):
            Names of the pipeline's components that encode text.
        negative_prompt (`str`):
            Text of the unconditional branch.
        longest_prompt (`int`):
            Largest `max_sequence_length`.
        same_transformer (`tuple[str, ...]`), same_vae (`tuple[str, ...]`):
            Fields of the configs that a student and a full-model teacher must share.
        guidance_info (`str`):
            What is to be known of its guidance where it is chosen.
        states_per_block (`int`):
            Hidden states that a transformer block keeps for the backward, for the estimate of memory.
    """

    pipeline_class: type[DiffusionPipeline]
    transformer_class: type[nn.Module]
    lora_targets: str | list[str]
    text_encoders: tuple[str, ...]
    negative_prompt: str = ""
    longest_prompt: int = 512
    same_transformer: tuple[str, ...] = ("in_channels",)
    same_vae: tuple[str, ...] = ("latent_channels", "scaling_factor", "shift_factor")
    guidance_info: str = "Up to 1: none"
    states_per_block: int = 20

    # Settings

    @abstractmethod
    def defaults(self, configs: Configs) -> Defaults:
        """What a model of the family is made for, told by its configs alone."""

    def check_length(self, max_sequence_length: int) -> None:
        """Raises a `ValueError` for prompts that are longer than the model takes."""
        if max_sequence_length > self.longest_prompt:
            raise ValueError(
                f"`max_sequence_length` must be at most {self.longest_prompt} for this model, but is "
                f"{max_sequence_length}."
            )

    def lora_options(self, transformer: Mapping[str, Any]) -> dict[str, Any]:
        """Where a LoRA goes by default: fields of [`~peft.LoraConfig`], for a transformer of this config."""
        return {"target_modules": self.lora_targets}

    # Text

    @abstractmethod
    def encode(
        self, pipe: DiffusionPipeline, prompts: Sequence[str], *, device: torch.device, max_sequence_length: int
    ) -> list[Prompt]:
        """Encodes prompts: the embeddings of each, without a batch dimension, on the CPU."""

    def collate(self, prompts: Sequence[Prompt]) -> Prompt:
        """A batch of encoded prompts. By default their tensors are stacked, which needs equal shapes."""
        return {name: torch.stack([prompt[name] for prompt in prompts]) for name in prompts[0]}

    def text_tokens(self, pipe: DiffusionPipeline, max_sequence_length: int) -> int:
        """Number of text tokens that the transformer sees."""
        return max_sequence_length

    # Latents

    def channels(self, pipe: DiffusionPipeline) -> int:
        """Channels of the latents."""
        return pipe.transformer.config.in_channels

    def latent_shape(
        self, pipe: DiffusionPipeline, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """
        Channels, height and width of the latents of an image, by default of the model's own size.

        Raises:
            `ValueError`: a size in pixels that the model cannot draw.
        """
        default, multiple = self.default_size(pipe), 2 * pipe.vae_scale_factor
        size = {"height": height or default[0], "width": width or default[1]}
        for name, pixels in size.items():
            if pixels % multiple:
                raise ValueError(
                    f"`{name}` must be a multiple of {multiple} (VAE factor x patch size), but is {pixels}. Use "
                    f"{max(1, round(pixels / multiple)) * multiple}."
                )
        factor = self.pixels_per_latent(pipe)
        return self.channels(pipe), size["height"] // factor, size["width"] // factor

    def default_size(self, pipe: DiffusionPipeline) -> tuple[int, int]:
        """Height and width in pixels of the images that the model draws if it is not told."""
        edge = pipe.default_sample_size * pipe.vae_scale_factor
        return edge, edge

    def pixels_per_latent(self, pipe: DiffusionPipeline) -> int:
        """Pixels along an edge of a latent."""
        return pipe.vae_scale_factor

    def image_tokens(self, pipe: DiffusionPipeline, latent_shape: tuple[int, int, int]) -> int:
        """Number of image tokens that the transformer sees: one for 2 x 2 latents of the VAE."""
        height, width = self.image_size(pipe, latent_shape)
        return height * width // (2 * pipe.vae_scale_factor) ** 2

    def image_size(self, pipe: DiffusionPipeline, latent_shape: tuple[int, int, int]) -> tuple[int, int]:
        """Height and width in pixels of an image with these latents."""
        factor = self.pixels_per_latent(pipe)
        return latent_shape[1] * factor, latent_shape[2] * factor

    def decode(self, pipe: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
        """
        Decodes latents `[B, C, H, W]` to images `[B, 3, H', W']` in `[-1, 1]`, so many at once as have `PIXELS_AT_ONCE`.
        """
        height, width = self.image_size(pipe, tuple(latents.shape[1:]))
        number = max(1, PIXELS_AT_ONCE // (height * width))
        return torch.cat([self.decode_batch(pipe, part) for part in latents.split(number)])

    def decode_batch(self, pipe: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
        """Decodes latents `[B, C, H, W]` to images `[B, 3, H', W']` in `[-1, 1]`, all at once."""
        latents = (latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).to(pipe.vae.dtype)
        return pipe.vae.decode(latents, return_dict=False)[0]

    def decoding_bytes(self, vae: nn.Module, num_pixels: int) -> int:
        """The peak of what the VAE keeps while it decodes so many pixels: three hidden states of its second level."""
        return 3 * 4 * num_pixels * max(vae.config.block_out_channels[:2])

    # Schedule

    def sigmas(self, num_steps: int) -> list[float] | None:
        """Noise levels before the scheduler's shift, by default from 1 to `1 / N`; `None` for the scheduler's own."""
        return np.linspace(1.0, 1 / num_steps, num_steps).tolist()

    def mu(self, pipe: DiffusionPipeline, image_tokens: int, num_steps: int) -> float | None:
        """The shift of a scheduler with `use_dynamic_shifting`, by default linear in the tokens; `None` for a static one."""
        config = pipe.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return None
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return image_tokens * slope + (config.base_shift - slope * config.base_image_seq_len)

    def schedule(self, pipe: DiffusionPipeline, num_steps: int, latent_shape: tuple[int, int, int]) -> Schedule:
        """The noise levels of a rollout of `num_steps`, those that the stock pipeline visits."""
        mu = self.mu(pipe, self.image_tokens(pipe, latent_shape), num_steps)
        return make_schedule(pipe.scheduler, num_steps, self.sigmas(num_steps), mu=mu)

    # Velocity

    def needs_negative(self, guidance_scale: float) -> bool:
        """Whether the unconditional branch runs."""
        return guidance_scale > 1

    @abstractmethod
    def predict(
        self,
        transformer: nn.Module,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        prompt: Prompt,
        guidance_scale: float,
    ) -> torch.Tensor:
        """
        One forward of the transformer.

        Args:
            transformer (`torch.nn.Module`):
                A `transformer_class`.
            sample (`torch.Tensor`):
                States, of shape `[B, C, H, W]`.
            timestep (`torch.Tensor`):
                `1000 sigma`, of shape `[]` or `[B]`.
            prompt (`dict`):
                What `collate` returned, of `B` prompts.
            guidance_scale (`float`):
                For families in which it is an input of the model.

        Returns:
            `torch.Tensor` of shape `[B, C, H, W]`: the velocity, in float32 at least.
        """

    def guide(self, positive: torch.Tensor, negative: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        """Classifier-free guidance of two velocities `[B, C, H, W]`."""
        return negative + guidance_scale * (positive - negative)

    def branches(
        self,
        transformer: nn.Module,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        positive: Prompt,
        negative: Prompt | None,
        guidance_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The conditional and the unconditional velocity, of shape `[B, C, H, W]`; the latter is `None` if `negative` is, which
        it is where `needs_negative` is false.
        """
        conditional = self.predict(transformer, sample, timestep, positive, guidance_scale)
        if negative is None:
            return conditional, None
        return conditional, self.predict(transformer, sample, timestep, negative, guidance_scale)

    # LoRAs of other programs

    def convert_lora(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Names the tensors of a kohya, ComfyUI or ai-toolkit LoRA as diffusers does. See [`~lora.foreign.to_diffusers`].

        Raises:
            `ValueError`: one has no place or cannot be held exactly, or the names of this family are not known.
        """
        return to_diffusers(tensors, names_of(self.pipeline_class.__name__))

    # What is told to others

    def call_arguments(self, guidance_scale: float, max_sequence_length: int) -> dict[str, Any]:
        """Arguments of the stock pipeline's call that mean the same."""
        return {"guidance_scale": guidance_scale, "max_sequence_length": max_sequence_length}

    def card_tags(self, base: str | None) -> list[str]:
        """Tags that a model card gets for a base of this Hub id."""
        return []

    def blocks(self, transformer: nn.Module) -> tuple[int, int]:
        """Number of transformer blocks and their width."""
        config = transformer.config
        number = config.num_layers + config.get("num_single_layers", 0)
        return number, config.num_attention_heads * config.attention_head_dim

    def check_guidance(self, configs: Configs, guidance_scale: float) -> None:  # noqa: B027 (most models take all)
        """Raises a `ValueError` for a guidance that the stock pipeline would silently ignore."""


def widened(velocity: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return velocity.to(torch.promote_types(velocity.dtype, torch.float32))
