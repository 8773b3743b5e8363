"""The expected-utility oracle: sees the recorded continuations and keeps what they attend to on average.

KVP ranks by the same quantity, the mean attention per query. It maximises the
utility that equal budgets keep; a bound on utility only, never on accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Paper, Policy, recorded_future


@dataclass(frozen=True)
class Oracle(Policy):
    """Mean over continuations of the attention per query; `reduction` over query heads is max or mean."""

    paper = Paper("Learning to Evict from Key-Value Cache", "2602.10238", venue="ICML 2026")
    needs_future = True
    comparable = True
    reduction: str = "max"

    def score(self, view: CacheView) -> Tensor:
        return recorded_future(self, view).expected(self.reduction)
