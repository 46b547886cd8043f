# SPDX-License-Identifier: Apache-2.0
"""Sample images of policies that share a backbone."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from torch import nn

from ..lora.adapters import base_only, use_adapter
from ..sampling.denoising import DenoisingStep, Schedule, denoise
from .family import ModelFamily
from .velocity import Branches, Conditioning, VelocityModel


@dataclass
class Policy:
    """
    A model that can be rolled out.

    Args:
        name (`str`):
            What tables and image grids call it.
        guidance_scale (`float`):
            Its classifier-free guidance.
        adapters (`tuple[str, ...]`, *optional*, defaults to `()`):
            Adapters of its model that are active, their updates added up; none for the base.
        model ([`VelocityModel`], *optional*):
            Another model instead of the shared backbone.
        weight (`float`, *optional*, defaults to `1.0`):
            Weight of the update of each adapter.
    """

    name: str
    guidance_scale: float
    adapters: tuple[str, ...] = ()
    model: VelocityModel | None = None
    weight: float = 1.0


@dataclass
class Mixture:
    """
    A weighted sum of the velocities of policies, which can be rolled out too.

    Args:
        name (`str`):
            What tables and image grids call it.
        terms (`tuple[tuple[float, Policy], ...]`):
            Weights and policies.
    """

    name: str
    terms: tuple[tuple[float, Policy], ...]


class PolicySampler:
    """
    Rolls policies out, and decodes what they arrive at.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Owner of the VAE.
        model ([`VelocityModel`]):
            The shared backbone, with the adapters of all policies.
        latent_shape (`tuple[int, int, int]`):
            Channels, height and width of the latents.
        device (`torch.device`):
            Where the backbone is.
        autocast (`Callable`, *optional*):
            Makes the context that the models run in.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        model: VelocityModel,
        latent_shape: tuple[int, int, int],
        *,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.pipeline = pipeline
        self.model = model
        self.latent_shape = latent_shape
        self.device = device
        self.autocast = autocast

    @property
    def family(self) -> ModelFamily:
        return self.model.family

    def noise(self, seeds: list[int]) -> tuple[torch.Tensor, list[torch.Generator]]:
        """
        Initial noise `[B, C, H, W]` and the generators that draw the noise of the steps. Drawn on the CPU, so that it
        is the same on every device.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = torch.stack([torch.randn(self.latent_shape, generator=generator) for generator in generators])
        return noise.to(self.device), generators

    @contextmanager
    def acting(self, policy: Policy) -> Iterator[nn.Module]:
        """The policy's model, ready for a forward without gradients; the adapters are as they were afterwards."""
        model = self.model if policy.model is None else policy.model
        transformer = model.transformer
        switch = use_adapter(transformer, *policy.adapters) if policy.adapters else base_only(transformer)
        with switch, _weighted(transformer, policy.weight), self.autocast():
            yield model

    @torch.no_grad()
    def velocity(
        self, policy: Policy | Mixture, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """Guided velocity `[B, C, H, W]` of a policy at states of this shape; `timestep` is a scalar or `[B]`."""
        if isinstance(policy, Mixture):
            return sum(weight * self.velocity(term, sample, timestep, conditioning) for weight, term in policy.terms)
        with self.acting(policy) as model:
            return model(sample, timestep, *conditioning.batch(policy.guidance_scale), policy.guidance_scale)

    @torch.no_grad()
    def branches(
        self, policy: Policy | Mixture, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning
    ) -> Branches:
        """As [`velocity`], with both branches of guidance."""
        if isinstance(policy, Mixture):
            parts = [(weight, self.branches(term, sample, timestep, conditioning)) for weight, term in policy.terms]
            return Branches(*(sum(weight * part[i] for weight, part in parts) for i in range(3)))
        with self.acting(policy) as model:
            batch = conditioning.batch(policy.guidance_scale)
            return model(sample, timestep, *batch, policy.guidance_scale, keep_branches=True)

    def rollout(
        self, policy: Policy | Mixture, conditioning: Conditioning, seeds: list[int], schedule: Schedule, **kwargs: Any
    ) -> Iterator[DenoisingStep]:
        """
        Rolls a policy out without gradients, one step at each `next()`.

        Args:
            policy ([`Policy`]):
                The model.
            conditioning ([`Conditioning`]):
                Of `B` prompts.
            seeds (`list[int]`):
                Seed of the noise of each.
            schedule ([`Schedule`]), kwargs:
                As of [`Trajectory`]: `solver`, `noise_level`.
        """
        noise, generators = self.noise(seeds)

        def velocity(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.velocity(policy, sample, timestep, conditioning)

        yield from denoise(velocity, noise, schedule, generator=generators, **kwargs)

    def sample_latents(
        self, policy: Policy | Mixture, conditioning: Conditioning, seeds: list[int], schedule: Schedule, **kwargs: Any
    ) -> torch.Tensor:
        """The latents `[B, C, H, W]` at the end of a [`rollout`]."""
        for step in self.rollout(policy, conditioning, seeds, schedule, **kwargs):
            latents = step.next_sample
        return latents

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes latents to images in `[0, 1]`, of shape `[B, 3, H, W]`, on the CPU."""
        images = self.family.decode(self.pipeline, latents.to(self.pipeline.vae.device))
        return (images / 2 + 0.5).clamp(0, 1).float().cpu()


@contextmanager
def _weighted(transformer: nn.Module, weight: float) -> Iterator[None]:
    """The updates of the active adapters times a weight."""
    layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)] if weight != 1 else []
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scale_layer(weight)
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
