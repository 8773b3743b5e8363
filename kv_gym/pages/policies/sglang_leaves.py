"""SGLang's radix cache: a heap over the leaves that no request uses, by one of its priorities.

Source: SGLang, `mem_cache/evict_policy.py`, as read in 2026. Differs from it in: nodes are single blocks, and times are
numbers of accesses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kv_gym.errors import UserError
from kv_gym.pages.cache import Candidates, PageCache
from kv_gym.pages.policies.base import PageRankingPolicy

STRATEGIES = ("lru", "lfu", "slru", "fifo", "mru", "filo")


@dataclass(eq=False)
class SGLangLeaves(PageRankingPolicy):
    """The leaf with the smallest priority leaves.

    Attributes:
        strategy: ``lru`` (last access), ``lfu`` (hits, then last access), ``slru`` (whether it has two hits, then last
            access), ``fifo`` (creation), ``mru`` or ``filo``, their opposites.
    """

    objects = False
    strategy: str = "lru"

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise UserError(f"SGLang has no strategy {self.strategy!r}; expected one of {', '.join(STRATEGIES)}")

    def priority(self, cache: PageCache, page: int) -> tuple:
        """Of a leaf; the smallest leaves."""
        last, created, uses = cache.last_use[page], cache.created[page], cache.uses[page]
        return {
            "lru": (last,),
            "lfu": (uses, last),
            "slru": (uses >= 2, last),
            "fifo": (created,),
            "mru": (-last,),
            "filo": (-created,),
        }[self.strategy]

    def rank(self, candidates: Candidates) -> np.ndarray:
        return -candidates.age
