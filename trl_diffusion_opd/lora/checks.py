# SPDX-License-Identifier: Apache-2.0
"""Checks of the tensors of a LoRA file: what cannot be right is refused, by name, before it meets a model."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig

from .options import module_alpha, module_rank


_DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
# The largest number of half precision. Weights of a transformer are some ten thousand times smaller.
_LARGEST = torch.finfo(torch.float16).max


def check_tensors(tensors: dict[str, torch.Tensor], file: Path, owner: str) -> None:
    """
    Checks each tensor of a LoRA file for itself.

    Raises:
        `ValueError`: one is not of a floating-point dtype, has not the dimensions of a matrix where `A` and `B` must
            be matrices, or holds what is no finite number in float32, in which it is used.
    """
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    if wrong := [f"{name} is {_dtype(tensor)}" for name, tensor in weights.items() if tensor.dtype not in _DTYPES]:
        raise ValueError(
            f"{owner}: tensors of {file.name!r} are not floating-point weights: {some(wrong)}. A LoRA is stored in one "
            f"of {', '.join(str(dtype).removeprefix('torch.') for dtype in _DTYPES)}. Save it again without quantizing."
        )
    flat = [
        f"{name} is {list(tensor.shape)}"
        for name, tensor in weights.items()
        if name.endswith((".lora_A.weight", ".lora_B.weight")) and (tensor.ndim < 2 or tensor.numel() == 0)
    ]
    if flat:
        raise ValueError(
            f"{owner}: tensors of {file.name!r} have the wrong shape: {some(flat)}, but `lora_A` and `lora_B` are "
            "matrices with values. Save the LoRA again."
        )
    broken = [
        f"{name} ({_not_finite(tensor)})"
        for name, tensor in tensors.items()
        if tensor.dtype.is_floating_point and not torch.isfinite(tensor.to(torch.float32)).all()
    ]
    if broken:
        raise ValueError(
            f"{owner}: tensors hold NaN or infinite values, or some beyond float32: {some(broken)} in {file.name!r}. "
            "Save the LoRA again."
        )


def pop_alphas(state_dict: dict[str, torch.Tensor], file: Path, owner: str) -> dict[str, float]:
    """
    Takes the `<module>.alpha` tensors out of the tensors of a LoRA.

    Returns:
        `dict[str, float]`: their values by module.

    Raises:
        `ValueError`: one is not a single number, or its module has no LoRA in the file.
    """
    modules = {module for module, _, _ in _matrices(state_dict)}
    alphas = {}
    for name in [name for name in state_dict if name.endswith(".alpha")]:
        tensor, module = state_dict.pop(name), name.removesuffix(".alpha")
        if tensor.numel() != 1 or tensor.dtype == torch.bool or tensor.dtype.is_complex:
            raise ValueError(
                f"{owner}: {name!r} in {file.name!r} is {_dtype(tensor)} of the shape {list(tensor.shape)}, but an "
                "alpha is one number. Save the LoRA again."
            )
        if module not in modules:
            raise ValueError(
                f"{owner}: {file.name!r} holds {name!r} (value {float(tensor):g}), but no `lora_A` and `lora_B` of this "
                "module, so weights are missing or the name is wrong. Save the LoRA again, or remove the tensor."
            )
        alphas[module] = float(tensor)
    return alphas


def check_alphas(alphas: dict[str, float], config: LoraConfig, file: Path, owner: str) -> None:
    """Raises a `ValueError` if `alpha` tensors contradict the options beside them."""
    for module, alpha in alphas.items():
        expected = module_alpha(config, module)
        # Half precision, in which some programs save all tensors, rounds by up to 2**-9.
        if not math.isclose(alpha, expected, rel_tol=2**-8):
            raise ValueError(
                f"{owner}: {file.name!r} contradicts itself: '{module}.alpha' is {alpha:g}, but by its options alpha is "
                f"{expected:g}. Remove the one that is wrong."
            )


def check_update(state_dict: dict[str, torch.Tensor], config: LoraConfig, file: Path, owner: str) -> None:
    """
    Checks what the matrices and the options do together: `alpha / rank * B @ A` of each module, in float32.

    Raises:
        `ValueError`: the matrices do not have the rank that the options say, or the factor or a value of the update is
            larger than the largest number of half precision (65504), or none at all.
    """
    for module, a, b in _matrices(state_dict):
        rank, alpha = module_rank(config, module), module_alpha(config, module)
        for name, tensor, dim in (("lora_A", a, 0), ("lora_B", b, 1)):
            if tensor is not None and tensor.shape[dim] != rank:
                raise ValueError(
                    f"{owner}: '{module}.{name}.weight' in {file.name!r} has the shape {list(tensor.shape)} and so the "
                    f"rank {tensor.shape[dim]}, but by `r` and `rank_pattern` the rank is {rank}. Correct the options."
                )
        factor = alpha / rank
        if not abs(factor) <= _LARGEST:
            raise ValueError(
                f"{owner}: in {file.name!r} the LoRA of {module!r} has alpha {alpha:g} and rank {rank}: it is multiplied "
                f"by {factor:g}, but more than {_LARGEST:g} cannot be right. Correct `lora_alpha` or `alpha_pattern`."
            )
        if a is None or b is None:
            continue  # whatever applies the LoRA says which tensor is missing
        a, b = a.flatten(1).to(torch.float32), b.flatten(1).to(torch.float32)
        # Multiplying large matrices takes a while, and this bound is nearly always enough.
        if abs(factor) * rank * float(a.abs().max()) * float(b.abs().max()) <= _LARGEST:
            continue
        largest = float((factor * (b @ a)).abs().max())
        if not largest <= _LARGEST:
            raise ValueError(
                f"{owner}: in {file.name!r} the LoRA of {module!r} changes a weight by {largest:g} (alpha {alpha:g}, "
                f"rank {rank}), but more than {_LARGEST:g} cannot be right. Correct its alpha or save the LoRA again."
            )


def _matrices(
    state_dict: dict[str, torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor | None, torch.Tensor | None]]:
    """The modules with their `A` and `B`, of which one may be missing."""
    names = [name for name in state_dict if name.endswith((".lora_A.weight", ".lora_B.weight"))]
    for module in dict.fromkeys(name.rpartition(".lora_")[0] for name in names):
        yield module, state_dict.get(f"{module}.lora_A.weight"), state_dict.get(f"{module}.lora_B.weight")


def _not_finite(tensor: torch.Tensor) -> str:
    values = tensor.double().flatten()
    return f"{float(values[~torch.isfinite(values.float())][0]):g}"


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def some(names: list[str]) -> str:
    """The first three, and how many more there are."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{rest}"
