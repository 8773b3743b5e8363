"""Belady's MIN: the page whose next use is farthest leaves. An oracle: the best that eviction can do on equal sizes.

Source: Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 1966. With
sizes it is a heuristic, and no bound.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from kv_gym.pages.policies.base import QueuePolicy
from kv_gym.pages.requests import RequestTrace


@dataclass(eq=False)
class Belady(QueuePolicy):
    """Farthest next use; among pages that never return, the least recently used.

    Attributes:
        bypass: a page whose next use is farther than that of every cached one is not stored.
    """

    needs_future = True
    bypass: bool = False

    def start(self, capacity: int, trace: RequestTrace) -> None:
        self._next = trace.next_use.tolist()
        self._due: dict[int, int] = {}
        self._heap: list[tuple[int, int, int]] = []
        self._capacity = capacity
        self._sizes: dict[int, int] = {}
        self._used = 0

    def _push(self, page: int) -> None:
        self._due[page] = due = self._next[self.now]
        heapq.heappush(self._heap, (-due, self.now, page))

    def _farthest(self) -> tuple[int, int]:
        """The next use of the page whose next use is farthest, and the page."""
        while True:
            due, _, page = self._heap[0]
            if self._due.get(page) == -due:
                return -due, page
            heapq.heappop(self._heap)

    def hit(self, page: int) -> None:
        self._push(page)

    def admits(self, page: int, size: int) -> bool:
        if not self.bypass:
            return True
        full = self._used + size > self._capacity
        return not (full and self._due and self._next[self.now] >= self._farthest()[0])

    def evict(self, incoming: int, size: int) -> int:
        page = self._farthest()[1]
        self.remove(page)
        return page

    def admit(self, page: int, size: int) -> None:
        if self.bypass:
            self._sizes[page] = size
            self._used += size
        self._push(page)

    def remove(self, page: int) -> None:
        del self._due[page]
        self._used -= self._sizes.pop(page, 0)
