# SPDX-License-Identifier: Apache-2.0
"""
One LoRA out of several: their updates `D_k = s_k B_k A_k` are merged, module by module, and brought back to a rank.

The updates are merged, never the factors: `sum B_k` times `sum A_k` has terms that belong to no LoRA.
"""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from .files import LoraWeights
from .options import infer_config


METHODS = ("sum", "mean", "ties", "dare")
TIES_DENSITY = 0.2  # share of each update that TIES keeps
DARE_DROP = 0.5  # share of each update that DARE drops
_OVERSAMPLING, _ITERATIONS = 16, 4
_SMALL = 512  # up to this many rows or columns the whole decomposition is cheap

# `A [rank, in]` and `B [out, rank]` by name of module, with the update `B A`: no other factor is applied. Of a
# convolution they have the two dimensions of a kernel too, `A` that of the module and `B` 1 x 1.
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def merge_updates(updates: Sequence[torch.Tensor], method: str, *, seed: str = "") -> torch.Tensor:
    """
    Merges the updates of one module.

    - `"sum"`: `sum_k D_k`, and `"mean"`: their mean.
    - `"ties"` (https://huggingface.co/papers/2306.01708): of each update only the largest entries stay; at each place the
      sign with the larger sum wins, and the entries that have it are averaged. As in PEFT, the largest are those of the
      module, not of the whole model.
    - `"dare"` (https://huggingface.co/papers/2311.03099): each entry of each update is dropped at random, the others are
      scaled up by what was dropped, and the updates are added up.

    Args:
        updates (`Sequence[torch.Tensor]`):
            Of shape `[out, in]`.
        method (`str`):
            One of `METHODS`.
        seed (`str`, *optional*):
            What the random choice depends on, such as the module's name. It is the same on every device.

    Returns:
        `torch.Tensor` of shape `[out, in]`, in float32 or float64.

    Raises:
        `ValueError`: a method that is not known.
    """
    stack = torch.stack([update.to(torch.promote_types(update.dtype, torch.float32)) for update in updates])
    if method == "sum":
        return stack.sum(0)
    if method == "mean":
        return stack.mean(0)
    if method == "ties":
        size = stack[0].numel()
        kept = max(1, round(TIES_DENSITY * size))
        smallest = stack.abs().flatten(1).kthvalue(size - kept + 1, dim=1).values
        trimmed = torch.where(stack.abs() >= smallest[:, None, None], stack, 0.0)
        sign = trimmed.sum(0).sign()
        agrees = trimmed.sign() == sign
        return torch.where(agrees, trimmed, 0.0).sum(0) / agrees.sum(0).clamp(min=1)
    if method == "dare":
        digest = hashlib.blake2b(seed.encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        kept = torch.rand(stack.shape, generator=generator).to(stack.device) >= DARE_DROP
        return (stack * kept / (1 - DARE_DROP)).sum(0)
    raise ValueError(f"LoRAs are merged by one of {', '.join(METHODS)}, but not by {method!r}.")


def factorize(update: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The best `B A` of a rank for an update (Eckart and Young), with the singular values shared between the factors.

    Large matrices are decomposed in the range that a random one is mapped to, after some power iterations (Algorithm 4.4
    of https://arxiv.org/abs/0909.4061), the same at every call.

    Args:
        update (`torch.Tensor`):
            Of shape `[out, in]`.
        rank (`int`):
            Of the factors, at most: directions that are zero up to rounding are left out.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `A` of shape `[r, in]` and `B` of shape `[out, r]`, `1 <= r <= rank`.
    """
    if min(update.shape) <= _SMALL:
        u, s, vh = torch.linalg.svd(update, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(update.shape[1], rank + _OVERSAMPLING, generator=generator).to(update)
        basis = torch.linalg.qr(update @ probes).Q
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(update.mT @ basis).Q
            basis = torch.linalg.qr(update @ basis).Q
        u, s, vh = torch.linalg.svd(basis.mT @ update, full_matrices=False)
        u = basis @ u
    own = int((s > 10 * torch.finfo(s.dtype).eps * s[0]).sum())
    rank = max(1, min(rank, own))
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def plain_layers(transformer: nn.Module, adapter_names: Sequence[str]) -> dict[str, tuple[LoraLayer, tuple[str, ...]]]:
    """
    The modules that adapters change, by name, each with those of the adapters that it has.

    Args:
        transformer (`torch.nn.Module`):
            The model that has all of them.
        adapter_names (`Sequence[str]`):
            The adapters.

    Raises:
        `ValueError`: the model has no adapter of this name, or an adapter is more than `s B A` of a linear layer or a
            convolution.
    """
    known = getattr(transformer, "peft_config", {})
    if unknown := [name for name in adapter_names if name not in known]:
        raise ValueError(f"The transformer has no adapter called {unknown[0]!r}; it has: {sorted(known)}.")
    layers = {}
    for module, layer in transformer.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        own = tuple(name for name in adapter_names if name in layer.scaling)
        for name in own:
            if what := _more_than_factors(layer, name):
                raise ValueError(
                    f"The LoRA {name!r} has {what} at {module!r}, but only plain LoRAs, which are `B A` alone, can be "
                    "merged. Leave it out."
                )
        if own:
            layers[module] = layer, own
    return layers


def merge_adapters(transformer: nn.Module, adapter_names: Sequence[str], method: str, into: str) -> None:
    """
    Sets the tensors of one adapter to the merge of others, module by module. What it has of rank beyond that of the merge
    stays as [`set_adapter`] leaves it.

    Args:
        transformer (`torch.nn.Module`):
            The model that has all of them.
        adapter_names (`Sequence[str]`):
            What is merged. A module that an adapter has not got counts as an update of zeros.
        method (`str`):
            One of `METHODS`.
        into (`str`):
            The adapter that is set, whose rank the merge is brought to.

    Raises:
        `ValueError`: a method or an adapter that is not known, an adapter that has a module that `into` has not, or one
            that is more than the factors of a LoRA. Nothing is changed then.
    """
    layers = plain_layers(transformer, adapter_names)
    targets = plain_layers(transformer, [into])
    _check_modules(layers, targets, into)
    factors = {
        module: factorize(_merged(module, layer, adapter_names, method), targets[module][0].r[into])
        for module, (layer, _) in layers.items()
    }
    set_adapter(transformer, factors, into)


def merged_lora(
    transformer: nn.Module, adapter_names: Sequence[str], method: str, *, owner: str = "merge"
) -> LoraWeights:
    """
    The merge of adapters as a LoRA of its own, in each module of the rank that the adapters have there together: this is
    exact for `"sum"` and `"mean"`, and for the others the best of this rank.

    Args:
        transformer (`torch.nn.Module`):
            The model that has all of them.
        adapter_names (`Sequence[str]`):
            What is merged. A module that an adapter has not got counts as an update of zeros.
        method (`str`):
            One of `METHODS`.
        owner (`str`, *optional*, defaults to `"merge"`):
            What error messages call it.

    Returns:
        [`LoraWeights`]: what [`add_lora`] adds to a model.

    Raises:
        `ValueError`: a method or an adapter that is not known, or one that is more than the factors of a LoRA.
    """
    factors = {}
    for module, (layer, own) in plain_layers(transformer, adapter_names).items():
        a, b = factorize(_merged(module, layer, adapter_names, method), sum(layer.r[name] for name in own))
        kernel = layer.lora_A[own[0]].weight.shape[1:]
        factors[module] = a.reshape(-1, *kernel), b.reshape(*b.shape, *[1] * (len(kernel) - 1))
    return lora_of(factors, owner)


def lora_of(factors: Factors, owner: str = "merge") -> LoraWeights:
    """A LoRA whose updates are the products of these [`Factors`], with alpha = rank in each module."""
    state = {}
    for module, (a, b) in factors.items():
        state |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    return LoraWeights(infer_config(state, {}), state, owner)


@torch.no_grad()
def set_adapter(transformer: nn.Module, factors: Factors, into: str) -> None:
    """
    Gives an adapter the updates `B A`, whatever its own scaling: exactly where its rank is large enough, else the best of
    its rank.

    Where its rank is larger, the other rows of `A` stay as they are and the columns of `B` become zero, as at the start of
    a training: were both zero, they would never learn. So it is with the whole of a module that `factors` has not.

    Args:
        transformer (`torch.nn.Module`):
            The model.
        factors ([`Factors`]):
            `A [r, in]` and `B [out, r]` by module.
        into (`str`):
            The adapter.

    Raises:
        `ValueError`: the adapter is not known, has not got a module, or is more than the factors of a LoRA. Nothing is
            changed then.
    """
    layers = plain_layers(transformer, [into])
    _check_modules(factors, layers, into)
    for module, (layer, _) in layers.items():
        target_a, target_b = layer.lora_A[into].weight, layer.lora_B[into].weight
        target_b.zero_()
        if module not in factors:
            continue
        a, b = (factor.flatten(1) for factor in factors[module])
        if len(a) > layer.r[into]:
            a, b = factorize(b @ a, layer.r[into])
        target_a[: len(a)] = a.reshape(-1, *target_a.shape[1:])
        target_b[:, : len(a)] = (b / layer.scaling[into]).reshape(*b.shape, *target_b.shape[2:])


def adds_up(transformer: nn.Module, adapter_names: Sequence[str]) -> bool:
    """
    Whether adapters that are active together do what their updates added up do. With magnitudes (DoRA) they do not: PEFT
    rescales what the adapters before gave too, so that even their order matters.
    """
    return not any(transformer.peft_config[name].use_dora for name in adapter_names)


@torch.no_grad()
def _merged(module: str, layer: LoraLayer, adapter_names: Sequence[str], method: str) -> torch.Tensor:
    """The merged update `[out, in]` of a module, of a convolution `[out, in * height * width]`."""
    own = {name: _update(layer, name) for name in adapter_names if name in layer.scaling}
    nothing = torch.zeros_like(next(iter(own.values())))
    return merge_updates([own.get(name, nothing) for name in adapter_names], method, seed=module)


def _update(layer: LoraLayer, adapter_name: str) -> torch.Tensor:
    # Not PEFT's `get_delta_weight`, which returns the dtype of the factors.
    a, b = (factor[adapter_name].weight.flatten(1).float() for factor in (layer.lora_A, layer.lora_B))
    return layer.scaling[adapter_name] * b @ a


def _more_than_factors(layer: LoraLayer, adapter_name: str) -> str | None:
    """What an adapter has at a module besides `A` and `B`."""
    if adapter_name not in layer.lora_A:
        return "embeddings"
    if adapter_name in layer.lora_magnitude_vector:
        return "magnitudes (DoRA)"
    if layer.lora_bias[adapter_name]:
        return "a bias"
    if adapter_name in layer.lora_variant:
        return "a variant of LoRA"
    return "a convolution in groups" if getattr(layer.get_base_layer(), "groups", 1) > 1 else None


def _check_modules(found: Mapping[str, object], layers: Mapping[str, object], into: str) -> None:
    if missing := sorted(found.keys() - layers.keys()):
        raise ValueError(
            f"What is merged changes {missing[0]!r}, which the LoRA {into!r} does not. Add it to its `target_modules`."
        )
