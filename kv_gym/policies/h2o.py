"""H2O: keep the heavy hitters, the tokens with the largest attention summed over every query so far.

Paper: arXiv 2306.14048 (NeurIPS 2023), section 4 and algorithm 1.
Differs from the paper in: sums are means over the query heads of each KV head (the paper has one KV head per query
head); the recent part is a setting of the protection (the paper gives it half the budget).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kv_gym.cache_view import CacheView, group_mean
from kv_gym.policies.base import StatefulPolicy


@dataclass(frozen=True)
class H2O(StatefulPolicy):
    """Accumulated attention; state `mass` is float32 `[batch, kv_heads, tokens]`."""

    recent = 32

    def initial_state(self, view: CacheView) -> dict[str, Tensor]:
        return {"mass": view.keys.new_zeros(view.keys.shape[:3]).float()}

    def observe(self, view: CacheView, attention: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"mass": state["mass"] + group_mean(attention.sum(2), view.keys.shape[1])}

    def score(self, view: CacheView) -> Tensor:
        return view.state["mass"]
