# SPDX-License-Identifier: Apache-2.0
import torch


def pictures(count: int, height: int = 8, width: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))
