"""The cache whose evictions a ranking policy or an agent decides: it stops wherever a page must leave."""

from __future__ import annotations

import heapq
from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np

from kv_gym.pages.requests import NEVER, RequestTrace

Priority = Callable[["PageCache", int], tuple]


class Candidates:
    """Pages of which one is to leave, the least recently used first, and what is known of them.

    Each attribute is computed when it is asked for: a decision costs what its policy looks at.

    Args:
        cache: where they are cached.
        pages: their numbers.

    Attributes:
        pages: K numbers.
        age: `[K]` float32 accesses since each was last used.
        gap: `[K]` float32 mean number of accesses between its uses (moving average), or its age where it had one use.
        hits: `[K]` float32 uses while it was cached, the first not counted.
        size: `[K]` float32 bytes, or 1.
        ttl: `[K]` float32 seconds until it expires; infinite where it does not.
        depth: `[K]` float32 place in the request that first asked for it, from 0.
        length: `[K]` float32 pages of the request that last used it.
        seen: `[K]` float32 how often it was asked for so far, also while it was not cached.
        period: `[K]` float32 accesses between its last two uses, also where it left between them; 0 after one use.
        next_use: `[K]` int64 next access, where the cache was made with ``future=True``.
        capacity: of the cache.
        access: number of the current access.
    """

    def __init__(self, cache: PageCache, pages: list[int]):
        self._cache, self.pages = cache, pages

    def __len__(self) -> int:
        return len(self.pages)

    @property
    def age(self) -> np.ndarray:  # noqa: D102
        now, last = self._cache.access, self._cache.last_use
        return np.array([now - last[page] for page in self.pages], np.float32)

    @property
    def gap(self) -> np.ndarray:  # noqa: D102
        gap = np.array([self._cache.gap[page] for page in self.pages], np.float32)
        return np.where(gap > 0, gap, self.age)

    @property
    def hits(self) -> np.ndarray:  # noqa: D102
        return np.array([self._cache.uses[page] for page in self.pages], np.float32)

    @property
    def size(self) -> np.ndarray:  # noqa: D102
        return np.array([self._cache.size[page] for page in self.pages], np.float32)

    @property
    def ttl(self) -> np.ndarray:  # noqa: D102
        return np.array([self._cache.seconds_left(page) for page in self.pages], np.float32)

    @property
    def depth(self) -> np.ndarray:  # noqa: D102
        return np.array([self._cache.depth[page] for page in self.pages], np.float32)

    @property
    def length(self) -> np.ndarray:  # noqa: D102
        return np.array([self._cache.length[page] for page in self.pages], np.float32)

    @property
    def seen(self) -> np.ndarray:  # noqa: D102
        return np.array([self._cache.seen[page] for page in self.pages], np.float32)

    @property
    def period(self) -> np.ndarray:  # noqa: D102
        return np.array([self._cache.period[page] for page in self.pages], np.float32)

    @property
    def capacity(self) -> int:  # noqa: D102
        return self._cache.capacity

    @property
    def access(self) -> int:  # noqa: D102
        return self._cache.access

    @property
    def next_use(self) -> np.ndarray:  # noqa: D102
        return np.array([self._cache.due[page] for page in self.pages])


class OldestLeaves:
    """Leaves in the order in which they became free, of which the oldest few are always at hand.

    A heap would give the oldest one; a list of the oldest `count` beside it gives all candidates of a decision without
    taking them out and putting them back.
    """

    def __init__(self, count: int):
        self._count = count
        self._number: dict[int, int] = {}  # leaves, and when they became free
        self._front: list[tuple[int, int]] = []  # the oldest, in order
        self._rest: list[tuple[int, int]] = []  # a heap of the others, with entries that are out of date

    def __bool__(self) -> bool:
        return bool(self._number)

    def add(self, page: int, number: int) -> None:
        """A page is a leaf now; `number` says when it became free."""
        self._number[page] = number
        if self._front and number < self._front[-1][0]:
            insort(self._front, (number, page))
            if len(self._front) > self._count:
                heapq.heappush(self._rest, self._front.pop())
        else:
            heapq.heappush(self._rest, (number, page))

    def remove(self, page: int) -> None:
        """A page is in use, or has a child, or has left; no matter if it was no leaf."""
        number = self._number.pop(page, None)
        if number is not None and self._front and number <= self._front[-1][0]:
            self._front.remove((number, page))

    def oldest(self) -> list[int]:
        """The oldest leaves, at most `count`."""
        while len(self._front) < self._count and self._rest:
            number, page = heapq.heappop(self._rest)
            if self._number.get(page) == number:
                self._front.append((number, page))
        return [page for _, page in self._front]


