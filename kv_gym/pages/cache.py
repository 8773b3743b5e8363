"""The cache whose evictions a ranking policy or an agent decides: it stops wherever a page must leave."""

from __future__ import annotations

import heapq
import random
from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Protocol, cast

import numpy as np

from kv_gym.errors import UserError
from kv_gym.pages.requests import NEVER, RequestTrace

Priority = Callable[["PageCache", int], tuple]


class CandidateOrder(Protocol):
    """Names the pages that become candidates; it is told of all that happens to the cache."""

    def start(self, count: int, capacity: int, trace: RequestTrace) -> None:
        """Begin with an empty cache of some capacity, for so many candidates."""

    def hit(self, page: int) -> None:
        """A cached page is asked for."""

    def miss(self, page: int, size: int) -> None:
        """A page that is not cached is asked for."""

    def store(self) -> None:
        """The page that missed is stored."""

    def next(self) -> list[int]:
        """The candidates, the first first."""

    def remove(self, page: int) -> None:
        """A page has left."""


_NAMES = (
    "last_use", "uses", "created", "gap", "length", "seen", "period", "previous", "often", "steady", "behind", "known",
    "turn", "pace", "depth",
)  # fmt: skip
COLUMNS = {name: place for place, name in enumerate(_NAMES)}
"""Columns of :attr:`PageCache.table` by name."""

HALF_LIVES = {"often": 1_000.0, "steady": 30_000.0}  # accesses after which a use counts half
_DECAYING = slice(COLUMNS["often"], COLUMNS["steady"] + 1)
_NEIGHBOURS = np.concatenate((-np.arange(1, 17), np.arange(1, 17)))  # accesses around a page's last use
_RATES = -1 / np.array(list(HALF_LIVES.values()))


class Candidates:
    """Pages of which one is to leave, the least recently used first, and what is known of them.

    Args:
        cache: where they are cached.
        pages: their numbers.

    Attributes:
        pages: K numbers.
        columns: `[K, columns]` float64, what the cache has noted of each, by :data:`COLUMNS`, read in one go.
        age: `[K]` accesses since each was last used.
        gap: `[K]` mean number of accesses between its uses (moving average), or its age where it had one use.
        hits: `[K]` uses while it was cached, the first not counted.
        size: `[K]` bytes, or 1.
        ttl: `[K]` seconds until it expires; infinite where it does not.
        depth: `[K]` place in the request that first asked for it, from 0.
        length: `[K]` pages of the request that last used it.
        seen: `[K]` how often it was asked for so far, also while it was not cached.
        period: `[K]` accesses between its last two uses, also where it left between them; a million after one use.
        next_use: `[K]` int64 next access, where the cache was made with ``future=True``.
        capacity: of the cache.
        access: number of the current access.
    """

    def __init__(self, cache: PageCache, pages: list[int]):
        self.cache, self.pages = cache, pages
        # made when they are first asked for; functools.cached_property takes a lock, longer than all of this
        self._places = self._columns = self._age = self._decayed = self._returned = cast(np.ndarray, None)

    def __len__(self) -> int:
        return len(self.pages)

    @property
    def columns(self) -> np.ndarray:  # noqa: D102
        if self._columns is None:
            self._places = np.array(self.pages)
            self._columns = self.cache.table.take(self._places, 0)
        return self._columns

    def column(self, name: str) -> np.ndarray:
        """`[K]` float64, one of :data:`COLUMNS`."""
        return self.columns[:, COLUMNS[name]]

    @property
    def age(self) -> np.ndarray:  # noqa: D102
        if self._age is None:
            self._age = self.cache.access - self.columns[:, 0]
        return self._age

    @property
    def gap(self) -> np.ndarray:  # noqa: D102
        gap = self.column("gap")
        return np.where(gap, gap, self.age)

    @property
    def hits(self) -> np.ndarray:  # noqa: D102
        return self.column("uses")

    @property
    def size(self) -> np.ndarray:  # noqa: D102
        return np.array([self.cache.size[page] for page in self.pages], float)

    @property
    def ttl(self) -> np.ndarray:  # noqa: D102
        return np.array([self.cache.seconds_left(page) for page in self.pages])

    @property
    def depth(self) -> np.ndarray:  # noqa: D102
        return self.column("depth")

    @property
    def length(self) -> np.ndarray:  # noqa: D102
        return self.column("length")

    @property
    def seen(self) -> np.ndarray:  # noqa: D102
        return self.column("seen")

    @property
    def period(self) -> np.ndarray:  # noqa: D102
        return self.column("period")

    @property
    def parent_age(self) -> np.ndarray:
        """`[K]` accesses since the page before each in its chain was used; its own age where there is none."""
        last_use = self.columns[:, 0]
        parents = self.cache.parents.take(self._places)
        last = self.cache.table.take(parents, 0, mode="wrap")[:, 0]  # -1 reads the last row, which is not used
        return self.cache.access - np.where(parents < 0, last_use, last)

    @property
    def predecessor_age(self) -> np.ndarray:
        """`[K]` accesses since that page was used which had been asked for just before each one's last use."""
        before = self.cache.trace.pages.take(np.maximum(self.columns[:, 0].astype(np.int64) - 1, 0))
        return self.cache.access - self.cache.table.take(before, 0)[:, 0]

    @property
    def returned(self) -> np.ndarray:
        """`[K, 2]` accesses since any of its neighbours was asked for again; a million where none was.

        A page's neighbours are the pages asked for just before its last use, at most 16, and those just after it.
        """
        if self._returned is None:
            trace, now, last_use = self.cache.trace.pages, self.access, self.columns[:, :1].astype(np.int64)
            at = last_use + _NEIGHBOURS
            used = self.cache.table[:, 0].take(trace.take(np.clip(at, 0, now)))
            again = (used > np.maximum(at, last_use)) & (at >= 0) & (at < now)
            ages = np.where(again, now - used, 1e6)
            self._returned = ages.reshape(len(self), 2, -1).min(2)
        return self._returned

    @property
    def decayed(self) -> np.ndarray:
        """`[K, 2]` uses of which those long ago count less, now: `often` and `steady` of :data:`HALF_LIVES`."""
        if self._decayed is None:
            self._decayed = self.columns[:, _DECAYING] * np.exp2(self.age[:, None] * _RATES)
        return self._decayed

    @property
    def capacity(self) -> int:  # noqa: D102
        return self.cache.capacity

    @property
    def access(self) -> int:  # noqa: D102
        return self.cache.access

    @property
    def next_use(self) -> np.ndarray:  # noqa: D102
        return np.array([self.cache.due[page] for page in self.pages])


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


