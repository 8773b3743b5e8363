"""Flush: a page whose bit says that it will be evicted anyway is thrown out at once; on a miss without room all go.

Source: Antoniadis et al., ICML 2023, arXiv 2210.02775; the name is ours and the rule is reconstructed: it meets the
paper's bound (1, k - 1, 1) for deterministic algorithms.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kv_gym.pages.policies.base import PredictionPolicy
from kv_gym.pages.predictions import discard_bits
from kv_gym.pages.requests import RequestTrace


@dataclass(eq=False)
class Flush(PredictionPolicy):
    """Deterministic paging with discard bits."""

    def start(self, capacity: int, trace: RequestTrace) -> None:
        self._bits = self.predictions(discard_bits(trace, capacity), capacity, trace)
        self._cached: dict[int, None] = {}
        self._flushed: list[int] = []

    def hit(self, page: int) -> None:
        pass

    def evict(self, incoming: int, size: int) -> int:
        first, *self._flushed = self._cached  # the others leave after this access, before anybody sees them
        self._cached.clear()
        return first

    def admit(self, page: int, size: int) -> None:
        self._cached[page] = None

    def discard(self, page: int) -> Iterable[int]:
        gone, self._flushed = self._flushed, []
        if self._bits[self.now]:
            del self._cached[page]
            gone.append(page)
        return gone

    def remove(self, page: int) -> None:
        del self._cached[page]
