"""W-TinyLFU: a small LRU window, and a segmented main cache that a page enters only if it is used more than its victim.

Source: Einziger, Friedman and Manes, "TinyLFU: A Highly Efficient Cache Admission Policy", ACM ToS 2017, section 4.
Differs from the paper in: use counts are exact numbers in a table and not a sketch; they are halved after ten times as
many accesses as pages fit, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

from kv_gym.pages.policies.base import PageQueue, QueuePolicy
from kv_gym.pages.requests import RequestTrace


@dataclass(eq=False)
class WTinyLFU(QueuePolicy):
    """Window, then probation and protected segments.

    Attributes:
        window: share of the capacity for the window.
        protected: share of the main cache for pages that were used in it.
    """

    window: float = 0.01
    protected: float = 0.8

    def start(self, capacity: int, trace: RequestTrace) -> None:
        self._window, self._probation, self._protected = PageQueue(), PageQueue(), PageQueue()
        self._window_limit = max(1, int(capacity * self.window))
        self._main_limit = capacity - self._window_limit
        self._protected_limit = int(self._main_limit * self.protected)
        self._uses: dict[int, int] = {}
        self._counted = self._stored = 0

    def _count(self, page: int) -> None:
        self._uses[page] = min(self._uses.get(page, 0) + 1, 15)
        self._counted += 1
        if self._counted >= 10 * max(self._stored, 1) and self._counted >= 1000:
            self._counted //= 2
            self._uses = {page: uses // 2 for page, uses in self._uses.items() if uses > 1}

    def hit(self, page: int) -> None:
        self._count(page)
        if page in self._window:
            self._window.move_to_end(page)
        elif page in self._protected:
            self._protected.move_to_end(page)
        else:
            self._protected.push(page, self._probation.take(page))
            while self._protected.total > self._protected_limit and len(self._protected) > 1:
                self._probation.push(*self._protected.pop_oldest())

    def admits(self, page: int, size: int) -> bool:
        self._count(page)
        return True

    def evict(self, incoming: int, size: int) -> int:
        self._stored = len(self._window) + len(self._probation) + len(self._protected)
        main = self._probation or self._protected
        if not self._window or (main and self._window.total + size <= self._window_limit):
            return main.pop_oldest()[0]
        newcomer = next(iter(self._window))
        if not main:
            return self._window.pop_oldest()[0]
        victim = next(iter(main))
        if self._uses.get(newcomer, 0) > self._uses.get(victim, 0):
            self._probation.push(*self._window.pop_oldest())
            main.take(victim)
            return victim
        return self._window.pop_oldest()[0]

    def admit(self, page: int, size: int) -> None:
        self._window.push(page, size)
        main = self._probation.total + self._protected.total
        while self._window.total > self._window_limit and len(self._window) > 1:
            oldest = next(iter(self._window.values()))
            if main + oldest > self._main_limit:
                break
            self._probation.push(*self._window.pop_oldest())
            main += oldest

    def remove(self, page: int) -> None:
        next(pages for pages in (self._window, self._probation, self._protected) if page in pages).take(page)
