"""Recency: keep the newest tokens, a sliding window. The second null hypothesis."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Policy


@dataclass(frozen=True)
class Recency(Policy):
    """Newer is better; nothing is protected."""

    paper = None
    comparable = True
    static = True

    def score(self, view: CacheView) -> Tensor:
        return view.positions.float()
