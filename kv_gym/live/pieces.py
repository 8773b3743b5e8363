"""The pieces in which a forward's tokens are taken in: one, or blocks between which the cache evicts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Piece = slice | Tensor


def pieces(block: int | None, waiting: Sequence[int], m: int, fresh: Tensor | None) -> list[Piece]:
    """What of a forward's m columns is taken in at a time.

    Args:
        block: real tokens between two firings inside a forward, each of which ends a piece; None: there are none.
        waiting: per row, real tokens since the last firing.
        m: columns of the forward.
        fresh: `[batch, m]` bool on the CPU, which of them are tokens and not padding; None means all.

    Returns:
        Slices of columns where all rows agree, else bool `[batch, m]` on the CPU: every row's blocks begin at its own
        tokens, so a padded row is read as it would be alone.
    """
    if block is None:
        return [slice(0, m) if fresh is None else fresh]
    if fresh is None and len(set(waiting)) == 1:
        ends = [*range(block - waiting[0], m, block), m]
        return [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
    real = torch.ones(len(waiting), m, dtype=torch.bool) if fresh is None else fresh
    number = (torch.tensor(waiting)[:, None] + real.cumsum(1) - 1) // block
    found = [real & (number == k) for k in range(int(number.max()) + 1)]
    return [piece for piece in found if bool(piece.any())]
