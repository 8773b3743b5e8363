"""A small LRU cache beside the real one, which says when a policy hits less than LRU would.

It holds a sample of the pages, chosen by a hash of their numbers, in the same share of the capacity. Source of the
sampling: Waldspurger et al., "Cache Modeling and Optimization using Miniature Simulations", USENIX ATC 2017, section 3.
The decision is the one-sided CUSUM of Page, "Continuous inspection schemes", Biometrika 1954.
"""

from __future__ import annotations

from collections import OrderedDict

from kv_gym.pages.cache import PageCache

_TOLERATED = 0.007  # hits per access that a policy may lose against LRU without an end
_HASH, _MASK = 0x9E3779B1, 0xFFFFFFFF  # Knuth's multiplicative hash of 32 bits


class ShadowLRU:
    """Compares a cache's hits with those of LRU, on a sample of its pages.

    The loss sums up the hits that LRU has more, less 0.7 % of the accesses, and never falls below 0. Beyond a limit
    (ten hits and a hundredth of the shadow's pages) LRU is to decide until the loss is 0 again, which takes 140
    accesses for each hit that was lost. So over any stretch a policy loses at most 0.7 % of the accesses, and beyond
    them what it loses before LRU has filled the cache again.

    Args:
        cache: the real one.
        pages: about how many pages the shadow holds; a smaller cache is followed whole.

    Attributes:
        share: of the pages that are followed.
        loss: hits of the sample, see above.
        stands_in: whether LRU is to decide.
    """

    def __init__(self, cache: PageCache, pages: int):
        trace = cache.trace
        mean_size = 1.0 if trace.sizes is None else max(float(trace.sizes.mean()), 1.0)
        self.share = min(1.0, pages * mean_size / cache.capacity)
        self._limit = 10 + min(pages, cache.capacity / mean_size) / 100
        self._capacity = cache.capacity * self.share
        self._threshold = int(self.share * (_MASK + 1))
        lists = trace.lists
        self._pages, self._sizes, self._ttl = lists["pages"], lists.get("sizes"), lists.get("ttl")
        self._times = lists.get("times") if self._ttl is not None else None
        self._held: OrderedDict[int, tuple[int, float]] = OrderedDict()  # size, and when it expires
        self._used = 0
        self.loss, self.stands_in = 0.0, False

    @property
    def pages(self) -> dict[int, int]:
        """The pages that it holds, and their sizes."""
        return {page: size for page, (size, _) in self._held.items()}

    def follow(self, cache: PageCache, begin: int, end: int) -> None:
        """Serve the accesses of a request, and compare.

        Args:
            cache: the real one, after it has served them.
            begin, end: the accesses.
        """
        sampled = [at for at in range(begin, end) if (self._pages[at] * _HASH & _MASK) < self._threshold]
        if not sampled:
            return
        if cache.prefix:
            hits = sum(self._pages[at] in self._held for at in sampled)
            for at in reversed(sampled):  # tails become free, and leave, before heads
                self._serve(at)
        else:
            hits = sum([self._serve(at) for at in sampled])
        lost = hits - sum(cache.found[at] for at in sampled)
        self.loss = max(0.0, self.loss + lost - _TOLERATED * len(sampled))
        self.stands_in = self.loss > (0.0 if self.stands_in else self._limit)

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
