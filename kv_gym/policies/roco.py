"""RoCo: evict the lowest mean attention, but only among tokens whose attention is stable.

As in the paper's code, EasyKV: mean and standard deviation are over the queries that could see the
token; a share of the budget goes to the tokens of largest standard deviation, the others compete by mean.
Differs from the paper in: one decision may evict many tokens, so the unstable ones are a share of the budget and all
others compete; the ten newest tokens and the four sinks are protected beside that share, not out of it; the share
is that of encoding (0.1; decoding has 0.3); attention is the mean over the query heads of each KV head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kv_gym.cache_view import CacheView, group_mean
from kv_gym.policies.base import Paper, StatefulPolicy
from kv_gym.policies.scoring.neighbours import rank


@dataclass(frozen=True)
class RoCo(StatefulPolicy):
    """Mean attention, plus one for the share `unstable` of the budget that varies most.

    State `mass` and `squares` are float32 `[batch, kv_heads, tokens]`, sums of attention and of its squares.
    """

    paper = Paper(
        "On the Efficacy of Eviction Policy for Key-Value Constrained Generative Language Model Inference", "2402.06262"
    )
    sinks = 4
    recent = 10
    unstable: float = 0.1

    def __post_init__(self) -> None:
        self._require(0 <= self.unstable <= 1, "unstable, a share, from 0 to 1")

    def initial_state(self, view: CacheView) -> dict[str, Tensor]:
        zeros = view.keys.new_zeros(view.keys.shape[:3]).float()
        return {"mass": zeros, "squares": zeros.clone()}

    def observe(self, view: CacheView, attention: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        received = group_mean(attention, view.keys.shape[1])
        return {"mass": state["mass"] + received.sum(2), "squares": state["squares"] + received.square().sum(2)}

    def score(self, view: CacheView) -> Tensor:
        queries = view.age + 1  # that could see the token, its own among them
        mean = view.state["mass"] / queries
        deviation = (view.state["squares"] / queries - mean.square()).clamp(min=0).sqrt()
        spared = (view.budget * self.unstable).long()[..., None]
        # a mean is at most 1, so whoever is spared outranks whoever competes
        return mean + (rank(deviation, view) < spared)
