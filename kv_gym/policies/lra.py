"""LRA: evict the token that was attended to least recently, where the top 32 of a query count as attended to.

Differs from the paper in: the update rule is what the name says, the paper's own may differ; there is no query memory
(a query attends when it comes); a token is hit when any query head of its KV head has it among its 32 largest
weights, equals included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Paper, StatefulPolicy
from kv_gym.policies.scoring.attention_hits import among_top, last_hit


@dataclass(frozen=True)
class LRA(StatefulPolicy):
    """Position of the last query that had the token among its `top`; state `last` is int64 `[batch, kv_heads, tokens]`.

    A new token starts at its own position.
    """

    paper = Paper(
        "Attendre: Wait To Attend By Retrieval With Evicted Queries in Memory-Based Transformers "
        "for Long Context Processing",
        "2401.04881",
    )
    comparable = True
    observed_with = ("top",)
    top: int = 32

    def __post_init__(self) -> None:
        self._require(self.top >= 1, "top from 1")

    def initial_state(self, view: CacheView) -> dict[str, Tensor]:
        return {"last": view.positions.clone()}

    def observe(self, view: CacheView, attention: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"last": last_hit(among_top(attention, view, self.top), view, state["last"])}

    def score(self, view: CacheView) -> Tensor:
        return view.state["last"].float()
