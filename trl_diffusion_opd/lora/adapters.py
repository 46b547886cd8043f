# SPDX-License-Identifier: Apache-2.0
"""Add, switch, save and load LoRA adapters."""

import copy
import logging
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..hub.locations import DIFFUSERS_WEIGHT_NAME
from .checks import some
from .files import LoraWeights, read_lora
from .writing import sorted_options, write_diffusers


logger = logging.getLogger(__name__)


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
def _only(transformer: nn.Module, adapter_name: str) -> Iterator[None]:
    """
    Takes the other adapters out of the modules for a while. PEFT walks over all modules dozens of times to add an adapter
    or to collect its tensors, which would take longer with each one that is there.
    """
    held = [
        (child, child._modules)
        for layer in _tuner_layers(transformer)
        for child in layer.children()
        if isinstance(child, nn.ModuleDict)
    ]
    try:
        for child, modules in held:
            child._modules = {name: module for name, module in modules.items() if name == adapter_name}
        yield
    finally:
        for child, modules in held:
            modules.update(child._modules)
            child._modules = modules


def active_adapters(transformer: nn.Module) -> tuple[str, ...]:
    """The adapters that take part in a forward."""
    return next(
        (tuple(layer.active_adapters) for layer in _tuner_layers(transformer) if not layer.disable_adapters), ()
    )


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


# The options that decide what a given set of tensors computes.
_SCALING_OPTIONS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def add_lora(transformer: nn.Module, weights: LoraWeights, adapter_name: str) -> None:
    """
    Adds a LoRA to `transformer` as one more adapter, frozen and in fp32, without activating it.

    Which adapter is active and which parameters require a gradient stays as it was before the call.

    Args:
        transformer (`torch.nn.Module`):
            The model, with or without other adapters.
        weights ([`LoraWeights`]):
            What to add. Every tensor must find its place and every place its tensor, else a `ValueError` is raised
            and the adapter is removed again.
        adapter_name (`str`):
            Name of the new adapter.
    """
    if adapter_name in getattr(transformer, "peft_config", {}):
        raise ValueError(f"{weights.owner}: the transformer already has an adapter called {adapter_name!r}.")
    try:
        with _only(transformer, adapter_name):
            _add_frozen(transformer, weights, adapter_name)
    except Exception:
        if adapter_name in getattr(transformer, "peft_config", {}):
            transformer.delete_adapters(adapter_name)
        raise


def _add_frozen(transformer: nn.Module, weights: LoraWeights, adapter_name: str) -> None:
    flags = {id(parameter): parameter.requires_grad for parameter in transformer.parameters()}
    tuners = _tuner_layers(transformer)
    # On a layer that only the new adapter touches, the active adapter must be the same as on all the others. If there
    # is no other adapter yet, "default" is a name that no layer knows, so the base model goes on computing.
    active = tuners[0].active_adapters if tuners else ["default"]
    try:
        _inject(transformer, weights, adapter_name)
    finally:
        for module in transformer.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter(active)
        # Last, because `set_adapter` changes the flags too.
        for parameter in transformer.parameters():
            parameter.requires_grad_(flags.get(id(parameter), False))


