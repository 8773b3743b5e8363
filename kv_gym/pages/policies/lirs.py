"""LIRS: pages whose last two uses lie close together stay; the others share one hundredth of the cache.

Source: Jiang and Zhang, "LIRS: An Efficient Low Inter-reference Recency Set Replacement Policy", SIGMETRICS 2002,
section 3. Differs from the paper in: pages of any size; the stack holds at most twice the capacity (the paper leaves
its length open).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from kv_gym.pages.policies.base import PageQueue, QueuePolicy
from kv_gym.pages.requests import RequestTrace


@dataclass(eq=False)
class LIRS(QueuePolicy):
    """Names as in the paper: stack S, queue Q, LIR pages (low inter-reference recency) and HIR pages.

    Attributes:
        hir: share of the capacity for resident HIR pages.
    """

    hir: float = 0.01

    def start(self, capacity: int, trace: RequestTrace) -> None:
        self._capacity = capacity
        self._hir_limit = max(1, int(capacity * self.hir))
        self._lir_limit = capacity - self._hir_limit
        self._stack = PageQueue()  # S, the oldest first: LIR pages, resident and ghost HIR pages
        self._queue = PageQueue()  # Q: resident HIR pages
        self._lir: set[int] = set()
        self._lir_size = 0
        self._ghosts: OrderedDict[int, None] = OrderedDict()  # HIR pages of S that are not cached, oldest first

    def _prune(self) -> None:
        """Take pages off the bottom of S until a LIR page lies there."""
        while self._stack and (page := next(iter(self._stack))) not in self._lir:
            self._stack.pop_oldest()
            self._ghosts.pop(page, None)

    def _limit_stack(self) -> None:
        while self._stack.total > 2 * self._capacity and self._ghosts:
            self._stack.take(self._ghosts.popitem(last=False)[0])

    def _promote(self, page: int, size: int) -> None:
        self._stack.push(page, size)
        self._lir.add(page)
        self._lir_size += size

    def _demote_bottom(self) -> None:
        """The oldest LIR page becomes a resident HIR page."""
        page, size = self._stack.pop_oldest()
        self._lir.discard(page)
        self._lir_size -= size
        self._queue.push(page, size)
        self._prune()

    def hit(self, page: int) -> None:
        if page in self._lir:
            self._stack.move_to_end(page)
            self._prune()
        elif page in self._stack:
            size = self._queue.take(page)
            self._stack.take(page)
            self._promote(page, size)
            while self._lir_size > self._lir_limit:
                self._demote_bottom()
        else:
            self._queue.move_to_end(page)
            self._stack.push(page, self._queue[page])
        self._limit_stack()

    def evict(self, incoming: int, size: int) -> int:
        if not self._queue:
            self._demote_bottom()
        page, _ = self._queue.pop_oldest()
        if page in self._stack:
            self._ghosts[page] = None
        return page

    def admit(self, page: int, size: int) -> None:
        if page in self._stack:  # a ghost: its last two uses lie close together
            self._stack.take(page)
            del self._ghosts[page]
            self._promote(page, size)
            while self._lir_size > self._lir_limit:
                self._demote_bottom()
        elif self._lir_size + size <= self._lir_limit:
            self._promote(page, size)
        else:
            self._stack.push(page, size)
            self._queue.push(page, size)
        self._limit_stack()

    def remove(self, page: int) -> None:
        if page in self._stack:
            size = self._stack.take(page)
            if page in self._lir:
                self._lir.discard(page)
                self._lir_size -= size
                self._prune()
        if page in self._queue:
            self._queue.take(page)
