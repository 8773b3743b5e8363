"""LRB-like: a regression of the time to the next use, learned while the cache runs, on pages drawn at random.

Source: Song et al., "Learning Relaxed Belady for Content Distribution Network Caching", NSDI 2020, sections 3 and 4.
Differs from the paper in: ridge regression on the features and their squares in place of gradient-boosted trees, with
the cache's features in place of 32 gaps and ten counters; the memory window is a fixed number of capacities.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kv_gym.pages.cache import Candidates, PageCache
from kv_gym.pages.features import feature_matrix, features_of
from kv_gym.pages.policies.base import PageRankingPolicy

_BATCH = 512  # examples between two fits
_FORGET = 0.8  # weight of older examples at each fit


@dataclass(eq=False)
class LRB(PageRankingPolicy):
    """Regression of log time to the next use; the page whose next use seems farthest leaves.

    Attributes:
        candidates: how many pages it chooses among.
        drawn: how many of these are drawn at random; the others are the least recently used.
        window: memory window, in capacities: a page that is not used again within it counts as used at its double end.
        sample: share of the decisions of which one candidate becomes an example.
        seed: of what is drawn.
    """

    stochastic = True
    candidates: int = 64
    drawn: int = 63
    window: float = 4.0
    sample: float = 0.25
    seed: int = 0

    def reset(self, seed: int) -> None:
        self._random = np.random.default_rng([self.seed, seed])
        self._features: tuple[str, ...] = ()
        self._weights: np.ndarray | None = None  # LRU decides until the first fit
        self._examples: dict[int, tuple[int, np.ndarray]] = {}  # page -> when it was noted, inputs; oldest first
        self._count = 0

    def rank(self, candidates: Candidates) -> np.ndarray:
        if not self._features:
            self._begin(candidates.cache)
        features = feature_matrix(candidates, self._features).astype(float)
        inputs = np.concatenate((features, features**2, np.ones((len(features), 1))), 1)
        if self._random.random() < self.sample:
            place = int(self._random.integers(len(candidates)))
            self._examples.setdefault(candidates.pages[place], (candidates.access, inputs[place]))
        return -candidates.age if self._weights is None else -(inputs @ self._weights)

    def _begin(self, cache: PageCache) -> None:
        names = features_of(cache.trace, "prefix" if cache.prefix else "objects")
        self._features = tuple(name for name in names if name != "order")  # it says nothing of pages that were drawn
        width = 2 * len(self._features) + 1
        self._products, self._sums = np.zeros((width, width)), np.zeros(width)
        self._new_products, self._new_sums = np.zeros((width, width)), np.zeros(width)

    def observe(self, cache: PageCache, begin: int, end: int) -> None:
        pages = cache.trace.lists["pages"]
        for at in range(begin, end):
            if pages[at] in self._examples:
                noted, inputs = self._examples.pop(pages[at])
                self._learn(inputs, at - noted)
        longest = self.window * min(cache.capacity, len(cache.size) + 1)  # accesses, where the capacity is in bytes
        while self._examples:
            page = next(iter(self._examples))
            noted, inputs = self._examples[page]
            if end - noted <= longest:
                break
            del self._examples[page]
            self._learn(inputs, 2 * longest)

    def _learn(self, inputs: np.ndarray, distance: float) -> None:
        self._new_products += np.outer(inputs, inputs)
        self._new_sums += np.log1p(distance) * inputs
        self._count += 1
        if self._count % _BATCH == 0:
            self._products = _FORGET * self._products + self._new_products
            self._sums = _FORGET * self._sums + self._new_sums
            self._new_products, self._new_sums = np.zeros_like(self._products), np.zeros_like(self._sums)
            self._weights = np.linalg.solve(self._products + 1e-2 * np.eye(len(self._sums)), self._sums)
