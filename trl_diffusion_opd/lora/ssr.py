# SPDX-License-Identifier: Apache-2.0
"""
SSR-Merge (https://huggingface.co/papers/2606.10617): a merge of LoRAs that routes what each of them sees to its own
update, in closed form from the inputs of some forwards, without training.

In each module `A` has the rows of all `A_k` and `B` the columns of all `s_k B_k`. With `z = A x` of an input `x`, the
matrix `R` with the least `sum |B R z - s_k B_k A_k x|^2`, where LoRA `k` is the one that was active at `x`, is `Q G^-1`,
and the merge is `B R A`.

```python
statistics = SSRStatistics(transformer, ["ocr", "scene"])
for name, prompts in calibration.items():
    with statistics.of(name):
        ...  # forwards, as of a rollout of `prompts`
set_adapter(transformer, ssr_factors(statistics), "student")  # or `lora_of`, of the whole rank
```
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.func import functional_call

from .adapters import use_adapter
from .merging import Factors, plain_layers


SSR = "ssr"  # what settings call it
RIDGE = 1e-4


@dataclass
class _Sums:
    """
    What was seen at a module.

    Args:
        layer (`LoraLayer`):
            The module.
        adapters (`tuple[str, ...]`):
            The LoRAs that it has, whose ranks add up to `R`.
        correlation (`torch.Tensor`), guide (`torch.Tensor`):
            Sums `[R, R]` over tokens: `z z^T`, and in the rows of the active LoRA `z_k z^T`.
        tokens (`dict[str, int]`):
            Their number by LoRA.
    """

    layer: LoraLayer
    adapters: tuple[str, ...]
    correlation: torch.Tensor
    guide: torch.Tensor
    tokens: dict[str, int]

    @torch.no_grad()
    def add(self, adapter_name: str, x: torch.Tensor) -> None:
        # The modules themselves make `z`, so that convolutions are none of our business. In float64, because `G` is
        # inverted, and neither autocast nor TF32 touches that.
        parts = [self.layer.lora_A[name] for name in self.adapters]
        each = [functional_call(part, {"weight": part.weight.double()}, x.double()) for part in parts]
        channels = 1 if parts[0].weight.ndim > 2 else -1
        each = [z.movedim(channels, -1).flatten(0, -2) for z in each]
        z, k = torch.cat(each, -1), self.adapters.index(adapter_name)
        first = sum(other.shape[-1] for other in each[:k])
        self.correlation = self.correlation.to(z.device) + z.mT @ z
        self.guide = self.guide.to(z.device)
        self.guide[first : first + each[k].shape[-1]] += each[k].mT @ z
        self.tokens[adapter_name] += len(z)


class SSRStatistics:
    """
    What LoRAs see in the forwards of this process: of each module that they change two matrices `[R, R]` in float64, where
    `R` is the sum of their ranks.

    Args:
        transformer (`torch.nn.Module`):
            The model that has all of them.
        adapter_names (`Sequence[str]`):
            The LoRAs to be merged.

    Raises:
        `ValueError`: the model has no adapter of this name, or one is more than the factors of a LoRA.
    """

    def __init__(self, transformer: nn.Module, adapter_names: Sequence[str]):
        self.transformer = transformer
        self.adapter_names = tuple(dict.fromkeys(adapter_names))
        self.sums: dict[str, _Sums] = {}
        for module, (layer, own) in plain_layers(transformer, self.adapter_names).items():
            rank = sum(layer.r[name] for name in own)
            zeros = torch.zeros(rank, rank, dtype=torch.float64)
            self.sums[module] = _Sums(layer, own, zeros, zeros.clone(), dict.fromkeys(own, 0))

    @contextmanager
    def of(self, adapter_name: str) -> Iterator[None]:
        """
        Activates a LoRA, and takes the inputs of all forwards inside for its own. They run without gradients.

        Args:
            adapter_name (`str`):
                One of those that are merged. It may be entered several times.

        Raises:
            `ValueError`: it is none of them.
        """
        if adapter_name not in self.adapter_names:
            raise ValueError(
                f"The LoRA {adapter_name!r} is none of those that are merged: {', '.join(self.adapter_names)}. Take one "
                "of these."
            )
        hooks = [
            sums.layer.register_forward_pre_hook(_hook(sums, adapter_name))
            for sums in self.sums.values()
            if adapter_name in sums.adapters
        ]
        try:
            with torch.no_grad(), use_adapter(self.transformer, adapter_name):
                yield
        finally:
            for hook in hooks:
                hook.remove()


def _hook(sums: _Sums, adapter_name: str) -> Any:
    return lambda _, inputs: sums.add(adapter_name, inputs[0])


def ssr_router(correlation: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
    """
    `R = Q (G + 1e-4 I)^-1`, as in the published code.

    Args:
        correlation (`torch.Tensor`):
            `G [R, R]`, the mean of `z z^T` over the tokens of all LoRAs.
        guide (`torch.Tensor`):
            `Q [R, R]`: in the rows of LoRA `k` the sum of `z_k z^T` over its own tokens, by the number of all tokens.

    Returns:
        `torch.Tensor` of shape `[R, R]` in float64.
    """
    ridge = RIDGE * torch.eye(len(correlation), dtype=torch.float64, device=correlation.device)
    return torch.linalg.solve(correlation.double() + ridge, guide.double().mT).mT


@torch.no_grad()
def ssr_factors(statistics: SSRStatistics) -> Factors:
    """
    The merge by SSR.

    LoRAs weigh by their tokens: if all see the same ones, and as many, it is the mean of their updates (up to the
    ridge). A module that one LoRA alone has keeps its update, as in the published code.

    Args:
        statistics ([`SSRStatistics`]):
            Of forwards of each LoRA.

    Returns:
        [`Factors`]: `A [R, in]` and `B R [out, R]` in float32 by module, for [`set_adapter`] or [`lora_of`].

    Raises:
        `ValueError`: a module was in no forward of a LoRA that it has.
    """
    factors = {}
    for module, sums in statistics.sums.items():
        layer = sums.layer
        a = torch.cat([layer.lora_A[name].weight.float() for name in sums.adapters])
        b = torch.cat([layer.scaling[name] * layer.lora_B[name].weight.float() for name in sums.adapters], 1)
        if len(sums.adapters) > 1:
            if unseen := [name for name in sums.adapters if not sums.tokens[name]]:
                raise ValueError(
                    f"There was no forward through {module!r} with the LoRA {unseen[0]!r} active, so that nothing is "
                    f"known of what it sees. Run some inside of `statistics.of({unseen[0]!r})`."
                )
            total = sum(sums.tokens.values())
            router = ssr_router(sums.correlation / total, sums.guide / total)
            b = (b.flatten(1).double() @ router.to(b.device)).float().reshape(b.shape)
        factors[module] = a, b
    return factors
