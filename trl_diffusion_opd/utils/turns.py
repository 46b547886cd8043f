# SPDX-License-Identifier: Apache-2.0
"""Frozen modules that take turns on a device, and are in host memory in between."""

from contextlib import nullcontext

import torch
from torch import nn


# Page-locked memory comes in powers of two, so that weights are put into blocks of one: by themselves they would take up
# to twice their size.
BLOCK_BYTES = 2**28
_ALIGNMENT = 512


class Turns:
    """
    Has a frozen module on the device while it is its turn, and copies the next one meanwhile: two at most.

    Nothing changes their weights, so the copies on the device are dropped when the turn is over. (diffusers' group
    offloading copies in every forward, which is too often for a turn of many.)

    Args:
        device (`torch.device`):
            Where they run.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._host: dict[nn.Module, _Packed] = {}
        self._there: dict[nn.Module, list[torch.Tensor]] = {}  # blocks on the device
        self._now: nn.Module | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def add(self, module: nn.Module) -> None:
        """Moves a module to host memory, from where its turns bring it. Its weights must not change any more."""
        self._host[module] = _Packed(module, pin=self._stream is not None)

    @property
    def modules(self) -> list[nn.Module]:
        return list(self._host)

    def resident(self) -> list[nn.Module]:
        """The modules that are on the device, or being copied there."""
        return list(self._there)

    def take(self, module: nn.Module) -> None:
        """Makes it the turn of `module`, unless it is already or it was never added."""
        if module is not self._now and module in self._host:
            self.begin(module)

    def begin(self, now: nn.Module | None, then: nn.Module | None = None) -> None:
        """
        Begins the turn of a module.

        Args:
            now (`torch.nn.Module`, *optional*):
                Whose turn it is; nobody's if it is not set or was never added.
            then (`torch.nn.Module`, *optional*):
                Whose turn is next: it is copied while `now` works. If it is the same, it stays.
        """
        wanted = [module for module in dict.fromkeys((now, then)) if module in self._host]
        leaving = [module for module in self._there if module not in wanted]
        if self._stream is not None and leaving and any(module not in self._there for module in wanted):
            # What is still queued needs the room of those that leave.
            torch.cuda.current_stream(self.device).synchronize()
        for module in leaving:
            self._host[module].point_to(self._host[module].blocks)
            del self._there[module]
        self._now = now if now in self._host else None
        for module in wanted:
            if module not in self._there:
                self._there[module] = self._copy(module)
            if module is self._now:
                self._wait_for(module)  # before the copy of the next one is queued

    def _copy(self, module: nn.Module) -> list[torch.Tensor]:
        packed = self._host[module]
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            blocks = [block.to(self.device, non_blocking=True, copy=True) for block in packed.blocks]
        packed.point_to(blocks)
        return blocks

    def _wait_for(self, module: nn.Module) -> None:
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for block in self._there[module]:
            block.record_stream(current)  # their memory belongs to the stream that copied them


class _Packed:
    """The parameters and buffers of a module in a few blocks of host memory."""

    def __init__(self, module: nn.Module, pin: bool):
        self.blocks: list[torch.Tensor] = []
        self._places: list[tuple[torch.Tensor, int, int]] = []  # tensor, number of its block, where it begins in it
        group: list[torch.Tensor] = []
        for tensor in (*module.parameters(), *module.buffers()):
            if group and sum(map(_room, group)) + _room(tensor) > BLOCK_BYTES:
                self._pack(group, pin)
                group = []
            group.append(tensor)
        if group:
            self._pack(group, pin)
        self.point_to(self.blocks)

    def _pack(self, tensors: list[torch.Tensor], pin: bool) -> None:
        block, start = torch.empty(sum(map(_room, tensors)), dtype=torch.uint8, pin_memory=pin), 0
        for tensor in tensors:
            _view(block, start, tensor).copy_(tensor.detach())
            tensor.data = _view(block, start, tensor)
            self._places.append((tensor, len(self.blocks), start))
            start += _room(tensor)
        self.blocks.append(block)

    def point_to(self, blocks: list[torch.Tensor]) -> None:
        """Has the tensors of the module be parts of these blocks."""
        for tensor, number, start in self._places:
            tensor.data = _view(blocks[number], start, tensor)


def _room(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT


def _view(block: torch.Tensor, start: int, tensor: torch.Tensor) -> torch.Tensor:
    """The part of a block that has the shape and dtype of a tensor."""
    size = tensor.numel() * tensor.element_size()
    return block[start : start + size].view(tensor.dtype).view(tensor.shape)
