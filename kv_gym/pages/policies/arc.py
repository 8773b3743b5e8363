"""ARC: two LRU lists, pages used once and pages used more often, whose sizes follow the hits of their ghosts.

Source: Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003, figure 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from kv_gym.pages.policies.base import PageQueue, QueuePolicy
from kv_gym.pages.requests import RequestTrace


@dataclass(eq=False)
class ARC(QueuePolicy):
    """Adaptive replacement; names as in the paper: T1, T2 cached, B1, B2 ghosts, p the target size of T1."""

    def start(self, capacity: int, trace: RequestTrace) -> None:
        self._capacity, self._p = capacity, 0.0
        self._t1, self._t2, self._b1, self._b2 = PageQueue(), PageQueue(), PageQueue(), PageQueue()
        self._from_b1 = self._from_b2 = False

    def hit(self, page: int) -> None:
        if page in self._t1:
            self._t2.push(page, self._t1.take(page))
        else:
            self._t2.move_to_end(page)

    def admits(self, page: int, size: int) -> bool:
        self._from_b1, self._from_b2 = page in self._b1, page in self._b2
        if self._from_b1:
            self._p = min(self._p + max(self._b2.total / self._b1.total, 1), self._capacity)
            self._b1.take(page)
        elif self._from_b2:
            self._p = max(self._p - max(self._b1.total / self._b2.total, 1), 0)
            self._b2.take(page)
        return True

    def evict(self, incoming: int, size: int) -> int:
        if not (self._from_b1 or self._from_b2):
            if self._t1.total + self._b1.total + size > self._capacity:
                if not self._b1:
                    return self._t1.pop_oldest()[0]
                self._b1.pop_oldest()
            elif self._b2 and sum(q.total for q in (self._t1, self._t2, self._b1, self._b2)) >= 2 * self._capacity:
                self._b2.pop_oldest()
        t1 = self._t1.total
        if (t1 > 0 and (t1 > self._p or (t1 == self._p and self._from_b2))) or not self._t2:
            page, of = self._t1.pop_oldest()
            self._b1.push(page, of)
        else:
            page, of = self._t2.pop_oldest()
            self._b2.push(page, of)
        return page

    def admit(self, page: int, size: int) -> None:
        (self._t2 if self._from_b1 or self._from_b2 else self._t1).push(page, size)

    def remove(self, page: int) -> None:
        (self._t1 if page in self._t1 else self._t2).take(page)
