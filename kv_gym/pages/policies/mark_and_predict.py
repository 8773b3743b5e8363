"""Mark&Predict: marking, in which unmarked pages that are predicted to be idle in the next phase leave first.

Source: Antoniadis et al., ICML 2023, arXiv 2210.02775: (2, H_k, 1)-competitive and O(log k)-robust. The rule follows an
independent implementation; the paper's pseudo-code was not at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kv_gym.pages.policies.base import PredictionPolicy
from kv_gym.pages.predictions import phase_bits
from kv_gym.pages.requests import RequestTrace


@dataclass(eq=False)
class MarkAndPredict(PredictionPolicy):
    """Randomised marking with phase bits; with constant bits it is random marking."""

    stochastic = True

    def start(self, capacity: int, trace: RequestTrace) -> None:
        self._bits = self.predictions(phase_bits(trace, capacity), capacity, trace)
        self._random = np.random.default_rng([self.seed, 1])
        self._idle: dict[int, bool] = {}  # cached pages and their latest bit
        # unmarked pages with bit 1 and with bit 0, as lists from which one is drawn and swapped out in constant time
        self._unmarked: tuple[list[int], list[int]] = ([], [])
        self._place: dict[int, tuple[int, int]] = {}

    def _mark(self, page: int) -> None:
        if page in self._place:
            which, at = self._place.pop(page)
            last = self._unmarked[which].pop()
            if last != page:
                self._unmarked[which][at], self._place[last] = last, (which, at)
        self._idle[page] = self._bits[self.now]

    def hit(self, page: int) -> None:
        self._mark(page)

    def evict(self, incoming: int, size: int) -> int:
        if not self._place:
            for page, idle in self._idle.items():
                which = 0 if idle else 1
                self._place[page] = (which, len(self._unmarked[which]))
                self._unmarked[which].append(page)
        drawn = self._unmarked[0] or self._unmarked[1]
        page = drawn[int(self._random.integers(len(drawn)))]
        self.remove(page)
        return page

    def admit(self, page: int, size: int) -> None:
        self._mark(page)

    def remove(self, page: int) -> None:
        self._mark(page)
        del self._idle[page]
