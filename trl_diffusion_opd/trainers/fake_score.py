# SPDX-License-Identifier: Apache-2.0
"""The fake score of distribution matching: a second LoRA that learns what the student draws."""

import copy
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from ..lora.adapters import add_lora, load_lora_into, lora_state_dict, save_lora, use_adapter
from ..lora.files import LoraWeights
from ..losses.opd import mean_square
from ..models.family import ModelFamily
from ..models.loading import STUDENT
from ..models.sampler import Policy, PolicySampler
from ..models.velocity import Conditioning, VelocityModel


FAKE = "fake"
_WEIGHTS, _OPTIMIZER = "fake_score.safetensors", "fake_score_optimizer.safetensors"


class FakeScore:
    """
    A LoRA of the student's shape, which begins as the student does, with an AdamW of its own.

    Its parameters require gradients only while it is trained: the data-parallel wrapper, which expects gradients of all
    that did when it was made, does not know of it. Its gradients are averaged over the processes here.

    Args:
        transformer (`torch.nn.Module`):
            With the student's adapter.
        family ([`ModelFamily`]):
            Its family.
        learning_rate (`float`):
            Of its AdamW.
        betas (`tuple[float, float]`):
            Of its AdamW.
    """

    def __init__(self, transformer: nn.Module, family: ModelFamily, learning_rate: float, betas: tuple[float, float]):
        config = copy.deepcopy(transformer.peft_config[STUDENT])
        state = {name: tensor.detach().clone() for name, tensor in lora_state_dict(transformer, STUDENT).items()}
        add_lora(transformer, LoraWeights(config, state, "fake score"), FAKE)
        self.model, self.policy = VelocityModel(transformer, family), Policy(FAKE, 1.0, (FAKE,))
        self.parameters = {name: p for name, p in transformer.named_parameters() if f".{FAKE}." in name}
        self._learning_rate, self._betas = learning_rate, betas
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def num_bytes(self) -> int:
        """Its weights, gradients and moments."""
        return 4 * 4 * sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        if self._optimizer is None:  # the parameters are on their device by then
            self._optimizer = torch.optim.AdamW(
                list(self.parameters.values()), lr=self._learning_rate, betas=self._betas, weight_decay=0.0
            )
        return self._optimizer

    def velocity(
        self, sampler: PolicySampler, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """Its velocity `[B, ...]`, without guidance and without gradients."""
        return sampler.velocity(self.policy, sample, timestep, conditioning)

    def train(
        self,
        accelerator: Accelerator,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        velocity: torch.Tensor,
        weight: torch.Tensor,
        conditioning: Conditioning,
        max_grad_norm: float,
    ) -> torch.Tensor:
        """One step towards `velocity` `[B, ...]`, with a weight `[B]` for each sample; returns the loss."""
        parameters = list(self.parameters.values())
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            # The adapter stays on through the backward, in which activation checkpointing runs the forward again.
            with torch.no_grad(), use_adapter(self.model.transformer, FAKE), torch.enable_grad():
                with accelerator.autocast():
                    predicted = self.model(sample, timestep, *conditioning.batch(1.0), 1.0)
                loss = (weight * mean_square(predicted, velocity)).mean()
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
            parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")
        nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    # Checkpoints

    def save(self, folder: Path) -> None:
        save_lora(folder, self.model.transformer, adapter_name=FAKE, weight_name=_WEIGHTS)
        state = self.optimizer.state
        tensors = {
            f"{name}/{key}": value.detach().clone().reshape(value.shape)
            for name, parameter in self.parameters.items()
            for key, value in state.get(parameter, {}).items()
        }
        save_file(tensors, folder / _OPTIMIZER)

    def load(self, folder: Path) -> None:
        load_lora_into(self.model.transformer, folder / _WEIGHTS, FAKE)
        for entry, tensor in load_file(folder / _OPTIMIZER).items():
            name, _, key = entry.rpartition("/")
            parameter = self.parameters[name]
            self.optimizer.state[parameter][key] = tensor if key == "step" else tensor.to(parameter.device)
