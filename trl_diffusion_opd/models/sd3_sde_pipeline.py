# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 with a choice of SDE solvers, which hands out the whole trajectory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import BaseOutput

from ..sampling.denoising import denoise, make_schedule
from ..sampling.solvers import check_solver
from .sd3 import StableDiffusion3


FAMILY = StableDiffusion3()


@dataclass
class StableDiffusion3SDEPipelineOutput(BaseOutput):
    """
    Images of a rollout together with the rollout itself. `B` is the number of images, `N` the number of steps.

    Args:
        images (`list[PIL.Image.Image]` or `np.ndarray` or `torch.Tensor`):
            The denoised images, or the last latents for `output_type="latent"`.
        latents (`torch.Tensor` of shape `[B, N + 1, C, H, W]`):
            Every state of the trajectory, from the initial noise to the result, in float32.
        log_probs (`torch.Tensor` of shape `[B, N]`):
            Log-density of each step taken, averaged over the latent dimensions; 0 for deterministic steps.
        means (`torch.Tensor` of shape `[B, N, C, H, W]`):
            Mean of each transition (Eq. 7 of the DiffusionOPD paper).
        stds (`torch.Tensor` of shape `[N]`):
            Standard deviation of each transition, `sqrt(-dt)` included.
        sigmas (`torch.Tensor` of shape `[N + 1]`):
            Noise levels visited.
        timesteps (`torch.Tensor` of shape `[N]`):
            What the transformer was told at each step: `1000 * sigma`.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    latents: torch.Tensor
    log_probs: torch.Tensor
    means: torch.Tensor
    stds: torch.Tensor
    sigmas: torch.Tensor
    timesteps: torch.Tensor


class StableDiffusion3SDEPipeline(StableDiffusion3Pipeline):
    """
    [`~diffusers.StableDiffusion3Pipeline`] whose steps are Gaussian transitions.

    Load it like any pipeline (`from_pretrained`), or from one in memory without a second copy
    (`StableDiffusion3SDEPipeline.from_pipe(pipe)`).
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        prompt_3: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        negative_prompt_3: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: torch.Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (as in diffusers)
        max_sequence_length: int = 256,
        skip_guidance_layers: list[int] | None = None,
        skip_layer_guidance_scale: float = 2.8,
        skip_layer_guidance_stop: float = 0.2,
        skip_layer_guidance_start: float = 0.01,
        mu: float | None = None,
        solver: str = "flow",
        noise_level: float = 0.0,
    ) -> StableDiffusion3SDEPipelineOutput | tuple:
        r"""
        Generates images and returns the trajectories that led to them.

        All arguments but the last two are those of [`~diffusers.StableDiffusion3Pipeline`]; with `noise_level=0` and
        the default solver so are the images.

        Args:
            solver (`str`, *optional*, defaults to `"flow"`):
                `"flow"` (Eq. 5-9 of the DiffusionOPD paper), `"dance"`, `"cps"`, `"ddim"`, `"dpm1"` or `"dpm2"`.
            noise_level (`float`, *optional*, defaults to `0.0`):
                Scale of the injected noise, the paper's `a`; 0 gives the ODE. `generator` draws it after the initial
                latents.

        Returns:
            [`StableDiffusion3SDEPipelineOutput`], or the tuple of its seven fields if `return_dict=False`.

        Example:

        ```python
        >>> import torch
        >>> from trl_diffusion_opd import StableDiffusion3SDEPipeline

        >>> pipe = StableDiffusion3SDEPipeline.from_pretrained(
        ...     "stabilityai/stable-diffusion-3.5-medium", dtype=torch.bfloat16
        ... ).to("cuda")
        >>> output = pipe("a red circle", num_inference_steps=10, guidance_scale=4.5, noise_level=0.7)
        >>> output.log_probs.shape
        torch.Size([1, 10])
        ```
        """
        # 1. Check inputs
        check_solver(solver, noise_level)
        height = height or self.default_sample_size * self.vae_scale_factor
        width = width or self.default_sample_size * self.vae_scale_factor
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            prompt,
            prompt_2,
            prompt_3,
            height,
            width,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            negative_prompt_3=negative_prompt_3,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
        )
        self._guidance_scale = guidance_scale
        self._skip_layer_guidance_scale = skip_layer_guidance_scale
        self._clip_skip = clip_skip
        self._joint_attention_kwargs = dict(joint_attention_kwargs or {})
        self._interrupt = False
        device = self._execution_device
        prompts = [prompt] if isinstance(prompt, str) else prompt
        batch_size = (len(prompts) if prompts is not None else len(prompt_embeds)) * num_images_per_prompt

        # 2. Encode the prompts
        positive, negative, pooled_positive, pooled_negative = self.encode_prompt(
            prompt=prompt,
            prompt_2=prompt_2,
            prompt_3=prompt_3,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            negative_prompt_3=negative_prompt_3,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            device=device,
            clip_skip=clip_skip,
            num_images_per_prompt=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
            lora_scale=self._joint_attention_kwargs.get("scale"),
        )
        embeds, pooled = positive, pooled_positive
        if self.do_classifier_free_guidance:
            embeds = torch.cat([negative.expand_as(positive), positive])
            pooled = torch.cat([pooled_negative.expand_as(pooled_positive), pooled_positive])

        # 3. Prepare the initial noise
        latents = self.prepare_latents(
            batch_size,
            self.transformer.config.in_channels,
            height,
            width,
            embeds.dtype,
            device,
            generator,
            latents,
        )

        # 4. Prepare the schedule
        if mu is None:
            mu = FAMILY.mu(self, FAMILY.image_tokens(self, tuple(latents.shape[1:])), num_inference_steps)
        schedule = make_schedule(self.scheduler, num_inference_steps, sigmas, mu=mu)
        timesteps = schedule.timesteps.to(device)
        self._num_timesteps = len(schedule)

        # 5. Prepare image embeddings for IP adapters
        if (ip_adapter_image is not None and self.is_ip_adapter_active) or ip_adapter_image_embeds is not None:
            self._joint_attention_kwargs["ip_adapter_image_embeds"] = self.prepare_ip_adapter_image_embeds(
                ip_adapter_image, ip_adapter_image_embeds, device, batch_size, self.do_classifier_free_guidance
            )
        attention_kwargs = self._joint_attention_kwargs or None

        # 6. Denoising loop
        start, stop = (len(schedule) * f for f in (skip_layer_guidance_start, skip_layer_guidance_stop))

        def predict(sample: torch.Tensor, timestep: torch.Tensor, embeds, pooled, **kwargs) -> torch.Tensor:
            prompt = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
            kwargs["joint_attention_kwargs"] = attention_kwargs
            return FAMILY.predict(self.transformer, sample, timestep, prompt, **kwargs)

        def velocity(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            prediction = predict(sample, timestep, embeds, pooled)
            if not self.do_classifier_free_guidance:  # a callback may have changed it
                return prediction
            unconditional, conditional = prediction.chunk(2)
            guided = FAMILY.guide(conditional, unconditional, self.guidance_scale)
            if skip_guidance_layers is None or not start < len(log_probs) < stop:
                return guided
            skipped = predict(sample, timestep, positive, pooled_positive, skip_layers=skip_guidance_layers)
            return guided + self._skip_layer_guidance_scale * (conditional - skipped)

        states, means, log_probs, stds = [latents.float()], [], [], []
        steps = denoise(velocity, latents, schedule, solver=solver, noise_level=noise_level, generator=generator)
        with self.progress_bar(total=len(schedule)) as progress_bar:
            for step in steps:
                log_probs.append(step.transition.log_prob(step.next_sample))
                means.append(step.transition.mean)
                stds.append(step.transition.std)
                if callback_on_step_end is not None:
                    tensors = {"latents": step.next_sample, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
                    chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, step.index, timesteps[step.index], chosen)
                    step.next_sample = changed.get("latents", step.next_sample)
                    embeds = changed.get("prompt_embeds", embeds)
                    pooled = changed.get("pooled_prompt_embeds", pooled)
                states.append(step.next_sample)
                progress_bar.update()
                if self.interrupt:
                    break

        # 7. Decode
        if output_type == "latent":
            images = states[-1]
        else:
            images = self.image_processor.postprocess(self.decode_latents(states[-1]), output_type=output_type)
        self.maybe_free_model_hooks()

        output = StableDiffusion3SDEPipelineOutput(
            images=images,
            latents=torch.stack(states, dim=1),
            log_probs=torch.stack(log_probs, dim=1),
            means=torch.stack(means, dim=1),
            stds=torch.stack(stds).to(device, torch.float32),
            sigmas=schedule.sigmas.to(device),
            timesteps=timesteps,
        )
        return output if return_dict else output.to_tuple()

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes latents of shape `[B, C, H, W]` to images in `[-1, 1]`, of shape `[B, 3, H', W']`."""
        return FAMILY.decode(self, latents)
