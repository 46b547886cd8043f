# SPDX-License-Identifier: Apache-2.0
"""The same prompts with the same noise, drawn by several policies."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from ..data.rounds import Prompts, TaskBatch, spread
from ..models.prompt_encoder import PromptEncoder
from ..models.sampler import Policy
from ..utils.hardware import on_device
from .score import Evaluator


@dataclass
class GridSampler:
    """
    Draws a few prompts of each task. What does not learn is drawn once.

    Args:
        evaluator ([`Evaluator`]):
            Whose settings the images are drawn with.
        prompts ([`PromptEncoder`]):
            Encodes the prompts, and keeps them.
        datasets (`dict[str, Dataset | StreamedPrompts]`):
            Prompts of each task.
        num_prompts (`int`):
            How many of each are drawn.
    """

    evaluator: Evaluator
    prompts: PromptEncoder
    datasets: dict[str, Prompts]
    num_prompts: int

    def __post_init__(self):
        self._unchanging: dict[str, list[torch.Tensor]] = {}

    def batches(self) -> list[TaskBatch]:
        """The prompts with their noise."""
        size = self.evaluator.batch_size
        found = []
        for task, data in self.datasets.items():
            positions = spread(data, self.num_prompts)
            chunks = [positions[start : start + size] for start in range(0, len(positions), size)]
            found += [self.evaluator.batch(data, task, chunk, purpose="grid") for chunk in chunks]
        return found

    def sample(
        self, policies: Sequence[Policy], learning: Policy, batches: list[TaskBatch]
    ) -> dict[str, list[torch.Tensor]]:
        """
        Images `[3, H, W]` in `[0, 1]` of each policy, by its name.

        Args:
            policies (`Sequence[Policy]`):
                Who draws.
            learning ([`Policy`]):
                The one of them that changes from call to call.
            batches (`list[TaskBatch]`):
                What is drawn.
        """
        self.prompts.prepare("grid", lambda: [prompt for batch in batches for prompt in batch.prompts])
        sampler, columns = self.evaluator.sampler, {}
        with on_device((sampler.pipeline.vae,), sampler.device):
            for policy in tqdm(policies, desc="Drawing images", disable=not self.evaluator.show_progress, leave=False):
                images = self._unchanging.get(policy.name)
                if images is None:
                    images = [image for batch in batches for image in self.sample_batch(policy, batch)]
                    if policy.name != learning.name:
                        self._unchanging[policy.name] = images
                columns[policy.name] = images
        return columns

    def sample_batch(self, policy: Policy, batch: TaskBatch) -> torch.Tensor:
        """Images `[B, 3, H, W]` in `[0, 1]` of a policy, with the settings of evaluation."""
        conditioning = self.prompts.conditioning(batch.prompts)
        return self.evaluator.sampler.decode(self.evaluator.sample_latents(policy, batch, conditioning))
