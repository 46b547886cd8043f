# SPDX-License-Identifier: Apache-2.0
"""Optimizer and scheduler from the functions that the user passed."""

from collections.abc import Callable

import torch
from torch import nn


def make_optimizers(
    makers: tuple[Callable | None, Callable | None], parameters: list[nn.Parameter]
) -> tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None]:
    """
    Optimizer and scheduler from the functions that the user passed.

    Raises:
        `ValueError`: a finished optimizer, which cannot hold the student's parameters, or a scheduler without one.
    """
    make_optimizer, make_scheduler = makers
    for maker in (make_optimizer, make_scheduler):
        if maker is not None and (not callable(maker) or isinstance(maker, torch.optim.Optimizer)):
            raise ValueError(
                f"`optimizers` must hold functions, but holds a {type(maker).__name__}, which was made before the student's "
                "LoRA was there to be trained. Pass e.g. `(lambda parameters: torch.optim.SGD(parameters, lr=0.1), None)`."
            )
    if make_optimizer is None and make_scheduler is not None:
        raise ValueError("`optimizers` has a scheduler without an optimizer. Pass both, or set `lr_scheduler_type`.")
    optimizer = make_optimizer(parameters) if make_optimizer is not None else None
    return optimizer, make_scheduler(optimizer) if make_scheduler is not None else None
