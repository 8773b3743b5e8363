"""What rules may ask of the last queries: their attention, in rows that have seen different numbers of tokens."""

from __future__ import annotations

from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError


def window_attention(view: CacheView, window: int, rule: str) -> tuple[Tensor, Tensor]:
    """Attention of the last `window` queries, `[batch, query_heads, window, tokens]` float32, and which are real.

    Args:
        view: one layer.
        window: how many of the last queries; a context that is shorter has fewer.
        rule: who asks, for the refusal.

    Returns:
        The attention, and `[batch, window]` bool: rows that have seen fewer tokens have fewer queries.

    Raises:
        UserError: the view does not hold the queries.
    """
    wanted = min(window, int(view.seen.max()))
    held = 0 if view.queries is None else view.queries.shape[2]
    if held < wanted:
        raise UserError(
            f"allocation {rule!r} reads the last {wanted} queries and layer {view.layer} holds {held}: "
            f"make the cache with that allocation, or record with --window {window}"
        )
    attention = view.attention(wanted)
    ages = attention.new_ones(wanted).cumsum(0).flip(0)
    return attention, ages <= view.seen[:, None]
