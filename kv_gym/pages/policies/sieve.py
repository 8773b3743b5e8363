"""SIEVE: a FIFO queue whose hand stays where it evicted, so that new pages must prove themselves quickly.

Source: Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from kv_gym.pages.policies.base import QueuePolicy
from kv_gym.pages.requests import RequestTrace

_END = -1


@dataclass(eq=False)
class Sieve(QueuePolicy):
    """One visited bit for each page; the hand moves from old to new, clears bits, and evicts where there is none."""

    def start(self, capacity: int, trace: RequestTrace) -> None:
        # a doubly linked list: _END is before the oldest and behind the newest
        self._newer: dict[int, int] = {_END: _END}
        self._older: dict[int, int] = {_END: _END}
        self._visited: set[int] = set()
        self._hand = _END

    def hit(self, page: int) -> None:
        self._visited.add(page)

    def evict(self, incoming: int, size: int) -> int:
        newer, visited = self._newer, self._visited
        page = self._hand if self._hand != _END else newer[_END]
        while page in visited:
            visited.discard(page)
            page = newer[page]
            if page == _END:
                page = newer[_END]
        self._hand = page
        self.remove(page)
        return page

    def admit(self, page: int, size: int) -> None:
        last = self._older[_END]
        self._newer[last], self._older[page] = page, last
        self._newer[page], self._older[_END] = _END, page

    def remove(self, page: int) -> None:
        newer, older = self._newer.pop(page), self._older.pop(page)
        self._newer[older], self._older[newer] = newer, older
        self._visited.discard(page)
        if self._hand == page:
            self._hand = newer
