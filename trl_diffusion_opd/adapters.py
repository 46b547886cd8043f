# SPDX-License-Identifier: Apache-2.0
"""Switching the adapters of a transformer for forwards without gradient."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@contextmanager
def use_adapter(transformer: nn.Module, *adapter_names: str) -> Iterator[None]:
    """
    Activates an adapter for forwards without gradient and puts the previous one (the student) back, whatever happens.

    No `requires_grad` flag is touched: the student stays trainable and the teachers stay frozen.

    Args:
        transformer (`torch.nn.Module`):
            The model that has the adapter, without any wrapper of a parallel backend.
        adapter_names (`str`):
            The adapter to activate; with several, their updates add up.
    """
    for adapter_name in adapter_names:
        if adapter_name not in getattr(transformer, "peft_config", {}):
            present = sorted(getattr(transformer, "peft_config", {}))
            raise ValueError(f"The transformer has no adapter called {adapter_name!r}; it has: {present}.")
    with _switch(transformer, list(adapter_names), False):
        yield


@contextmanager
def base_only(transformer: nn.Module) -> Iterator[None]:
    """
    Turns all adapters off for forwards without gradient and puts the previous state back, whatever happens.

    Args:
        transformer (`torch.nn.Module`):
            The model, with or without adapters.
    """
    with _switch(transformer, None, True):
        yield


# Transformer -> (its adapters' configs, its tuner layers). Walking over all modules for each switch would cost more
# than the switch itself. A new set of adapters has new config objects, which makes an entry stale.
_TUNER_LAYERS: "weakref.WeakKeyDictionary[nn.Module, tuple[list, list[BaseTunerLayer]]]" = weakref.WeakKeyDictionary()


def _tuner_layers(transformer: nn.Module) -> list[BaseTunerLayer]:
    configs = list(getattr(transformer, "peft_config", {}).values())
    known, layers = _TUNER_LAYERS.get(transformer, ([], []))
    if len(known) != len(configs) or any(a is not b for a, b in zip(known, configs, strict=True)):
        layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
        _TUNER_LAYERS[transformer] = (configs, layers)
    return layers


@contextmanager
def _switch(transformer: nn.Module, active: list[str] | None, disabled: bool) -> Iterator[None]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "Adapters can only be switched with gradients disabled, because activation checkpointing runs the student "
            "again during the backward and would find another adapter active. Wrap the call in `torch.no_grad()`."
        )
    layers = _tuner_layers(transformer)
    # PEFT's own attributes are set, because its public `set_adapter` and `enable_adapters` also flip `requires_grad`
    # of every adapter: that freezes the student, unfreezes the teacher and can cost as much as a forward.
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            _set_state(layer, layer._active_adapter if active is None else active, disabled)
        yield
    finally:
        for layer, (was_active, was_disabled) in zip(layers, before, strict=True):
            _set_state(layer, was_active, was_disabled)


def _set_state(layer: BaseTunerLayer, active: str | list[str], disabled: bool) -> None:
    layer._active_adapter = active
    if layer._disable_adapters is not disabled:  # writing an attribute of a module is slow
        layer._disable_adapters = disabled
