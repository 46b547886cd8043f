# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of the LoRA of a student."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class StudentEMA:
    """
    Exponential moving average of the student's LoRA parameters.

    The average is updated after `n` optimizer steps where `n + 1` is a multiple of `update_every`, as in the published
    code. Up to its first update it is equal to the parameters, so that the average of a short run is never the LoRA
    that training began with, which does nothing.

    Args:
        parameters (`dict[str, torch.nn.Parameter]`):
            The trained parameters by name.
        decay (`float`):
            Upper bound of the decay `d = min((1 + n) / (10 + n), decay)`.
        update_every (`int`):
            Optimizer steps between two updates.
        update_repeats (`int`, *optional*, defaults to `1`):
            How many times an update is applied, `average <- d^k average + (1 - d^k) parameters`. The published code of
            DiffusionOPD and GRPO-Guard updates after every micro-batch, and so 3 and 4 times with the same parameters.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float, update_every: int, update_repeats: int = 1):
        self.parameters = parameters
        self.decay = decay
        self.update_every = update_every
        self.update_repeats = update_repeats
        self._average = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, num_steps: int) -> None:
        """Called after every optimizer step, of which `num_steps` were taken so far."""
        if num_steps < max(2, self.update_every):  # up to the first update
            self.load_state_dict(self.parameters)
        elif (num_steps + 1) % self.update_every == 0:
            decay = min((1 + num_steps) / (10 + num_steps), self.decay) ** self.update_repeats
            for name, average in self._average.items():
                average.sub_((1 - decay) * (average - self.parameters[name]))

    def to(self, device: torch.device) -> None:
        self._average = {name: average.to(device) for name, average in self._average.items()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged tensors by parameter name."""
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        for name, average in self._average.items():
            average.copy_(state_dict[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Puts the average in the place of the raw weights, and the raw weights back whatever happens."""
        raw = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        try:
            self._put(self._average)
            yield
        finally:
            self._put(raw)

    def _put(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[name])
