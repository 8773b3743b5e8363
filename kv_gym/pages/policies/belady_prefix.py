"""Belady's MIN for prefixes: of the leaves that no request uses the one whose next use is farthest leaves. An oracle.

Source: Belady 1966, with the constraint that a page can only be used together with the pages before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kv_gym.pages.cache import Candidates, PageCache
from kv_gym.pages.policies.base import PageRankingPolicy


@dataclass(eq=False)
class BeladyPrefix(PageRankingPolicy):
    """Farthest next use among all leaves; a page whose next use is farther than all of theirs is not stored."""

    needs_future = True
    objects = False

    def priority(self, cache: PageCache, page: int) -> tuple:
        """Of a leaf; the smallest leaves."""
        return (-cache.due[page], cache.last_use[page])

    def rank(self, candidates: Candidates) -> np.ndarray:
        return -candidates.next_use.astype(float)

    def declines(self, incoming: int, victim: int, cache: PageCache) -> bool:
        return int(cache.trace.next_use[cache.access]) >= cache.due[victim]