class PageCache:
    """A cache of pages in least-recently-used order, with what is known of each page.

    With ``semantics="objects"`` every access stands alone. With ``"prefix"`` a request is a chain: it hits up to its
    first page that is not cached; its pages are pinned while it is served; only leaves may leave, pages that no cached
    page continues; and a request that is longer than the cache keeps its head. After a request its pages become free
    in reverse order, so that tails leave before heads, as in vLLM.

    Args:
        trace: the requests.
        capacity: units, or bytes where the trace has sizes.
        semantics: ``objects`` or ``prefix``.
        candidates: how many pages a decision shows.
        future: whether candidates carry their next use.
        priority: for engines with a heap over all leaves: `(cache, page) -> tuple`, the smallest leaves; None: the
            least recently used pages are shown.

    Attributes:
        hits, hit_bytes: accesses, and bytes, served from the cache so far.
        served: accesses so far.
        evictions: pages that left so far.
        access: number of the current access.
        incoming: the page that room is made for.
        size: cached pages, and their sizes.
        last_use, uses, created, gap, length, depth, seen, period: of each page, as :class:`Candidates` has them.
        due: next use of each page, where the cache looks ahead.
    """

    def __init__(
        self,
        trace: RequestTrace,
        capacity: int,
        semantics: str = "objects",
        candidates: int = 16,
        future: bool = False,
        priority: Priority | None = None,
    ):
        self.trace, self.capacity, self.prefix = trace, capacity, semantics == "prefix"
        self.candidates, self._priority = candidates, priority
        lists = trace.lists
        self._pages, self._starts, self._sizes = lists["pages"], lists["starts"], lists.get("sizes")
        self._times = lists.get("times")
        self._ttl = lists.get("ttl") if self._times is not None else None
        self._next = lists["next_use"] if future or priority else None
        self.last_use, self.uses = [0] * trace.footprint, [0] * trace.footprint
        self.created, self.due = [0] * trace.footprint, [NEVER] * trace.footprint
        self.gap, self.length = [0.0] * trace.footprint, [1] * trace.footprint
        self.seen, self.period = [0] * trace.footprint, [0] * trace.footprint
        self.depth, self._parent = lists["depth"], list(lists["parents"])
        self.clear()

    def clear(self) -> None:
        """Empty the cache and its counters."""
        self.size: dict[int, int] = {}  # cached pages and their sizes
        # those that no request uses, least recently used first, each with a number that grows from one to the next
        self._free: OrderedDict[int, int] = OrderedDict()
        self._freed = 0
        self._leaves = OldestLeaves(self.candidates)  # of a prefix tree: free pages that no cached page continues
        self._children: dict[int, int] = {}  # cached pages that continue a page
        self._expires: dict[int, float] = {}
        self._heap: list[tuple[tuple, int]] = []
        self.used = self.hits = self.hit_bytes = self.served = self.served_bytes = self.evictions = self.access = 0
        self.incoming = -1

    def __contains__(self, page: int) -> bool:
        return page in self.size

    @property
    def content(self) -> list[int]:
        """Cached pages; those that no request uses stand in the order of their last use."""
        return list(self.size)

    def serve(self, start: int, stop: int) -> Iterator[None]:
        """Serve the requests from number `start` up to `stop`.

        Yields wherever a page must leave: before it goes on the caller calls :meth:`evict` with one of the pages that
        :meth:`shown` gives, or :meth:`decline`.
        """
        serve = self._serve_chain if self.prefix else self._serve_objects
        for request in range(start, stop):
            yield from serve(self._starts[request], self._starts[request + 1])

    # one request

    def _serve_objects(self, begin: int, end: int) -> Iterator[None]:
        for at in range(begin, end):
            page, size = self._pages[at], 1 if self._sizes is None else self._sizes[at]
            self.access = at
            self.served += 1
            self.served_bytes += size
            if page in self.size and not self._expired(page, at):
                self._count_hit(page)
                self._touch(page, at, 1)
                self._free.move_to_end(page)
            elif size <= self.capacity:
                self.incoming = page
                while self.used + size > self.capacity and self.incoming >= 0:
                    yield
                if self.incoming < 0:
                    continue
                self._store(page, size, at, 1)
                self._free[page] = 0

    def _serve_chain(self, begin: int, end: int) -> Iterator[None]:
        pages, length = self._pages[begin:end], end - begin
        self.served += length
        known = 0
        while known < length and pages[known] in self.size:
            known += 1
        for offset in range(known):
            page = pages[offset]
            self.access = begin + offset
            self._count_hit(page)
            self._touch(page, begin + offset, length)
            self._pin(page)
        self.served_bytes += length
        stored = known
        for offset in range(known, length):
            page = pages[offset]
            self.access = begin + offset
            if page in self.size:  # a page that stayed although one before it had left
                self._touch(page, begin + offset, length)
                self._pin(page)
            else:
                self.incoming = page
                while self.used + 1 > self.capacity and self.incoming >= 0 and self._leaves:
                    yield
                if self.used + 1 > self.capacity:
                    break  # all that is cached is in use by this request, or its tail was declined
                self._store(page, 1, begin + offset, length)
                if offset:
                    self._children[pages[offset - 1]] = self._children.get(pages[offset - 1], 0) + 1
                    self._parent[page] = pages[offset - 1]
            stored = offset + 1
        for offset in range(stored - 1, -1, -1):
            page = pages[offset]
            self._freed += 1
            self._free[page] = self._freed
            self._add_leaf(page)

    def _pin(self, page: int) -> None:
        if page in self._free:
            del self._free[page]
            self._leaves.remove(page)

    def _add_leaf(self, page: int) -> None:
        """Note that a page may leave, if it is free and no cached page continues it."""
        if page in self._free and not self._children.get(page):
            self._leaves.add(page, self._free[page])
            if self._priority is not None:
                heapq.heappush(self._heap, (self._priority(self, page), page))

    def _expired(self, page: int, at: int) -> bool:
        if self._ttl is None or self._times is None or self._times[at] < self._expires[page]:
            return False
        self._drop(page)
        return True

    def _count_hit(self, page: int) -> None:
        self.hits += 1
        self.hit_bytes += self.size[page]
        self.uses[page] += 1

    def _touch(self, page: int, at: int, length: int) -> None:
        gap = at - self.last_use[page]
        self.gap[page] = gap if not self.gap[page] else 0.5 * (self.gap[page] + gap)
        self.seen[page] += 1
        self.period[page] = gap
        self.last_use[page], self.length[page] = at, length
        if self._next is not None:
            self.due[page] = self._next[at]

    def _store(self, page: int, size: int, at: int, length: int) -> None:
        self.size[page] = size
        self.used += size
        self.uses[page], self.gap[page], self.created[page] = 0, 0.0, at
        if self.seen[page]:
            self.period[page] = at - self.last_use[page]
        self.seen[page] += 1
        self.last_use[page], self.length[page] = at, length
        if self._next is not None:
            self.due[page] = self._next[at]
        if self._ttl is not None and self._times is not None:
            self._expires[page] = self._times[at] + self._ttl[at]

    # decisions

    def shown(self) -> list[int]:
        """The candidates for eviction, the least recently used first; at most `candidates` of them."""
        if self._priority is not None:
            return [self._smallest()]
        return self._leaves.oldest() if self.prefix else list(islice(self._free, self.candidates))

    def _smallest(self) -> int:
        assert self._priority is not None
        while True:
            priority, page = self._heap[0]
            leaf = page in self._free and not self._children.get(page)
            if leaf and priority == self._priority(self, page):
                return page
            heapq.heappop(self._heap)

    def seconds_left(self, page: int) -> float:
        """Seconds until a cached page expires; infinite where it does not."""
        if self._times is None or page not in self._expires:
            return float("inf")
        return self._expires[page] - self._times[self.access]

    def evict(self, page: int) -> None:
        """Take out one of the pages that :meth:`shown` gave."""
        self.evictions += 1
        self._drop(page)

    def decline(self) -> None:
        """Store the page that is coming in not at all; of a prefix neither those behind it."""
        self.incoming = -1

    def _drop(self, page: int) -> None:
        del self._free[page]
        self._leaves.remove(page)
        self.used -= self.size.pop(page)
        self._expires.pop(page, None)
        if self.prefix and (parent := self._parent[page]) >= 0 and parent in self._children:
            self._children[parent] -= 1
            if not self._children[parent]:
                del self._children[parent]
                self._add_leaf(parent)
