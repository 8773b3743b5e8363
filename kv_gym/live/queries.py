"""The last queries of every row, for policies that ask for them."""

from __future__ import annotations

import torch
from torch import Tensor


def last_queries(known: Tensor | None, new: Tensor, wanted: int, fresh: Tensor | None) -> Tensor:
    """The last `wanted` of the queries known and new, `[batch, query_heads, <= wanted, d]`, in memory of their own.

    Args:
        known: `[batch, query_heads, k, d]`, or None.
        new: `[batch, query_heads, m, d]`.
        wanted: how many at most.
        fresh: `[batch, m]` bool on the CPU, which new ones are no padding; None means all. Where a row has fewer
            than others, padding stands in front.
    """
    if fresh is None:
        both = new if known is None else torch.cat((known, new[:, :, -wanted:]), 2)
        return both[:, :, -wanted:].clone()  # a view would hold all of the forward's queries
    both = new if known is None else torch.cat((known, new), 2)
    real = torch.ones(both.shape[0], both.shape[2], dtype=torch.bool)
    real[:, -new.shape[2] :] = fresh
    order = real.byte().argsort(dim=1, stable=True)[:, -wanted:].to(new.device)  # padding first
    return both.gather(2, order[:, None, :, None].expand(-1, both.shape[1], -1, both.shape[3]))
