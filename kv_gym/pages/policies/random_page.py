"""Random eviction: a page drawn evenly from all that are cached leaves. The null hypothesis. No paper."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kv_gym.pages.policies.base import QueuePolicy
from kv_gym.pages.requests import RequestTrace


@dataclass(eq=False)
class RandomPage(QueuePolicy):
    """Draws the page that leaves.

    Attributes:
        seed: of the draws.
    """

    stochastic = True
    seed: int = 0

    def start(self, capacity: int, trace: RequestTrace) -> None:
        self._random = np.random.default_rng(self.seed)
        self._pages: list[int] = []
        self._place: dict[int, int] = {}

    def hit(self, page: int) -> None:
        pass

    def evict(self, incoming: int, size: int) -> int:
        page = self._pages[int(self._random.integers(len(self._pages)))]
        self.remove(page)
        return page

    def admit(self, page: int, size: int) -> None:
        self._place[page] = len(self._pages)
        self._pages.append(page)

    def remove(self, page: int) -> None:
        at, last = self._place.pop(page), self._pages.pop()
        if last != page:
            self._pages[at], self._place[last] = last, at
