# SPDX-License-Identifier: Apache-2.0
"""Samples of the targets, drawn once and kept on the disk."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..data.rounds import TaskBatch, sample_seed
from ..models.sampler import Mixture, Policy, PolicySampler
from ..models.velocity import Conditioning


FOLDER = "_samples"  # what begins with "_" is not pushed


class TargetSamples:
    """
    The latents that targets draw for prompts, each drawn once for a prompt. A prompt's noise follows from the run's seed,
    the task and the prompt.

    Args:
        sampler ([`PolicySampler`]):
            Rolls the targets out.
        folder (`Path`):
            Where they are kept.
        fingerprint (`str`):
            Of all that they depend on but task, prompt and steps.
        seed (`int`):
            The run's.
        process_index (`int`, *optional*, defaults to `0`):
            This process among those that share the folder.
    """

    def __init__(self, sampler: PolicySampler, folder: Path, fingerprint: str, seed: int, process_index: int = 0):
        self.sampler, self.folder, self.fingerprint = sampler, folder, fingerprint
        self.seed, self.process_index = seed, process_index

    def latents(
        self, batch: TaskBatch, target: Policy | Mixture, conditioning: Conditioning, num_inference_steps: int
    ) -> torch.Tensor:
        """The latents `[B, C, H, W]` for a batch; none is drawn that was drawn before."""
        files = [self._file(batch.task, prompt, num_inference_steps) for prompt in batch.prompts]
        found = {file: _read(file) for file in files}
        if any(latents is None for latents in found.values()):
            seeds = [sample_seed(self.seed, f"{batch.task} {prompt}", 0, 0) for prompt in batch.prompts]
            sampler = self.sampler
            schedule = sampler.family.schedule(sampler.pipeline, num_inference_steps, sampler.latent_shape)
            drawn = sampler.sample_latents(target, conditioning, seeds, schedule).cpu()
            for file, latents in zip(files, drawn, strict=True):
                if found[file] is None:
                    found[file] = latents
                    self._write(file, latents)
        return torch.stack([found[file] for file in files]).to(self.sampler.device)

    def _file(self, task: str, prompt: str, num_inference_steps: int) -> Path:
        told = "\0".join([self.fingerprint, task, prompt, str(num_inference_steps)])
        return self.folder / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.safetensors"

    def _write(self, file: Path, latents: torch.Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        staged = file.with_suffix(f".{self.process_index}.tmp")
        save_file({"latents": latents.contiguous()}, staged)
        staged.replace(file)


def _read(file: Path) -> torch.Tensor | None:
    """What was drawn; `None` if nothing was, or if it is damaged."""
    if not file.is_file():
        return None
    try:
        return load_file(file)["latents"]
    except (SafetensorError, KeyError, OSError):
        return None
