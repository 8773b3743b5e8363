"""LRU: evict the token that was used least recently, where a use is attention of at least an even share.

The classic rule of caches. A query uses a token when it pays it at least what an even split over all that it sees
would.
Differs from the classic in: a token that was evicted never comes back, and a query may use many tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import StatefulPolicy
from kv_gym.policies.scoring.attention_hits import above_even_share, last_hit


@dataclass(frozen=True)
class LRU(StatefulPolicy):
    """Position of the query that used the token last; state `last` is int64 `[batch, kv_heads, tokens]`.

    A new token counts as used when it comes. `share` is the least use, in even shares of a query's attention.
    """

    paper = None
    comparable = True
    observed_with = ("share",)
    share: float = 1.0

    def __post_init__(self) -> None:
        self._require(self.share > 0, "share above 0")

    def initial_state(self, view: CacheView) -> dict[str, Tensor]:
        return {"last": view.positions.clone()}

    def observe(self, view: CacheView, attention: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"last": last_hit(above_even_share(attention, view, self.share), view, state["last"])}

    def score(self, view: CacheView) -> Tensor:
        return view.state["last"].float()
