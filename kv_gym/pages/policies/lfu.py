"""LFU: the page with the fewest uses since it was stored leaves; among equals the least recently used. No paper."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from kv_gym.pages.policies.base import QueuePolicy
from kv_gym.pages.requests import RequestTrace


@dataclass(eq=False)
class PageLFU(QueuePolicy):
    """Least frequently used, counted while cached, in constant time per access."""

    def start(self, capacity: int, trace: RequestTrace) -> None:
        self._uses: dict[int, int] = {}
        self._by_uses: dict[int, OrderedDict[int, None]] = {}
        self._fewest = 1

    def hit(self, page: int) -> None:
        uses = self._uses[page]
        same = self._by_uses[uses]
        del same[page]
        if not same:
            del self._by_uses[uses]
            if self._fewest == uses:
                self._fewest = uses + 1
        self._uses[page] = uses + 1
        self._by_uses.setdefault(uses + 1, OrderedDict())[page] = None

    def evict(self, incoming: int, size: int) -> int:
        if self._fewest not in self._by_uses:
            self._fewest = min(self._by_uses)
        page = next(iter(self._by_uses[self._fewest]))
        self.remove(page)
        return page

    def admit(self, page: int, size: int) -> None:
        self._uses[page] = self._fewest = 1
        self._by_uses.setdefault(1, OrderedDict())[page] = None

    def remove(self, page: int) -> None:
        uses = self._uses.pop(page)
        same = self._by_uses[uses]
        del same[page]
        if not same:
            del self._by_uses[uses]
