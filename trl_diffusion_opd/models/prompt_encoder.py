# SPDX-License-Identifier: Apache-2.0
"""Encoding prompts ahead of the rounds, with the text encoders out of the way while the transformer works."""

from collections.abc import Callable, Iterable

import torch
from diffusers import StableDiffusion3Pipeline
from tqdm.auto import tqdm

from ..utils.hardware import on_device
from .velocity import Conditioning


class PromptEncoder:
    """
    Embeddings of prompts, encoded in chunks and kept in CPU memory.

    The empty negative prompt is always there, so that a guidance scale above 1 never runs without it.

    Args:
        pipeline ([`~diffusers.StableDiffusion3Pipeline`]):
            Owner of tokenizers and text encoders.
        device (`torch.device`):
            Where prompts are encoded and conditionings are put.
        max_sequence_length (`int`):
            Length of the T5 prompt in tokens.
        batch_size (`int`):
            Prompts encoded at once.
        offload (`bool`):
            Whether to move the text encoders to the CPU after each chunk.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar for a chunk.
    """

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        device: torch.device,
        *,
        max_sequence_length: int,
        batch_size: int,
        offload: bool,
        show_progress: bool = True,
    ):
        self.pipeline = pipeline
        self.device = device
        self.max_sequence_length = max_sequence_length
        self.batch_size = batch_size
        self.offload = offload
        self.show_progress = show_progress
        self._chunk = None
        self._embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def encode(self, prompts: Iterable[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Embeddings `[L, D]` and pooled embeddings `[P]` of each distinct prompt, on the CPU."""
        prompts = list(dict.fromkeys(prompts))
        pipe, encoded = self.pipeline, {}
        starts = tqdm(
            range(0, len(prompts), self.batch_size),
            desc="Encoding prompts",
            disable=not self.show_progress or len(prompts) <= self.batch_size,
            leave=False,
        )
        with on_device((pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3), self.device, self.offload):
            for start in starts:
                batch = prompts[start : start + self.batch_size]
                embeds, _, pooled, _ = pipe.encode_prompt(
                    batch,
                    None,
                    None,
                    device=self.device,
                    do_classifier_free_guidance=False,
                    max_sequence_length=self.max_sequence_length,
                )
                encoded.update(zip(batch, zip(embeds.cpu(), pooled.cpu(), strict=True), strict=True))
        return encoded

    def prepare(self, chunk: object, prompts: Callable[[], Iterable[str]]) -> None:
        """
        Makes the prompts of a chunk available, in place of those of the chunk before. Does nothing if `chunk` is the
        current one; a chunk is always encoded as a whole, so that embeddings never depend on where a run was resumed.
        """
        if self._chunk == chunk:
            return
        self._embeddings.clear()
        self._embeddings = self.encode([*prompts(), ""])
        self._chunk = chunk

    def conditioning(self, prompts: list[str]) -> Conditioning:
        """Conditioning of a batch on the device. Prompts outside of the current chunk are encoded on the spot."""
        known = self._embeddings
        if missing := [prompt for prompt in [*prompts, ""] if prompt not in known]:
            known = {**known, **self.encode(missing)}
        embeds, pooled = (torch.stack(tensors) for tensors in zip(*(known[p] for p in prompts), strict=True))
        negative, pooled_negative = known[""]
        return Conditioning(embeds, pooled, negative[None], pooled_negative[None]).to(self.device)
