# SPDX-License-Identifier: Apache-2.0
"""Frozen modules that take turns on a device: here the CPU stands in for it, so that every copy is one in memory."""

import weakref

import pytest
import torch
from torch import nn

from tests.support.tiny import tiny_inputs, tiny_transformer, velocity
from trl_diffusion_opd.utils import turns as turns_module
from trl_diffusion_opd.utils.turns import Turns


CPU = torch.device("cpu")


def tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def places(module: nn.Module) -> list[int]:
    return [tensor.untyped_storage().data_ptr() for tensor in tensors(module)]


@pytest.fixture
def modules() -> list[nn.Module]:
    return [tiny_transformer(seed=seed).requires_grad_(False) for seed in range(3)]


@pytest.mark.parametrize("block_bytes", [2**28, 4096, 1])
def test_a_module_computes_the_same_wherever_it_is(modules, monkeypatch, block_bytes):
    monkeypatch.setattr(turns_module, "BLOCK_BYTES", block_bytes)
    module = modules[0].to(torch.bfloat16)
    module.proj_out.float()  # weights of two dtypes, and buffers
    before = [tensor.clone() for tensor in tensors(module)]
    strange = nn.ParameterList([nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(0, 3)), torch.ones(3, 2).T])
    turns = Turns(CPU)
    for each in (module, strange):
        turns.add(each)
        turns.begin(each)
        turns.begin(None)
        turns.begin(each)
    assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(tensors(module), before, strict=True))
    assert [tuple(tensor.shape) for tensor in strange] == [(), (0, 3), (2, 3)]
    assert strange[0].item() == 2.0 and strange[2].eq(1).all()


def test_forwards_are_bit_equal(modules):
    with torch.no_grad():
        expected = [velocity(module, tiny_inputs()) for module in modules]
        turns = Turns(CPU)
        for module in modules:
            turns.add(module)
        for index in (0, 1, 2, 0):
            turns.begin(modules[index], then=modules[(index + 1) % 3])
            assert velocity(modules[index], tiny_inputs()).equal(expected[index])


def test_two_at_most_are_there_and_their_copies_are_dropped(modules):
    turns = Turns(CPU)
    for module in modules:
        turns.add(module)
    first, second, third = modules
    host = places(first)
    assert turns.resident() == []
    turns.begin(first, then=second)
    assert turns.resident() == [first, second]
    copied = places(first)
    assert not set(copied) & set(host)
    copies = [weakref.ref(block) for block in turns._there[first]]
    next_one = places(second)
    turns.begin(second, then=third)
    assert turns.resident() == [second, third]
    assert places(second) == next_one, "copied ahead, and not again"
    assert places(first) == host
    assert all(copy() is None for copy in copies)
    turns.begin(third, then=third)
    assert turns.resident() == [third]
    kept = places(third)
    turns.begin(third)
    assert places(third) == kept, "a turn that goes on copies nothing"
    turns.begin(None, then=first)
    assert turns.resident() == [first]
    turns.begin(None)
    assert turns.resident() == []


def test_whoever_runs_a_module_makes_it_its_turn(modules):
    turns = Turns(CPU)
    first, second, never_added = modules
    turns.add(first)
    turns.add(second)
    turns.take(second)
    assert turns.resident() == [second]
    turns.take(never_added)
    assert turns.resident() == [second]
    turns.begin(never_added, then=first)
    assert turns.resident() == [first]
    turns.take(second)
    assert turns.resident() == [second]