def save_lora(
    folder: str | Path,
    transformer: nn.Module,
    *,
    adapter_name: str = "default",
    weight_name: str = DIFFUSERS_WEIGHT_NAME,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> Path:
    """
    Writes one adapter so that `StableDiffusion3Pipeline.load_lora_weights` applies it exactly.

    Args:
        folder (`str` or `Path`):
            Where to write; created if needed.
        transformer (`torch.nn.Module`):
            The model that has the adapter. Its other adapters are not written.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            Which adapter to write.
        weight_name (`str`, *optional*, defaults to `"pytorch_lora_weights.safetensors"`):
            Name of the file.
        state_dict (`dict[str, torch.Tensor]`, *optional*):
            Tensors to write instead of the live ones, for example a moving average, with the names of
            [`lora_state_dict`].

    Returns:
        `Path`: the written file.
    """
    live = lora_state_dict(transformer, adapter_name)
    if state_dict is None:
        state_dict = live
    else:
        _check_tensors(state_dict, live, f"`state_dict` of adapter {adapter_name!r}")
    if has_no_effect(state_dict, lora_scaling(transformer, adapter_name)):
        logger.warning(
            f"The LoRA written to {str(Path(folder) / weight_name)!r} changes nothing: all its updates `B @ A` are zero. "
            "Train it longer."
        )
    tensors = {name: tensor.detach().float().cpu() for name, tensor in state_dict.items()}
    return write_diffusers(Path(folder), tensors, sorted_options(transformer.peft_config[adapter_name]), weight_name)


def load_lora_into(transformer: nn.Module, source: str | Path | LoraWeights, adapter_name: str = "default") -> None:
    """
    Sets the tensors of an existing adapter to those of a file written by [`save_lora`] (or any that [`read_lora`] reads).

    Args:
        transformer (`torch.nn.Module`):
            The model that has the adapter. Its active adapter and `requires_grad` flags stay as they are.
        source (`str`, `Path` or [`LoraWeights`]):
            The file, its folder, or what was read from it. Its tensors and its scaling must be those of the adapter,
            else a `ValueError` is raised and nothing is changed.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            Which adapter to set.
    """
    if isinstance(source, LoraWeights):
        owner, weights = source.owner, source
    else:
        owner = f"adapter {adapter_name!r} from {str(source)!r}"
        weights = read_lora(source, owner=owner)
    _check_tensors(weights.state_dict, lora_state_dict(transformer, adapter_name), owner)
    config = transformer.peft_config[adapter_name]
    differing = {
        option: (getattr(weights.config, option), getattr(config, option))
        for option in _SCALING_OPTIONS
        if getattr(weights.config, option) != getattr(config, option)
    }
    if differing:
        raise ValueError(
            f"{owner}: the file was saved with another LoRA config than the model has now, as (file, model): "
            f"{differing}. Use the LoRA config of the saved run."
        )
    set_peft_model_state_dict(transformer, weights.state_dict, adapter_name)


def lora_state_dict(transformer: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """Returns the tensors of one adapter, named without the adapter; they share memory with the model."""
    if adapter_name not in getattr(transformer, "peft_config", {}):
        present = sorted(getattr(transformer, "peft_config", {}))
        raise ValueError(f"The transformer has no adapter called {adapter_name!r}; it has: {present}.")
    with _only(transformer, adapter_name):
        return get_peft_model_state_dict(transformer, adapter_name=adapter_name, save_embedding_layers=False)


def has_no_effect(state_dict: dict[str, torch.Tensor], scaling: dict[str, float] | None = None) -> bool:
    """
    Whether a LoRA changes nothing, because in each of its modules `A`, `B` or the factor before them is zero.

    A LoRA with magnitudes (DoRA) or non-zero biases counts as one that changes something.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            Its tensors, with the names of [`lora_state_dict`] or those of a file.
        scaling (`dict[str, float]`, *optional*):
            The factors by module, as [`lora_scaling`] returns them.

    Returns:
        `bool`: `True` if every update is zero.
    """
    zeros = {name for name, tensor in state_dict.items() if not tensor.detach().any()}
    matrices = {name for name in state_dict if name.endswith((".lora_A.weight", ".lora_B.weight"))}
    modules = {name.rpartition(".lora_")[0] for name in matrices}
    idle = {name.rpartition(".lora_")[0] for name in zeros & matrices}
    idle |= {module for module in modules if (scaling or {}).get(module) == 0}
    others = {name for name in state_dict if name not in matrices and not name.endswith(".alpha")}
    return bool(modules) and modules == idle and others <= zeros


def lora_scaling(transformer: nn.Module, adapter_name: str = "default") -> dict[str, float]:
    """Returns the factor that each layer of one adapter applies to `B @ A`, by module name."""
    with _only(transformer, adapter_name):
        return {
            name: module.scaling[adapter_name]
            for name, module in transformer.named_modules()
            if isinstance(module, LoraLayer) and adapter_name in module.scaling
        }


def _inject(transformer: nn.Module, weights: LoraWeights, adapter_name: str) -> None:
    try:
        with warnings.catch_warnings():
            # PEFT asks whether several adapters are meant; they are.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            transformer.add_adapter(copy.deepcopy(weights.config), adapter_name)
    except ValueError as error:  # PEFT's "no module matches" is one
        raise ValueError(
            f"{weights.owner}: nothing of the LoRA could be applied to the transformer; it was trained for another "
            f"base model. {' '.join(str(error).split())}"
        ) from error
    # PEFT gives the adapter the dtype of the base, and a small update does not survive being rounded to bf16.
    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            for name in module.adapter_layer_names:
                parameters = getattr(module, name)
                if adapter_name in parameters:
                    parameters[adapter_name].to(torch.float32)
    _check_tensors(weights.state_dict, lora_state_dict(transformer, adapter_name), weights.owner)
    set_peft_model_state_dict(transformer, weights.state_dict, adapter_name)


def _check_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], owner: str) -> None:
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if not found.keys() & expected.keys():
        raise ValueError(
            f"{owner}: nothing of the LoRA could be applied to the transformer, {some(unexpected)} have no place in "
            "it. It was trained for another base model."
        )
    if missing:
        raise ValueError(
            f"{owner}: tensors are missing that the LoRA config asks for: {some(missing)}. The file is incomplete or "
            "the LoRA was trained for another base model."
        )
    if unexpected:
        raise ValueError(
            f"{owner}: tensors have no place in the transformer: {some(unexpected)}. The LoRA was trained for "
            "another base model, or its config does not belong to its weights."
        )
    shapes = [
        f"{name} is {list(found[name].shape)} and should be {list(expected[name].shape)}"
        for name in sorted(expected)
        if found[name].shape != expected[name].shape
    ]
    if shapes:
        raise ValueError(f"{owner}: tensors have wrong shapes: {some(shapes)}. It was trained for another base model.")
