# SPDX-License-Identifier: Apache-2.0
"""Drawing the images of an evaluation: a first-order ODE from noise that belongs to the image alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ...hub.locations import Origin
from ...lora.adapters import add_lora
from ...lora.merging import merged_lora
from ...models.family import ModelFamily
from ...models.loading import load_pipeline
from ...models.prompt_encoder import PromptEncoder
from ...models.sampler import Policy, PolicySampler
from ...models.velocity import Conditioning, VelocityModel
from .entries import Entry, Lora
from .folder import ResultsFolder


# The prompts of so many images are encoded at once: with Stable Diffusion 3.5 in bfloat16 up to 0.9 GB of embeddings.
IMAGES_AT_ONCE = 512
LARGEST_DEFAULT = 512


@dataclass(frozen=True)
class ImageSpec:
    """
    One image.

    Args:
        entry ([`Entry`]):
            The model and guidance that it is drawn with.
        benchmark (`str`):
            Whose prompt it has.
        position (`int`):
            Its place among the images of the benchmark.
        prompt (`str`):
            What is to be seen.
        seed (`int`):
            Seed of its noise.
    """

    entry: Entry
    benchmark: str
    position: int
    prompt: str
    seed: int


class EntrySampler:
    """
    The base with all LoRAs on it, ready to draw.

    Args:
        model (`str` or `Path`):
            The base: `owner/repo[@revision]` on the Hub or a local folder.
        origin ([`Origin`]), family ([`ModelFamily`]):
            What [`check_pipeline`] returned of it.
        loras (`Mapping[str, Lora]`):
            LoRAs by name.
        dtype (`torch.dtype`):
            Precision of the base. The LoRAs and the VAE are in float32.
        device (`torch.device`):
            Where to draw.
        num_inference_steps (`int`):
            Steps of the ODE.
        resolution (`int`, *optional*):
            Height and width, by default 512 or the base's own size if that is smaller.
        max_sequence_length (`int`):
            Length of a prompt in tokens.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.

    Raises:
        `ValueError`: a LoRA that does not fit the base, or a size that the base cannot draw.
    """

    def __init__(
        self,
        model: str | Path,
        origin: Origin,
        family: ModelFamily,
        loras: Mapping[str, Lora],
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_inference_steps: int,
        resolution: int | None,
        max_sequence_length: int,
        show_progress: bool = True,
    ):
        self.dtype = dtype
        pipe = load_pipeline(model, dtype, origin=origin, family=family)
        self.resolution = resolution or min(LARGEST_DEFAULT, *family.default_size(pipe))
        shape = family.latent_shape(pipe, self.resolution, self.resolution)
        self.loras, self.transformer = loras, pipe.transformer
        self.adapters = {name: f"lora_{index}" for index, name in enumerate(loras)}
        for name, lora in loras.items():
            add_lora(pipe.transformer, lora.weights, self.adapters[name])
        velocity = VelocityModel(pipe.transformer, family).to(device)
        pipe.vae.to(device)
        autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
        self.sampler = PolicySampler(pipe, velocity, shape, device=device, autocast=autocast)
        self.schedule = family.schedule(pipe, num_inference_steps, shape)
        self.prompts = PromptEncoder(
            pipe,
            family,
            device,
            max_sequence_length=max_sequence_length,
            batch_size=16,
            offload=True,
            show_progress=show_progress,
        )

    def draw(self, entry: Entry, conditioning: Conditioning, seeds: Sequence[int]) -> torch.Tensor:
        """
        Images `[B, 3, H, W]` in `[0, 1]` on the CPU.

        Raises:
            `ValueError`: they hold pixels that are not numbers.
        """
        policy = Policy(entry.name, entry.guidance_scale, self._adapters(entry), weight=entry.weight)
        latents = self.sampler.sample_latents(policy, conditioning, list(seeds), self.schedule)
        images = self.sampler.decode(latents)
        if not (latents.isfinite().all() and images.isfinite().all()):
            raise ValueError(
                f"{entry.name!r} draws pixels that are not numbers in {str(self.dtype).removeprefix('torch.')}. "
                "Try another `--dtype`; if it is no better in float32, its weights are broken."
            )
        return images

    def _adapters(self, entry: Entry) -> tuple[str, ...]:
        """The adapters of a row; a merge that is more than adding up becomes one when it is first drawn."""
        if entry.method is None:
            return tuple(self.adapters[name] for name in entry.loras)
        merge = f"merge_{entry.method}"
        if merge not in self.transformer.peft_config:
            # What DARE drops depends on the order, which must not be that of the options.
            own = [self.adapters[name] for name in sorted(entry.loras, key=lambda name: self.loras[name].sha256)]
            add_lora(self.transformer, merged_lora(self.transformer, own, entry.method, owner=merge), merge)
        return (merge,)


def draw_images(
    sampler: EntrySampler,
    folder: ResultsFolder,
    wanted: Sequence[ImageSpec],
    *,
    batch_size: int,
    show_progress: bool = True,
) -> None:
    """
    Draws images and writes each batch when it is done.

    Args:
        sampler ([`EntrySampler`]):
            The models.
        folder ([`ResultsFolder`]):
            Where to.
        wanted (`Sequence[ImageSpec]`):
            What to draw, images of a prompt one after the other.
        batch_size (`int`):
            Images drawn at once.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Raises:
        `ValueError`: a model draws pixels that are not numbers.
    """
    with tqdm(total=len(wanted), desc="Drawing", disable=not show_progress) as progress:
        for start in range(0, len(wanted), IMAGES_AT_ONCE):
            chunk = wanted[start : start + IMAGES_AT_ONCE]
            sampler.prompts.prepare(start, lambda chunk=chunk: [spec.prompt for spec in chunk])
            for entry in dict.fromkeys(spec.entry for spec in chunk):
                own = [spec for spec in chunk if spec.entry == entry]
                for first in range(0, len(own), batch_size):
                    batch = own[first : first + batch_size]
                    conditioning = sampler.prompts.conditioning([spec.prompt for spec in batch])
                    images = sampler.draw(entry, conditioning, [spec.seed for spec in batch])
                    for image, spec in zip(images, batch, strict=True):
                        folder.save_image(image, entry.name, spec.benchmark, spec.position)
                    progress.update(len(batch))
