# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of the LoRA of a student."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import nn


class StudentEMA:
    """
    Exponential moving average of the student's LoRA parameters.

    Args:
        parameters (`dict[str, torch.nn.Parameter]`):
            The trained parameters by name.
        decay (`float`):
            Upper bound of the decay `min((1 + n) / (10 + n), decay)`, with `n` the number of optimizer steps taken
            before this one; 0 for `n = 0`.
        update_every (`int`):
            Optimizer steps between two updates.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float, update_every: int):
        self.parameters = parameters
        self.update_every = update_every
        self._average = EMAModel(parameters.values(), decay=decay)

    def update(self, num_steps: int) -> None:
        """Called after every optimizer step, of which `num_steps` were taken so far."""
        if num_steps % self.update_every == 0:
            # diffusers counts the updates; the published recipe's warm-up counts optimizer steps.
            self._average.optimization_step = num_steps - 1
            self._average.step(self.parameters.values())

    def to(self, device: torch.device) -> None:
        self._average.to(device)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged tensors by parameter name."""
        return dict(zip(self.parameters, self._average.shadow_params, strict=True))

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        for average, name in zip(self._average.shadow_params, self.parameters, strict=True):
            average.copy_(state_dict[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Puts the average in the place of the raw weights, and the raw weights back whatever happens."""
        raw = [parameter.detach().clone() for parameter in self.parameters.values()]
        try:
            self._average.copy_to(self.parameters.values())
            yield
        finally:
            for parameter, value in zip(self.parameters.values(), raw, strict=True):
                parameter.data.copy_(value)