def check_drawn(drawn: int, candidates: int) -> None:
    """Refuse to draw all candidates, or less than none.

    Raises:
        UserError: as said.
    """
    if not 0 <= drawn < candidates:
        raise UserError(f"{drawn} of {candidates} candidates cannot be drawn; expected 0 to {candidates - 1}")


class DrawnPages:
    """Pages that may leave, of which any few can be drawn at random at the cost of these few."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)
        self._pages: list[int] = []
        self._places: dict[int, int] = {}

    def add(self, page: int) -> None:
        """A page may leave; no matter if it might before."""
        if page not in self._places:
            self._places[page] = len(self._pages)
            self._pages.append(page)

    def remove(self, page: int) -> None:
        """A page may leave no longer; no matter if it might not before."""
        place = self._places.pop(page, None)
        if place is not None:
            last = self._pages.pop()
            if last != page:
                self._pages[place] = last
                self._places[last] = place

    def draw(self, count: int) -> list[int]:
        """Pages drawn with replacement."""
        pages, total, draw = self._pages, len(self._pages), self._random.random
        return [pages[int(draw() * total)] for _ in range(count)]


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
        drawn: how many of these are drawn at random from all pages that may leave, at most, rather than taken from
            the least recently used: so that pages which are not worth their place can leave before they are old.
        seed: of what is drawn.
        future: whether candidates carry their next use.
        priority: for engines with a heap over all leaves: `(cache, page) -> tuple`, the smallest leaves; None: the
            least recently used pages are shown.
        order: shows the pages that a classic policy would evict next instead of the least recently used; for objects.

    Raises:
        UserError: not one candidate that is least recently used, or prefixes with an `order`.

    Attributes:
        hits, hit_bytes: accesses, and bytes, served from the cache so far.
        found: `[accesses]` bytes, 1 for each of these accesses.
        served: accesses so far.
        evictions: pages that left so far.
        access: number of the current access.
        incoming: the page that room is made for.
        leave_to_lru: whether the least recently used page alone is shown; a policy may set it to let LRU stand in.
        size: cached pages, and their sizes.
        table: `[footprint, columns]` float64, what is noted of every page, by :data:`COLUMNS`: access of its last use,
            uses while it was cached, access at which it was stored, moving mean of the accesses between uses, pages of
            the request that last used it, requests for it, accesses between its last two uses and between the two
            before, uses of which those long ago count less, with half-lives of 1,000 and 30,000 accesses; of the
            request that last used it: its pages behind this one, how many of its first pages were known, its turn (one
            more than that of the request that first brought the last known page) and the accesses since that page was
            used; place in the request that first asked for it.
        last_use, uses, created: columns of the table, of which single entries are read and written fast.
        parents: `[footprint]` int64, the page before each one in the chain it was stored with, or -1.
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
        drawn: int = 0,
        seed: int = 0,
        order: CandidateOrder | None = None,
    ):
        self.trace, self.capacity, self.prefix = trace, capacity, semantics == "prefix"
        check_drawn(drawn, candidates)
        if order is not None and self.prefix:
            raise UserError(
                "the order of a queue policy is one of single pages: choose order=lru or semantics='objects'"
            )
        self.candidates, self._priority, self._order = candidates, priority, order
        self._oldest, self._drawn, self._seed = candidates - drawn, drawn, seed
        lists = trace.lists
        self._pages, self._starts, self._sizes = lists["pages"], lists["starts"], lists.get("sizes")
        self._times = lists.get("times")
        self._ttl = lists.get("ttl") if self._times is not None else None
        self._next = lists["next_use"] if future or priority else None
        self.table = np.zeros((trace.footprint, len(COLUMNS)))  # what is noted of a page lies side by side
        self.table[:, COLUMNS["depth"]] = trace.depth
        self.table[:, COLUMNS["length"]], self.table[:, COLUMNS["period"]] = 1, 1e6
        columns: Any = self.table.T  # NumPy's stubs do not say that an array is a buffer
        of: dict[str, Any] = {name: memoryview(column) for name, column in zip(_NAMES, columns, strict=True)}
        self.last_use, self.uses, self.created, self._seen = (of[n] for n in ("last_use", "uses", "created", "seen"))
        self._gap, self._period, self._previous = of["gap"], of["period"], of["previous"]
        self._often, self._steady = of["often"], of["steady"]
        self._length, self._behind, self._known = of["length"], of["behind"], of["known"]
        self._turn, self._pace = of["turn"], of["pace"]
        self.due = [NEVER] * trace.footprint
        self.parents = trace.parents.copy()
        parents: Any = self.parents
        self._parent: Any = memoryview(parents)
        self.clear()

    def clear(self) -> None:
        """Empty the cache and its counters."""
        self.size: dict[int, int] = {}  # cached pages and their sizes
        # those that no request uses, least recently used first, each with a number that grows from one to the next
        self._free: OrderedDict[int, int] = OrderedDict()
        self._freed = 0
        self._leaves = OldestLeaves(self._oldest)  # of a prefix tree: free pages that no cached page continues
        self._any = DrawnPages(self._seed) if self._drawn else None  # all that may leave
        self._children: dict[int, int] = {}  # cached pages that continue a page
        self._expires: dict[int, float] = {}
        self._heap: list[tuple[tuple, int]] = []
        self.used = self.hits = self.hit_bytes = self.served = self.served_bytes = self.evictions = self.access = 0
        self.incoming = -1
        self.leave_to_lru = False
        self.found = bytearray(len(self.trace))
        if self._order is not None:
            self._order.start(self._oldest, self.capacity, self.trace)

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
                self._note(page, at)
                self._free.move_to_end(page)
                if self._order is not None:
                    self._order.hit(page)
            elif size <= self.capacity:
                self.incoming = page
                if self._order is not None:
                    self._order.miss(page, size)
                while self.used + size > self.capacity and self.incoming >= 0:
                    yield
                if self.incoming < 0:
                    continue
                self._store(page, size, at)
                self._free[page] = 0
                if self._order is not None:
                    self._order.store()
                if self._any is not None:
                    self._any.add(page)

    def _serve_chain(self, begin: int, end: int) -> Iterator[None]:
        pages, length = self._pages[begin:end], end - begin
        self.served += length
        known = 0
        while known < length and pages[known] in self.size:
            known += 1
        request = self._describe_request(pages, begin)
        for offset in range(known):
            page = pages[offset]
            self.access = begin + offset
            self._count_hit(page)
            self._note(page, begin + offset)
            self._note_request(page, offset, request)
            self._pin(page)
        self.served_bytes += length
        stored = known
        for offset in range(known, length):
            page = pages[offset]
            self.access = begin + offset
            if page in self.size:  # a page that stayed although one before it had left
                self._note(page, begin + offset)
                self._note_request(page, offset, request)
                self._pin(page)
            else:
                self.incoming = page
                while self.used + 1 > self.capacity and self.incoming >= 0 and self._leaves:
                    yield
                if self.used + 1 > self.capacity:
                    break  # all that is cached is in use by this request, or its tail was declined
                self._store(page, 1, begin + offset)
                self._note_request(page, offset, request)
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
            self._remove_leaf(page)

    def _remove_leaf(self, page: int) -> None:
        self._leaves.remove(page)
        if self._any is not None:
            self._any.remove(page)

    def _add_leaf(self, page: int) -> None:
        """Note that a page may leave, if it is free and no cached page continues it."""
        if page in self._free and not self._children.get(page):
            self._leaves.add(page, self._free[page])
            if self._any is not None:
                self._any.add(page)
            if self._priority is not None:
                heapq.heappush(self._heap, (self._priority(self, page), page))

    def _expired(self, page: int, at: int) -> bool:
        if self._ttl is None or self._times is None or self._times[at] < self._expires[page]:
            return False
        self._drop(page)
        return True

    def _count_hit(self, page: int) -> None:
        self.hits += 1
        self.found[self.access] = 1
        self.hit_bytes += self.size[page]
        self.uses[page] += 1

    def _note(self, page: int, at: int) -> None:
        """Note that a cached page is used."""
        gap = at - self.last_use[page]
        mean = self._gap[page]
        self._gap[page] = 0.5 * (mean + gap) if mean else gap
        self._note_access(page, at)

    def _store(self, page: int, size: int, at: int) -> None:
        self.size[page] = size
        self.used += size
        self.uses[page], self._gap[page], self.created[page] = 0, 0.0, at
        self._note_access(page, at)
        if self._ttl is not None and self._times is not None:
            self._expires[page] = self._times[at] + self._ttl[at]

    def _note_access(self, page: int, at: int) -> None:
        """Note what is known of a page whether or not it was cached."""
        gap = at - self.last_use[page]
        if self._seen[page]:
            self._previous[page], self._period[page] = self._period[page], gap
        self._seen[page] += 1
        self._often[page] = 1 + self._often[page] * 0.5 ** (gap / HALF_LIVES["often"])
        self._steady[page] = 1 + self._steady[page] * 0.5 ** (gap / HALF_LIVES["steady"])
        self.last_use[page] = at
        if self._next is not None:
            self.due[page] = self._next[at]

    def _describe_request(self, pages: list[int], at: int) -> tuple[int, int, float, float]:
        """Of a chain: its length, how many of its first pages were asked for before, its turn and its pace."""
        known = 0
        while known < len(pages) and self._seen[pages[known]]:
            known += 1
        if not known:
            return len(pages), 0, 1.0, 0.0
        last = pages[known - 1]
        return len(pages), known, self._turn[last] + 1, at + known - 1 - self.last_use[last]

    def _note_request(self, page: int, place: int, request: tuple[int, int, float, float]) -> None:
        """Note the request that used a page."""
        length, known, turn, pace = request
        self._length[page], self._behind[page] = length, length - 1 - place
        self._known[page], self._pace[page] = known, pace
        if not self._turn[page]:  # of the request that first brought it
            self._turn[page] = turn

    # decisions

    def shown(self) -> list[int]:
        """The candidates for eviction, at most `candidates`: the least recently used first, then those drawn."""
        if self._priority is not None:
            return [self._smallest()]
        if self.leave_to_lru:
            return self._leaves.oldest()[:1] if self.prefix else [next(iter(self._free))]
        return self.proposed()

    def proposed(self) -> list[int]:
        """What :meth:`shown` gives where LRU does not stand in."""
        if self._order is not None:
            first = self._order.next()
        else:
            first = self._leaves.oldest() if self.prefix else list(islice(self._free, self._oldest))
        return first if self._any is None else list(dict.fromkeys(first + self._any.draw(self._drawn)))

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
        if self._order is not None:
            self._order.remove(page)
        self._remove_leaf(page)
        self.used -= self.size.pop(page)
        self._expires.pop(page, None)
        if self.prefix and (parent := self._parent[page]) >= 0 and parent in self._children:
            self._children[parent] -= 1
            if not self._children[parent]:
                del self._children[parent]
                self._add_leaf(parent)
