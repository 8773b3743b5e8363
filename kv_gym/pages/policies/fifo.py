"""FIFO: the page that has been stored longest leaves. No paper."""

from __future__ import annotations

from dataclasses import dataclass

from kv_gym.pages.policies.base import PageQueue, QueuePolicy
from kv_gym.pages.requests import RequestTrace


@dataclass(eq=False)
class FIFO(QueuePolicy):
    """First in, first out."""

    def start(self, capacity: int, trace: RequestTrace) -> None:
        self._queue = PageQueue()

    def hit(self, page: int) -> None:
        pass

    def evict(self, incoming: int, size: int) -> int:
        return self._queue.pop_oldest()[0]

    def admit(self, page: int, size: int) -> None:
        self._queue.push(page, size)

    def remove(self, page: int) -> None:
        self._queue.take(page)
