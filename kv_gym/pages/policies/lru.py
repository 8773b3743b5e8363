"""LRU: the page that was used longest ago leaves. No paper."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kv_gym.pages.cache import Candidates
from kv_gym.pages.policies.base import PageRankingPolicy


@dataclass(eq=False)
class PageLRU(PageRankingPolicy):
    """Least recently used; the first candidate is the one."""

    candidates: int = 1

    def rank(self, candidates: Candidates) -> np.ndarray:
        return -candidates.age
