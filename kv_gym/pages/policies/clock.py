"""CLOCK: FIFO in which a page that was used since the hand last passed gets a second round.

Source: Corbató, "A paging experiment with the Multics system", 1968.
"""

from __future__ import annotations

from dataclasses import dataclass

from kv_gym.pages.policies.base import PageQueue, QueuePolicy
from kv_gym.pages.requests import RequestTrace


@dataclass(eq=False)
class Clock(QueuePolicy):
    """Second chance with one bit for each page."""

    def start(self, capacity: int, trace: RequestTrace) -> None:
        self._queue = PageQueue()
        self._used: set[int] = set()

    def hit(self, page: int) -> None:
        self._used.add(page)

    def evict(self, incoming: int, size: int) -> int:
        while True:
            page, size_of = self._queue.pop_oldest()
            if page not in self._used:
                return page
            self._used.discard(page)
            self._queue.push(page, size_of)

    def admit(self, page: int, size: int) -> None:
        self._queue.push(page, size)

    def remove(self, page: int) -> None:
        self._queue.take(page)
        self._used.discard(page)
