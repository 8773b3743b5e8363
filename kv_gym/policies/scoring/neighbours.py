"""Slots as tokens of a text: their neighbours, their rank, the same token in other heads.

Slots may lie in any order and heads may hold different tokens, so everything here goes by `view.positions`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kv_gym.cache_view import CacheView


def smooth(received: Tensor, view: CacheView, window: int, kernel: int, pooling: str = "avg") -> Tensor:
    """Pool over the `kernel` nearest cached tokens of the text, `[batch, heads, tokens]` float32.

    The last `window` tokens and the older ones are pooled apart: the papers drop the window before they pool.

    Args:
        received: `[batch, heads, tokens]`, not negative, of KV heads or of the query heads of `view`.
        view: the slots.
        window: how many of the newest tokens of the text make up the window.
        kernel: odd; a token and `kernel // 2` neighbours on each side.
        pooling: ``avg`` (zeros beyond the ends count) or ``max``.
    """
    group = received.shape[1] // view.positions.shape[1]
    order = view.positions.argsort(-1).repeat_interleave(group, 1)
    recent = (view.age < window).repeat_interleave(group, 1).gather(-1, order)
    valid = view.valid.repeat_interleave(group, 1)
    received = (received * valid).gather(-1, order)
    pool = F.avg_pool1d if pooling == "avg" else F.max_pool1d
    newer, older = (
        pool((received * side).flatten(0, 1)[:, None], kernel, 1, kernel // 2).view_as(received)
        for side in (recent, ~recent)
    )
    pooled = torch.where(recent, newer, older)
    return torch.empty_like(pooled).scatter_(-1, order, pooled)


def rank(values: Tensor, view: CacheView) -> Tensor:
    """Rank of each slot within its head, `[batch, kv_heads, tokens]` int64: 0 = largest, ties to the newer token.

    Args:
        values: `[batch, kv_heads, tokens]`.
        view: the slots; those that are not valid come last.
    """
    newest_first = view.positions.argsort(-1, descending=True)
    ordered = values.masked_fill(~view.valid, float("-inf")).gather(-1, newest_first)
    order = newest_first.gather(-1, ordered.argsort(dim=-1, descending=True, stable=True))
    ranks = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, ranks)


def number_tokens(view: CacheView) -> tuple[int, Tensor]:
    """Numbers for the cached tokens of all rows: the same token has one number in all heads of its row.

    Returns:
        A bound of the numbers (how many there are is not asked of an accelerator), and the number of each slot,
        `[batch, kv_heads, tokens]` int64. The invalid slots of a row count as one token.
    """
    rows = torch.arange(len(view.positions), device=view.positions.device)[:, None, None]
    # a number for each token of each row, however far apart the positions are
    ordered, order = (view.positions * len(view.positions) + rows).flatten().sort()
    first = torch.ones_like(ordered)
    first[1:] = ordered[1:] != ordered[:-1]
    numbers = torch.empty_like(order).scatter_(0, order, first.cumsum(0) - 1)
    return len(numbers), numbers.view_as(view.positions)


def mean_over_heads(received: Tensor, view: CacheView) -> Tensor:
    """What each token receives in the mean over all KV heads, at its slot in every head.

    A token's absence from a head counts as nothing received there.

    Args:
        received: `[batch, kv_heads, queries, tokens]`, zero where not valid.
        view: the slots.

    Returns:
        `[batch, kv_heads, queries, tokens]` float32.
    """
    batch, heads, queries, n = received.shape
    count, tokens = number_tokens(view)
    # in double, so that the order of the sum is no matter
    total = torch.zeros(queries, count, dtype=torch.float64, device=received.device)
    total.index_add_(1, tokens.flatten(), received.transpose(1, 2).transpose(0, 1).reshape(queries, -1).double())
    mean = (total / heads).float()[:, tokens.flatten()]
    return mean.view(queries, batch, heads, n).permute(1, 2, 0, 3)
