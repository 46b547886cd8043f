# SPDX-License-Identifier: Apache-2.0
"""LoHa and LoKr as LoRAs: products of low-rank matrices are low-rank matrices, so nothing is lost."""

import torch


# `B` and `A`, whose product is a matrix.
Pair = tuple[torch.Tensor, torch.Tensor]

# More rows or columns than any layer of a transformer has.
_WIDEST = 2**18


def loha(first: Pair, second: Pair) -> Pair:
    """
    The elementwise product of two low-rank matrices as one low-rank matrix.

    `((B1 A1) * (B2 A2))[o, i] = sum_jk B1[o, j] B2[o, k] A1[j, i] A2[k, i]`, whose rank is the product of the ranks.

    Args:
        first (`tuple`), second (`tuple`):
            `B` of the shape `[out, rank]` and `A` of the shape `[rank, in]`.

    Returns:
        `tuple`: `B` and `A` of the product, in float32 at least.

    Raises:
        `ValueError`: shapes that do not fit, or a rank that is no longer low.
    """
    (up1, down1), (up2, down2) = (_matrices(pair) for pair in (first, second))
    if up1.shape[0] != up2.shape[0] or down1.shape[1] != down2.shape[1]:
        raise ValueError(
            f"its halves have the shapes {_shape(up1, down1)} and {_shape(up2, down2)}, which must be equal"
        )
    _check_rank(up1.shape[1] * up2.shape[1], up1.shape[0], down1.shape[1], "LoHa")
    up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
    down = (down1[:, None, :] * down2[None, :, :]).flatten(0, 1)
    return up, down


def lokr(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> Pair:
    """
    The Kronecker product of two matrices as one low-rank matrix.

    `kron(B1 A1, B2 A2) = kron(B1, B2) kron(A1, A2)`, whose rank is the product of the ranks. A full matrix is the product
    of itself and the identity.

    Args:
        first (`tuple`), second (`tuple`):
            One matrix, or the `B` and `A` of which it is the product.

    Returns:
        `tuple`: `B` and `A` of the product, in float32 at least.

    Raises:
        `ValueError`: shapes that do not fit, or a rank that is no longer low.
    """
    (up1, down1), (up2, down2) = (_matrices(factor) for factor in (first, second))
    rank = up1.shape[1] * up2.shape[1]
    _check_rank(rank, up1.shape[0] * up2.shape[0], down1.shape[1] * down2.shape[1], "LoKr")
    return torch.kron(up1, up2), torch.kron(down1, down2)


def _matrices(factor: tuple[torch.Tensor, ...]) -> Pair:
    if wrong := [list(tensor.shape) for tensor in factor if tensor.ndim != 2 or tensor.numel() == 0]:
        raise ValueError(
            f"a factor has the shape {wrong[0]}, but only those of linear layers, matrices, are supported"
        )
    precise = [tensor.to(torch.promote_types(_wide(tensor), torch.float32)) for tensor in factor]
    if len(precise) == 2:
        up, down = precise
        if up.shape[1] != down.shape[0]:
            raise ValueError(f"factors of the shapes {list(up.shape)} and {list(down.shape)} cannot be multiplied")
        return up, down
    (matrix,) = precise
    rows, columns = matrix.shape
    identity = torch.eye(min(rows, columns), dtype=matrix.dtype)
    return (identity, matrix) if rows < columns else (matrix, identity)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype.itemsize == 1 else tensor.dtype  # float8 is not promoted


def _check_rank(rank: int, rows: int, columns: int, kind: str) -> None:
    if max(rows, columns) > _WIDEST:
        raise ValueError(f"this {kind} is of a [{rows}, {columns}] matrix, which is larger than those of any model")
    # A LoRA of half the rank that is possible is as large as the full matrix.
    if rank > min(rows, columns) // 2:
        raise ValueError(
            f"as a LoRA this {kind} of a [{rows}, {columns}] matrix has the rank {rank}, and more than "
            f"{min(rows, columns) // 2} takes more memory than the matrix itself. Train it with a smaller rank (a LoKr "
            "with low-rank factors), or merge it and pass the full model"
        )


def _shape(up: torch.Tensor, down: torch.Tensor) -> list[int]:
    return [up.shape[0], down.shape[1]]
