"""SLRU: new pages enter the lowest of several LRU segments and rise by one at every use.

Source: Karedla, Love and Wherry, "Caching strategies to improve disk system performance", IEEE Computer 1994.
"""

from __future__ import annotations

from dataclasses import dataclass

from kv_gym.pages.policies.base import PageQueue, QueuePolicy
from kv_gym.pages.requests import RequestTrace


@dataclass(eq=False)
class SLRU(QueuePolicy):
    """Segmented LRU.

    Attributes:
        segments: how many there are, of equal size.
    """

    segments: int = 4

    def start(self, capacity: int, trace: RequestTrace) -> None:
        self._lists = [PageQueue() for _ in range(self.segments)]
        self._limit = max(1, capacity // self.segments)

    def _segment(self, page: int) -> int:
        return next(i for i, pages in enumerate(self._lists) if page in pages)

    def hit(self, page: int) -> None:
        at = self._segment(page)
        if at == self.segments - 1:
            self._lists[at].move_to_end(page)
            return
        size = self._lists[at].take(page)
        self._lists[at + 1].push(page, size)
        for i in range(at + 1, 0, -1):  # what does not fit falls by one segment
            while self._lists[i].total > self._limit:
                self._lists[i - 1].push(*self._lists[i].pop_oldest())

    def evict(self, incoming: int, size: int) -> int:
        return next(pages for pages in self._lists if pages).pop_oldest()[0]

    def admit(self, page: int, size: int) -> None:
        lowest = next((i for i, pages in enumerate(self._lists) if pages.total + size <= self._limit), 0)
        self._lists[lowest].push(page, size)

    def remove(self, page: int) -> None:
        self._lists[self._segment(page)].take(page)
