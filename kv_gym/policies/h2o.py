"""H2O: keep the heavy hitters, the tokens with the largest attention summed over every query so far.

Differs from the paper in: sums are means over the query heads of each KV head (the paper has one KV head per query
head); the recent part is a setting of the protection (the paper gives it half the budget). `reduce="mean"`, which is
not the paper's, divides by the number of queries that could see the token, so that age is no advantage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kv_gym.cache_view import CacheView, group_mean
from kv_gym.policies.base import Paper, StatefulPolicy


@dataclass(frozen=True)
class H2O(StatefulPolicy):
    """Accumulated attention; state `mass` is float32 `[batch, kv_heads, tokens]`; `reduce` is sum or mean."""

    paper = Paper(
        "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        "2306.14048",
        "section 4 and algorithm 1",
        venue="NeurIPS 2023",
    )
    recent = 32
    comparable = True
    reduce: str = "sum"

    def __post_init__(self) -> None:
        self._require(self.reduce in ("sum", "mean"), "reduce sum or mean")

    def initial_state(self, view: CacheView) -> dict[str, Tensor]:
        return {"mass": view.keys.new_zeros(view.keys.shape[:3]).float()}

    def observe(self, view: CacheView, attention: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"mass": state["mass"] + group_mean(attention.sum(2), view.keys.shape[1])}

    def score(self, view: CacheView) -> Tensor:
        if self.reduce == "sum":
            return view.state["mass"]
        return view.state["mass"] / (view.age + 1)  # all queries from the token's own on are observed
