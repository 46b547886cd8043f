# SPDX-License-Identifier: Apache-2.0
"""Encoding prompts ahead of the rounds, with the text encoders out of the way while the transformer works."""

from collections.abc import Callable, Iterable

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from ..utils.hardware import on_device
from .family import ModelFamily, Prompt
from .velocity import Conditioning


class PromptEncoder:
    """
    Embeddings of prompts, encoded in chunks and kept in CPU memory.

    The negative prompt of the family is always there, so that guidance never runs without it.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Owner of tokenizers and text encoders.
        family ([`ModelFamily`]):
            How it encodes.
        device (`torch.device`):
            Where prompts are encoded and conditionings are put.
        max_sequence_length (`int`):
            Length of a prompt in tokens.
        batch_size (`int`):
            Prompts encoded at once.
        offload (`bool`):
            Whether to move the text encoders to the CPU after each chunk.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar for a chunk.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        family: ModelFamily,
        device: torch.device,
        *,
        max_sequence_length: int,
        batch_size: int,
        offload: bool,
        show_progress: bool = True,
    ):
        self.pipeline = pipeline
        self.family = family
        self.device = device
        self.max_sequence_length = max_sequence_length
        self.batch_size = batch_size
        self.offload = offload
        self.show_progress = show_progress
        self._chunk = None
        self._embeddings: dict[str, Prompt] = {}

    @torch.no_grad()
    def encode(self, prompts: Iterable[str]) -> dict[str, Prompt]:
        """Embeddings of each distinct prompt, on the CPU."""
        prompts = list(dict.fromkeys(prompts))
        encoded: dict[str, Prompt] = {}
        starts = tqdm(
            range(0, len(prompts), self.batch_size),
            desc="Encoding prompts",
            disable=not self.show_progress or len(prompts) <= self.batch_size,
            leave=False,
        )
        encoders = [getattr(self.pipeline, name) for name in self.family.text_encoders]
        with on_device(encoders, self.device, self.offload):
            for start in starts:
                batch = prompts[start : start + self.batch_size]
                embeddings = self.family.encode(
                    self.pipeline, list(batch), device=self.device, max_sequence_length=self.max_sequence_length
                )
                encoded.update(zip(batch, embeddings, strict=True))
        return encoded

    def prepare(self, chunk: object, prompts: Callable[[], Iterable[str]]) -> None:
        """
        Makes the prompts of a chunk available, in place of those of the chunk before. Does nothing if `chunk` is the
        current one; a chunk is always encoded as a whole, so that embeddings never depend on where a run was resumed.
        """
        if self._chunk == chunk:
            return
        self._embeddings.clear()
        self._embeddings = self.encode([*prompts(), self.family.negative_prompt])
        self._chunk = chunk

    def conditioning(self, prompts: list[str]) -> Conditioning:
        """Conditioning of a batch on the device. Prompts outside of the current chunk are encoded on the spot."""
        known, negative = self._embeddings, self.family.negative_prompt
        if missing := [prompt for prompt in [*prompts, negative] if prompt not in known]:
            known = {**known, **self.encode(missing)}
        return Conditioning(self.family, [known[prompt] for prompt in prompts], known[negative], self.device)
