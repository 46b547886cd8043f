# SPDX-License-Identifier: Apache-2.0
"""LoRAs of fused projections: split into those of queries, keys and values, and put together again, exactly."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .names import Place


@dataclass
class Update:
    """
    What a LoRA does to one matrix of weights: it adds `alpha / rank * up @ down`.

    Args:
        up (`torch.Tensor`):
            `B`, of the shape `[out, rank]`.
        down (`torch.Tensor`):
            `A`, of the shape `[rank, in]`.
        alpha (`float`):
            As in the equation.
        magnitude (`torch.Tensor`, *optional*):
            Of a DoRA the norms that the rows have afterwards, of the shape `[out]`.
    """

    up: torch.Tensor
    down: torch.Tensor
    alpha: float
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def split(update: Update, place: Place) -> dict[str, Update]:
    """
    The updates of the modules that share the rows of an original one.

    Each has the whole `A` and its rows of `B`. Where columns of these are zero, as in a LoRA that [`fuse`] put together,
    they and their rows of `A` are left out.

    Args:
        update ([`Update`]):
            That of the original module.
        place ([`Place`]):
            Where it is in diffusers.

    Returns:
        `dict[str, Update]`: by module of diffusers.

    Raises:
        `ValueError`: the rows cannot be shared out.
    """
    update = _swapped(update, place)
    if len(place.modules) == 1:
        return {place.modules[0]: update}
    rows, parts = update.up.shape[0], sum(place.shares)
    if rows % parts:
        raise ValueError(f"its {rows} rows cannot be shared out to {len(place.modules)} modules, {parts} parts in all")
    sizes = [rows // parts * share for share in place.shares]
    ups = update.up.split(sizes)
    magnitudes = [None] * len(sizes) if update.magnitude is None else update.magnitude.split(sizes)
    used = [up.to(torch.float32).ne(0).any(dim=0) for up in ups]
    updates = {}
    for module, up, magnitude, columns in zip(place.modules, ups, magnitudes, used, strict=True):
        if magnitude is not None or not any(own.any() for own in used):
            columns = torch.ones_like(columns)
        if columns.any():
            kept = int(columns.sum())
            alpha = update.alpha if kept == update.rank else update.alpha * kept / update.rank
            # Copies: tensors that share memory cannot be saved.
            magnitude = None if magnitude is None else magnitude.clone()
            updates[module] = Update(up[:, columns], update.down[columns], alpha, magnitude)
    return updates


def fuse(updates: Mapping[str, Update], place: Place) -> Update:
    """
    The update of an original module from those of the modules that share its rows; one that has none stays as it is.

    Args:
        updates (`Mapping[str, Update]`):
            By module of diffusers, at least one.
        place ([`Place`]):
            Where the original module is in diffusers.

    Returns:
        [`Update`]: with the sum of the ranks, and a `B` in blocks; with one rank if they all have the same `A`. Their
        tensors are the same to the bit if their `alpha / rank` are equal.

    Raises:
        `ValueError`: the shapes do not fit.
    """
    own = [updates.get(module) for module in place.modules]
    present = [update for update in own if update is not None]
    units = {len(update.up) / share for update, share in zip(own, place.shares, strict=True) if update is not None}
    if len(units) > 1 or len({update.down.shape[1] for update in present}) > 1:
        raise ValueError(f"the LoRAs of {', '.join(updates)} have shapes that do not fit together")
    scales = {update.alpha / update.rank for update in present}
    first, rank = present[0], sum(update.rank for update in present)
    if len(scales) > 1:  # alpha is one number: what differs goes into `B`
        own = [u and Update(u.up.to(torch.float32) * (u.alpha / u.rank), u.down, float(u.rank)) for u in own]
        first = Update(first.up, first.down, float(first.rank))
    tensors = [tensor for update in own if update is not None for tensor in (update.up, update.down)]
    dtype = tensors[0].dtype if len({tensor.dtype for tensor in tensors}) == 1 else torch.float32
    downs = [update.down.to(dtype) for update in own if update is not None]
    if None not in own and all(d.shape == downs[0].shape and not (d.float() - downs[0].float()).any() for d in downs):
        up = torch.cat([update.up.to(dtype) for update in own])
        return _swapped(Update(up, downs[0], first.alpha), place)
    sizes = [round(max(units) * share) for share in place.shares]
    up = torch.zeros(sum(sizes), rank, dtype=dtype)
    row = column = 0
    for update, size in zip(own, sizes, strict=True):
        if update is not None:
            up[row : row + size, column : column + update.rank] = update.up
            column += update.rank
        row += size
    return _swapped(Update(up, torch.cat(downs), first.alpha * rank / first.rank), place)


def _swapped(update: Update, place: Place) -> Update:
    rows = update.up.shape[0]
    if not place.swapped or rows != 2 * update.down.shape[1]:
        return update
    halves = update.up.split(rows // 2)
    magnitude = None if update.magnitude is None else torch.cat(update.magnitude.split(rows // 2)[::-1])
    return Update(torch.cat(halves[::-1]), update.down, update.alpha, magnitude)
