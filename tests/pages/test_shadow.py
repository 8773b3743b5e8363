"""The LRU cache in a policy's shadow is LRU, and keeps any policy from falling far behind it."""

from dataclasses import dataclass

import numpy as np
import pytest

from kv_gym.pages import PageRankingPolicy, RequestTrace, simulate
from kv_gym.pages.cache import PageCache
from kv_gym.pages.shadow import TOLERATED, ShadowLRU


@pytest.mark.parametrize("kind", ["objects", "prefix", "expiring"])
def test_the_shadow_of_lru_is_lru(kind):
    random = np.random.default_rng(0)
    lengths = random.integers(1, 5, 400)
    roots = np.repeat(random.integers(0, 40, 400), lengths)
    starts = np.cumsum([0, *lengths[:-1]])
    keys = (10 * roots + np.arange(len(roots)) - np.repeat(starts, lengths)).tolist()
    more = {"sizes": random.integers(1, 9, 400)[keys], "times": range(len(keys)), "ttl": [60.0] * len(keys)}
    trace = RequestTrace.from_keys(keys, "drawn", starts=starts, **more if kind == "expiring" else {})
    capacity = 200 if kind == "expiring" else 40
    cache = PageCache(trace, capacity, "prefix" if kind == "prefix" else "objects")
    shadow = ShadowLRU(cache, 10**6)
    for request in range(trace.requests):
        for _ in cache.serve(request, request + 1):
            cache.evict(cache.shown()[0])
        shadow.follow(cache, trace.starts[request], trace.starts[request + 1])
        assert shadow.loss == 0 and shadow.pages == cache.size and not cache.leave_to_lru
    assert 0 < cache.hits == sum(cache.found) < len(trace)
    assert ShadowLRU(cache, 10).share < 0.3


@dataclass(eq=False)
class Adversary(PageRankingPolicy):
    """As Belady up to an access, then it evicts what is needed next."""

    needs_future = True
    candidates: int = 1000
    turns: int = 0
    guarded: bool = True

    def reset(self, seed):
        self.shadow = None

    def rank(self, candidates):
        return -candidates.next_use if candidates.access < self.turns else candidates.next_use

    def observe(self, cache, begin, end):
        if self.guarded:
            self.shadow = self.shadow or ShadowLRU(cache, 10**6)
            self.shadow.follow(cache, begin, end)


def requested(kind, random):
    drawn = np.minimum(random.zipf(1.3, 6000), 300)
    if kind == "loops":
        return np.where(random.random(6000) < 0.5, np.arange(6000) % 45, drawn + 100)
    return np.where(np.arange(6000) // 500 % 2, np.arange(6000) % 30, drawn + 100) if kind == "changing" else drawn


@pytest.mark.parametrize("turns", [0, 3000])
@pytest.mark.parametrize("kind", ["drawn", "loops", "changing", "sized"])
def test_no_policy_falls_further_behind_lru_than_stated(kind, turns):
    random = np.random.default_rng(turns)
    keys = requested(kind, random)
    sizes = random.integers(1, 9, 401)[keys] if kind == "sized" else None
    trace = RequestTrace.from_keys(keys, kind, sizes=sizes)
    pages, capacity = 40, 40 if sizes is None else 180
    policy = Adversary(turns=turns)
    lru, alone, guarded = (
        np.cumsum(simulate(trace, each, capacity, record_hits=True).hit)
        for each in ("lru", Adversary(turns=turns, guarded=False), policy)
    )
    bound = TOLERATED * np.arange(1, 6001) + policy.shadow.limit + pages + 1
    assert (lru - guarded <= bound).all() and policy.shadow.left > 0.3
    assert (lru - alone)[-1] > bound[-1] or turns
    assert guarded[-1] > alone[-1] + 100
