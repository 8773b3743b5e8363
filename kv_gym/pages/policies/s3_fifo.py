"""S3-FIFO: new pages wait in a small queue, and only those used again move to the main one; a ghost queue remembers.

Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, section 4.
Differs from the paper in: nothing known; a page that is larger than the small queue is not stored, as in libCacheSim.
"""

from __future__ import annotations

from dataclasses import dataclass

from kv_gym.pages.policies.base import PageQueue, QueuePolicy
from kv_gym.pages.requests import RequestTrace


@dataclass(eq=False)
class S3FIFO(QueuePolicy):
    """Three FIFO queues.

    Attributes:
        small: share of the capacity for the small queue.
        ghost: numbers of evicted pages that are remembered, as a share of the capacity.
        uses: uses in the small queue that take a page to the main one.
    """

    small: float = 0.1
    ghost: float = 0.9
    uses: int = 2

    def start(self, capacity: int, trace: RequestTrace) -> None:
        self._small, self._main, self._ghost = PageQueue(), PageQueue(), PageQueue()
        self._small_limit = int(capacity * self.small)
        self._main_limit, self._ghost_limit = capacity - self._small_limit, int(capacity * self.ghost)
        self._used: dict[int, int] = {}
        self._returns = self._full = False

    def hit(self, page: int) -> None:
        self._used[page] += 1

    def admits(self, page: int, size: int) -> bool:
        self._returns = page in self._ghost
        if self._returns:
            self._ghost.take(page)
        return size <= self._small_limit or self._small_limit == 0

    def evict(self, incoming: int, size: int) -> int:
        self._full = True
        while True:
            if self._main.total > self._main_limit or not self._small:
                if (page := self._evict_main()) is not None:
                    return page
            elif (page := self._evict_small()) is not None:
                return page

    def _evict_small(self) -> int | None:
        while self._small:
            page, size = self._small.pop_oldest()
            if self._used[page] < self.uses:
                del self._used[page]
                if size <= self._ghost_limit:
                    self._ghost.trim(self._ghost_limit - size)
                    self._ghost.push(page, size)
                return page
            self._used[page] = 0
            self._main.push(page, size)
        return None

    def _evict_main(self) -> int | None:
        while self._main:
            page, size = self._main.pop_oldest()
            if not (used := self._used[page]):
                del self._used[page]
                return page
            self._used[page] = min(used, 3) - 1
            self._main.push(page, size)
        return None

    def admit(self, page: int, size: int) -> None:
        self._used[page] = 0
        # until the cache is full for the first time the small queue is not overfilled
        filling = not self._full and self._small.total >= self._small_limit
        (self._main if self._returns or filling else self._small).push(page, size)

    def remove(self, page: int) -> None:
        (self._small if page in self._small else self._main).take(page)
        del self._used[page]
