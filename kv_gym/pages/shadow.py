"""An LRU cache beside the real one, which says when a policy has fallen behind LRU.

It keeps the numbers of the pages alone. Of a large cache it may follow a sample of the pages, chosen by a hash of their
numbers, in the same share of the capacity. Source of the sampling: Waldspurger et al., "Cache Modeling and Optimization
using Miniature Simulations", USENIX ATC 2017, section 3. To switch between a policy and a safe one by what they missed
so far: Blum and Burch, "On-line Learning and the Metrical Task System Problem", Machine Learning 2000.
"""

from __future__ import annotations

import math
from collections import OrderedDict

from kv_gym.pages.cache import PageCache

TOLERATED = 0.005  # hits per access that a policy may lose against LRU without an end
CREDIT = 20.0  # capacities of accesses after which 1/e is left of a credit; benchmarks/pages.py --parts credit
_HASH, _MASK = 0x9E3779B1, 0xFFFFFFFF  # Knuth's multiplicative hash of 32 bits


class ShadowLRU:
    """Compares a cache's hits with those of LRU, and lets LRU decide where the cache has fallen behind.

    `loss` is how many hits LRU had more. What the policy gained is its credit, a negative loss, which fades with the
    accesses; a loss does not fade, but half a percent of the accesses is forgiven. While the loss is above `limit` (ten
    hits and a hundredth of the shadow's pages) LRU decides.

    So a policy never falls further behind than this, for objects of which the shadow follows all: over the first `n`
    accesses it has at most ``0.005 n + limit + 1`` hits fewer than LRU, and as many as the cache of LRU has pages. For
    the policy decides only while the loss is within `limit`, however often LRU took over before; and while LRU decides,
    only pages that LRU held and the cache did not when it took over can miss where LRU hits, each once, since the pages
    used from then on are in both. Over later accesses alone the credit comes on top. With a sample, with pages that
    expire, for prefixes and for requests of several pages this is what is to be expected, no proof.

    Args:
        cache: the real one.
        pages: about how many pages the shadow holds; a smaller cache is followed whole.
        credit: how long a credit lasts: 1/e of it is left after this many capacities of accesses. 0: no credit.

    Attributes:
        share: of the pages that are followed.
        limit: loss above which LRU is to decide.
        loss: hits of the sample, see above.
        stands_in: whether LRU is to decide.
        left: share of the evictions so far that LRU decided.
    """

    def __init__(self, cache: PageCache, pages: int, credit: float = CREDIT):
        trace = cache.trace
        mean_size = 1.0 if trace.sizes is None else max(float(trace.sizes.mean()), 1.0)
        self.share = min(1.0, pages * mean_size / cache.capacity)
        held = self.share * cache.capacity / mean_size
        self.limit = 10 + held / 100
        self._fading = math.exp(-1 / (credit * held)) if credit else 0.0
        self._capacity = cache.capacity * self.share
        self._threshold = int(self.share * (_MASK + 1))
        lists = trace.lists
        self._pages, self._sizes, self._ttl = lists["pages"], lists.get("sizes"), lists.get("ttl")
        self._times = lists.get("times") if self._ttl is not None else None
        self._held: OrderedDict[int, tuple[int, float]] = OrderedDict()  # size, and when it expires
        self._used = self._evictions = self._by_lru = 0
        self.loss, self.stands_in = 0.0, False

    @property
    def pages(self) -> dict[int, int]:
        """The pages that it holds, and their sizes."""
        return {page: size for page, (size, _) in self._held.items()}

    @property
    def left(self) -> float:  # noqa: D102
        return self._by_lru / max(self._evictions, 1)

    def follow(self, cache: PageCache, begin: int, end: int) -> None:
        """Serve the accesses of a request, compare, and tell the cache who is to decide.

        Args:
            cache: the real one, after it has served them.
            begin, end: the accesses.
        """
        if self.stands_in:
            self._by_lru += cache.evictions - self._evictions
        self._evictions = cache.evictions
        sampled = [at for at in range(begin, end) if (self._pages[at] * _HASH & _MASK) < self._threshold]
        if not sampled:
            return
        if cache.prefix:
            hits = sum(self._pages[at] in self._held for at in sampled)
            for at in reversed(sampled):  # tails become free, and leave, before heads
                self._serve(at)
        else:
            hits = sum([self._serve(at) for at in sampled])
        self.loss += hits - sum(cache.found[at] for at in sampled)
        if self.loss < 0:
            self.loss *= self._fading ** len(sampled)
        else:
            self.loss = max(0.0, self.loss - TOLERATED * len(sampled))
        self.stands_in = cache.leave_to_lru = self.loss > self.limit

    def _serve(self, at: int) -> bool:
        page, size = self._pages[at], 1 if self._sizes is None else self._sizes[at]
        if page in self._held:
            if self._times is None or self._times[at] < self._held[page][1]:
                self._held.move_to_end(page)
                return True
            self._used -= self._held.pop(page)[0]
        if size <= self._capacity:
            expires = 0.0 if self._times is None or self._ttl is None else self._times[at] + self._ttl[at]
            self._held[page] = size, expires
            self._used += size
            while self._used > self._capacity:
                self._used -= self._held.popitem(last=False)[1][0]
        return False
