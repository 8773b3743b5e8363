"""When a query uses a slot: attention as the requests of a classic cache.

All functions take the attention of m new queries as :meth:`~kv_gym.policies.StatefulPolicy.observe` gets it. A KV
head uses a slot when one of its query heads does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView


def above(attention: Tensor, view: CacheView, threshold: float) -> Tensor:
    """Where attention reaches `threshold`, `[batch, kv_heads, m, tokens]` bool."""
    return _group_max(attention, view) >= threshold


def above_even_share(attention: Tensor, view: CacheView, share: float = 1.0) -> Tensor:
    """Where attention reaches `share` times what an even split over the visible slots gives.

    Args:
        attention: `[batch, query_heads, m, tokens]` float32.
        view: the slots.
        share: 1 asks for at least the mean over the slots that the query sees.

    Returns:
        `[batch, kv_heads, m, tokens]` bool.
    """
    queried_at = view.query_positions(attention.shape[2])[:, None].expand(-1, view.positions.shape[1], -1)
    in_text_order = view.positions.masked_fill(~view.valid, -1).sort(-1).values
    visible = torch.searchsorted(in_text_order, queried_at.contiguous(), right=True) - (~view.valid).sum(
        -1, keepdim=True
    )
    # a little below the even share: even attention reaches it, however the softmax rounds;
    # a query of padding sees nothing, and nothing reaches an infinite share
    return _group_max(attention, view) >= (share * (1 - 1e-4) / visible.clamp(min=0))[..., None]


def among_top(attention: Tensor, view: CacheView, top: int) -> Tensor:
    """Where attention is among the `top` largest of its query and query head, equals included.

    Returns:
        `[batch, kv_heads, m, tokens]` bool.
    """
    least = attention.topk(min(top, attention.shape[-1]), dim=-1).values[..., -1:]
    hits = (attention >= least) & (attention > 0)
    return hits.unflatten(1, (view.keys.shape[1], -1)).any(2)


def last_hit(hits: Tensor, view: CacheView, before: Tensor) -> Tensor:
    """Position of the last query that hit each slot, `[batch, kv_heads, tokens]` int64.

    Args:
        hits: `[batch, kv_heads, m, tokens]` bool, of the last m queries.
        view: the slots.
        before: `[batch, kv_heads, tokens]` int64, the same before these queries.
    """
    m = hits.shape[2]
    row = (hits * torch.arange(1, m + 1, dtype=torch.int16, device=hits.device)[:, None]).amax(2)  # 0: no hit
    return torch.where(row > 0, view.seen[:, None, None] - m - 1 + row, before)


def _group_max(attention: Tensor, view: CacheView) -> Tensor:
    return attention.unflatten(1, (view.keys.shape[1], -1)).amax(2)
