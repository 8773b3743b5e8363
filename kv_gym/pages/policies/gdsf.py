"""GDSF: pages leave by uses over size, aged by the value at which the last one left.

Source: Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP 1998.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from kv_gym.pages.policies.base import QueuePolicy
from kv_gym.pages.requests import RequestTrace


@dataclass(eq=False)
class GDSF(QueuePolicy):
    """Greedy dual with size and frequency, every miss at equal cost."""

    def start(self, capacity: int, trace: RequestTrace) -> None:
        self._heap: list[tuple[float, int, int]] = []
        self._entry: dict[int, tuple[float, int]] = {}
        self._pages: dict[int, list[int]] = {}  # uses and size
        self._clock = 0.0

    def _push(self, page: int) -> None:
        uses, size = self._pages[page]
        self._entry[page] = entry = (self._clock + 1e6 * uses / max(size, 1), self.now)
        heapq.heappush(self._heap, (*entry, page))

    def hit(self, page: int) -> None:
        self._pages[page][0] += 1
        self._push(page)

    def evict(self, incoming: int, size: int) -> int:
        while True:
            value, at, page = heapq.heappop(self._heap)
            if self._entry.get(page) == (value, at):  # else the entry is out of date
                self._clock = value
                self.remove(page)
                return page

    def admit(self, page: int, size: int) -> None:
        self._pages[page] = [1, size]
        self._push(page)

    def remove(self, page: int) -> None:
        del self._pages[page], self._entry[page]
