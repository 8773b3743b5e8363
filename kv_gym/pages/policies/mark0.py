"""Mark0: marking with discard bits, in which a page that was thrown out wrongly is paid for by an old one.

Source: Antoniadis et al., ICML 2023, arXiv 2210.02775: (1, 2 H_k, 1)-competitive. The rule follows an independent
implementation; the paper's pseudo-code was not at hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kv_gym.pages.policies.base import PredictionPolicy
from kv_gym.pages.predictions import discard_bits
from kv_gym.pages.requests import RequestTrace


@dataclass(eq=False)
class Mark0(PredictionPolicy):
    """Randomised paging with discard bits."""

    stochastic = True

    def start(self, capacity: int, trace: RequestTrace) -> None:
        self._bits = self.predictions(discard_bits(trace, capacity), capacity, trace)
        self._random = np.random.default_rng([self.seed, 1])
        self._cached: set[int] = set()
        self._at_start: set[int] = set()  # cached when the phase began
        self._unvisited: set[int] = set()  # of those, neither asked for nor evicted since
        self._marked: set[int] = set()

    def _draw(self, pages: set[int]) -> int:
        return sorted(pages)[int(self._random.integers(len(pages)))]

    def hit(self, page: int) -> None:
        self._visit(page)

    def evict(self, incoming: int, size: int) -> int:
        if not self._unvisited:
            self._at_start, self._unvisited, self._marked = set(self._cached), set(self._cached), set()
        if incoming in self._at_start and self._unvisited:
            page = self._draw(self._unvisited)
        else:
            page = self._draw((self._cached - self._marked) or self._cached)
        self.remove(page)
        return page

    def admit(self, page: int, size: int) -> None:
        self._cached.add(page)
        self._visit(page)

    def _visit(self, page: int) -> None:
        self._unvisited.discard(page)
        self._marked.add(page)

    def discard(self, page: int) -> Iterable[int]:
        if not self._bits[self.now]:
            return ()
        self.remove(page)
        return (page,)

    def remove(self, page: int) -> None:
        self._cached.discard(page)
        self._unvisited.discard(page)
