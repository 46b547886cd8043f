# SPDX-License-Identifier: Apache-2.0
"""Metrics of the rounds between two lines of the log."""

from collections import defaultdict

import torch

from ..utils.hardware import memory_in_use


class RoundMetrics:
    """
    Collects values by name, and the speed of rounds.

    Attributes:
        peak_memory (`int`):
            Most bytes in use so far: allocated on a GPU, resident on the CPU.
    """

    def __init__(self):
        self.peak_memory = 0
        self._values: dict[str, list[float]] = defaultdict(list)
        self._seconds = self._images = 0

    def __getitem__(self, name: str) -> list[float]:
        """The values of this name since the last [`pop_means`], to append to."""
        return self._values[name]

    def __contains__(self, name: str) -> bool:
        return bool(self._values.get(name))

    def pop_means(self) -> dict[str, float]:
        """The mean of each metric; starts over."""
        means = {name: sum(values) / len(values) for name, values in self._values.items() if values}
        self._values.clear()
        return means

    def add_speed(self, num_images: int, seconds: float, is_last: bool, device: torch.device) -> None:
        """
        Adds the time of a (micro-)round, and at the last one the speed of the round and the peak memory of this process.

        Args:
            num_images (`int`):
                Images of the micro-round in all processes.
            seconds (`float`):
                How long it took.
            is_last (`bool`):
                Whether the round is over.
            device (`torch.device`):
                Whose memory counts.
        """
        self._seconds += seconds
        self._images += num_images
        if not is_last:
            return
        self._values["step_time"].append(self._seconds)
        self._values["images_per_second"].append(self._images / self._seconds)
        self._seconds = self._images = 0
        self.peak_memory = max(self.peak_memory, memory_in_use(device))
        self._values["peak_memory_gb"].append(self.peak_memory / 2**30)
