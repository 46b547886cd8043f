# SPDX-License-Identifier: Apache-2.0
"""Devices: their names, their memory, and which modules are on them."""

import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch import nn


def device_name(device: torch.device) -> str:
    """What a device is called by its maker."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{_cpu_name()} ({threads} thread{'s' if threads > 1 else ''})"
    return device.type.upper()


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory_in_use(device: torch.device) -> int:
    """Bytes in use: the most ever allocated on a GPU, what is resident now on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


@contextmanager
def on_device(modules: Iterable[nn.Module | None], device: torch.device, offload: bool = True) -> Iterator[None]:
    """Moves modules to a device, and to the CPU afterwards if `offload`."""
    modules = [module for module in modules if module is not None]
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        if offload:
            for module in modules:
                module.to("cpu")


def module_bytes(*modules: nn.Module) -> int:
    """Size of parameters and buffers (a position embedding can be a large one)."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def format_bytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
