"""Mark0: marking with discard bits, in which a page that was thrown out wrongly is paid for by an old one.

Source: Antoniadis et al., ICML 2023, arXiv 2210.02775: (1, 2 H_k, 1)-competitive. The rule follows an independent
implementation; the paper's pseudo-code was not at hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kv_gym.pages.policies.base import QueuePolicy
from kv_gym.pages.predictions import discard_bits, predicted_bits
from kv_gym.pages.requests import RequestTrace


@dataclass(eq=False)
class Mark0(QueuePolicy):
    """Randomised paging with discard bits; for pages of equal size.

    Attributes:
        predictor: see :func:`~kv_gym.pages.predictions.predicted_bits`.
        flip: share of bits turned over.
        seed: of the draws and of what is turned over.
    """

    needs_future = True
    stochastic = True
    predictor: str = "oracle"
    flip: float = 0.0
    seed: int = 0

    def start(self, capacity: int, trace: RequestTrace) -> None:
        bits = discard_bits(trace, capacity)
        self._bits = predicted_bits(bits, trace, capacity, self.predictor, self.flip, self.seed).tolist()
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
