"""2Q: a FIFO queue for new pages, a ghost queue behind it, and an LRU list for pages that came back from the ghosts.

Source: Johnson and Shasha, "2Q: A Low Overhead High Performance Buffer Management Replacement Algorithm", VLDB 1994,
figure 2 (the full version).
"""

from __future__ import annotations

from dataclasses import dataclass

from kv_gym.pages.policies.base import PageQueue, QueuePolicy
from kv_gym.pages.requests import RequestTrace


@dataclass(eq=False)
class TwoQ(QueuePolicy):
    """Names as in the paper: A1in and Am are cached, A1out remembers.

    Attributes:
        a1in, a1out: their sizes as shares of the capacity (a quarter and a half in the paper).
    """

    a1in: float = 0.25
    a1out: float = 0.5

    def start(self, capacity: int, trace: RequestTrace) -> None:
        self._a1in, self._a1out, self._am = PageQueue(), PageQueue(), PageQueue()
        self._in_limit, self._out_limit = int(capacity * self.a1in), int(capacity * self.a1out)
        self._returns = False

    def hit(self, page: int) -> None:
        if page in self._am:
            self._am.move_to_end(page)

    def admits(self, page: int, size: int) -> bool:
        self._returns = page in self._a1out
        if self._returns:
            self._a1out.take(page)
        return size <= self._in_limit or self._in_limit == 0

    def evict(self, incoming: int, size: int) -> int:
        if self._a1in.total > self._in_limit or not self._am:
            page, of = self._a1in.pop_oldest()
            if of <= self._out_limit:
                self._a1out.trim(self._out_limit - of)
                self._a1out.push(page, of)
            return page
        return self._am.pop_oldest()[0]

    def admit(self, page: int, size: int) -> None:
        (self._am if self._returns else self._a1in).push(page, size)

    def remove(self, page: int) -> None:
        (self._a1in if page in self._a1in else self._am).take(page)
