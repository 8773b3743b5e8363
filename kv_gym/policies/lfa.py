"""LFA: evict the token that the smallest share of queries attended to, where the top 32 of a query count.

Differs from the paper in: the update rule is what the name says, the paper's own may differ: hits are divided by the
number of queries that could see the token, so a newcomer needs no starting value; there is no query memory (a
query attends when it comes); a token is hit when any query head of its KV head has it among its 32 largest
weights, equals included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Paper, StatefulPolicy
from kv_gym.policies.scoring.attention_hits import among_top


@dataclass(frozen=True)
class LFA(StatefulPolicy):
    """Share of queries that had the token among their `top`; state `hits` is int64 `[batch, kv_heads, tokens]`."""

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
        return {"hits": view.positions.new_zeros(view.positions.shape)}

    def observe(self, view: CacheView, attention: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"hits": state["hits"] + among_top(attention, view, self.top).sum(2)}

    def score(self, view: CacheView) -> Tensor:
        return view.state["hits"] / (view.age + 1)
