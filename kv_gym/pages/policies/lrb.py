"""LRB: a regression of the time to the next use, learned while the cache runs, on pages drawn at random.

Source: Song et al., "Learning Relaxed Belady for Content Distribution Network Caching", NSDI 2020, sections 3 and 4.
Differs from the paper in: the cache's features in place of 32 gaps and ten counters; the memory window is a fixed
number of capacities; without `trees`, ridge regression on the features and their squares; with them, the target is the
worth of a page, which falls from 1 to 0 with the time to the next use, in place of that time's logarithm: a page is
worth its place by the chance that it is used soon, and it matters little how late a late use is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from kv_gym.errors import UserError
from kv_gym.pages.cache import Candidates, PageCache
from kv_gym.pages.features import NEIGHBOUR_FEATURES, feature_matrix, features_of
from kv_gym.pages.policies.base import PageRankingPolicy
from kv_gym.pages.shadow import CREDIT, ShadowLRU


class _Ridge:
    """Ridge regression on the features and their squares, in which older examples fade."""

    batch = 512  # examples between two fits

    @staticmethod
    def target(distance: float, capacity: int) -> float:
        """Log accesses to the next use."""
        return math.log1p(distance)

    @staticmethod
    def worth(predicted: np.ndarray) -> np.ndarray:
        """Hits per access that a page brings, up to a factor."""
        return np.exp(-predicted)

    def __init__(self, features: int, forget: float):
        self._forget = forget
        self._width = 2 * features + 1
        self._products: np.ndarray = np.zeros((self._width, self._width))
        self._sums: np.ndarray = np.zeros(self._width)
        self._weights: np.ndarray = np.zeros(self._width)

    def fit(self, features: np.ndarray, targets: np.ndarray) -> None:
        inputs = self._expand(features)
        self._products = self._forget * self._products + inputs.T @ inputs
        self._sums = self._forget * self._sums + inputs.T @ targets
        self._weights = np.linalg.solve(self._products + 1e-2 * np.eye(self._width), self._sums)

    def predict(self, features: np.ndarray) -> np.ndarray:
        return self._expand(features) @ self._weights

    def _expand(self, features: np.ndarray) -> np.ndarray:
        features = features.astype(float)
        return np.concatenate((features, features**2, np.ones((len(features), 1))), 1)


class _Trees:
    """Gradient-boosted trees, fitted anew to the last examples."""

    kept = 32_768  # examples

    @staticmethod
    def target(distance: float, capacity: int) -> float:
        """What a page is worth less than one used at once: 1 - exp(-accesses to the next use / capacity)."""
        return 1 - math.exp(-distance / capacity)

    @staticmethod
    def worth(predicted: np.ndarray) -> np.ndarray:
        """What it says."""
        return 1 - predicted

    def __init__(self, trees: int, seed: int):
        try:
            self._lightgbm = import_module("lightgbm")
        except ImportError:
            raise UserError("the package lightgbm is missing: pip install 'kv-gym[trees]'") from None
        self._trees = trees
        self._settings = {
            "objective": "cross_entropy", "num_leaves": 15, "min_data_in_leaf": 100, "learning_rate": 0.1,
            "feature_fraction": 0.8, "bagging_fraction": 0.8, "bagging_freq": 1, "seed": seed, "num_threads": 1,
            "deterministic": True, "verbose": -1,
        }  # fmt: skip
        self._features: np.ndarray = np.zeros((0, 0))
        self._targets: np.ndarray = np.zeros(0)
        self._booster: Any = None

    @property
    def batch(self) -> int:
        """Examples until the next fit: few at first, so that it begins early."""
        return min(max(256, len(self._targets) // 4), 8192)

    def fit(self, features: np.ndarray, targets: np.ndarray) -> None:
        if len(self._targets):
            features = np.concatenate((self._features, features))[-self.kept :]
            targets = np.concatenate((self._targets, targets))[-self.kept :]
        self._features, self._targets = features, targets
        data = self._lightgbm.Dataset(features, targets)
        self._booster = self._lightgbm.train(self._settings, data, self._trees)

    def predict(self, features: np.ndarray) -> np.ndarray:
        return self._booster.predict(features, num_threads=1)


@dataclass(eq=False)
class LRB(PageRankingPolicy):
    """Regression of the time to the next use; the page whose next use seems farthest leaves.

    Attributes:
        candidates: how many pages it chooses among.
        drawn: how many of these are drawn at random; the others are the first of the `order`.
        window: memory window, in capacities: a page that is not used again within it counts as used at its double end.
        sample: candidates of a decision that become examples, on average.
        trees: gradient-boosted trees, fitted by LightGBM (`pip install 'kv-gym[trees]'`); 0: ridge regression.
        forget: weight that older examples keep at each fit of the ridge regression, which follows 512 new ones. With a
            low one it follows changes of the requests sooner, with a high one it is less noisy.
        shadow: pages of an LRU cache that is simulated beside the real one, see
            :class:`~kv_gym.pages.shadow.ShadowLRU`: where the policy has fallen behind it, LRU decides. 0: none.
        seed: of what is drawn.
        order: what shows the candidates that are not drawn: lru, or a policy with queues, see
            :class:`~kv_gym.pages.order.PolicyOrder`.
        goal: of objects with sizes, what hits are counted in: objects, so that of two pages that are needed equally
            soon the larger one leaves, or bytes, as in the paper.
        credit: of the shadow, how long what was gained counts against a loss, in capacities of accesses.
    """

    stochastic = True
    candidates: int = 64
    drawn: int = 63
    window: float = 4.0
    sample: float = 0.25
    trees: int = 0
    forget: float = 0.8
    shadow: int = 65_536
    seed: int = 0
    order: str = "lru"
    goal: str = "objects"
    credit: float = CREDIT

    def __post_init__(self) -> None:
        for name, least in (("window", 0.0), ("sample", 0.0), ("trees", 0), ("shadow", 0), ("credit", 0.0)):
            if not least <= (value := getattr(self, name)) < float("inf"):
                raise UserError(f"lrb with {name}={value} cannot run; expected {least} or more")
        if not 0 <= self.forget < 1:
            raise UserError(f"lrb with forget={self.forget} cannot run; expected from 0 to below 1")
        if self.goal not in ("objects", "bytes"):
            raise UserError(f"lrb with goal={self.goal} cannot run; expected objects or bytes")

    def reset(self, seed: int) -> None:
        self._random = np.random.default_rng([self.seed, seed])
        self._features: tuple[str, ...] = ()
        self._model: _Ridge | _Trees | None = None
        self._fitted = False  # the first of the order leaves until the first fit
        self._lru: ShadowLRU | None = None
        self._evictions = 0  # before the request that is served
        self._pending: dict[int, tuple[int, np.ndarray]] = {}  # page -> when it was noted, features; oldest first
        self._examples: list[tuple[np.ndarray, float]] = []  # features, and targets

    @property
    def shadow_share(self) -> float | None:
        """Share of evictions left to LRU because the shadow had more hits; None without a shadow."""
        if not self.shadow:
            return None
        return self._lru.left if self._lru is not None else 0.0

    def rank(self, candidates: Candidates) -> np.ndarray:
        features = self._note(candidates)
        if self._model is None or not self._fitted:
            return np.arange(len(candidates))
        predicted = self._model.predict(features)
        if candidates.cache.trace.sizes is None or self.goal == "bytes":
            return -predicted
        return self._model.worth(predicted) / candidates.size

    def _note(self, candidates: Candidates) -> np.ndarray:
        """The features of candidates, of which some become examples."""
        if self._model is None:
            self._model = self._begin(candidates.cache)
        features = feature_matrix(candidates, self._features)
        whole, chance = divmod(self.sample, 1)
        count = int(whole) + (self._random.random() < chance)
        for place in self._random.integers(len(candidates), size=count).tolist() if count else ():
            self._pending.setdefault(candidates.pages[place], (candidates.access, features[place].copy()))
        return features

    def _begin(self, cache: PageCache) -> _Ridge | _Trees:
        names = features_of(cache.trace, "prefix" if cache.prefix else "objects")
        self._features = tuple(name for name in names if name != "order")  # it says nothing of pages that were drawn
        if self.trees and not cache.prefix:
            self._features += NEIGHBOUR_FEATURES
        return _Trees(self.trees, self.seed) if self.trees else _Ridge(len(self._features), self.forget)

    def observe(self, cache: PageCache, begin: int, end: int) -> None:
        if self.shadow:
            self._lru = self._lru or ShadowLRU(cache, self.shadow, self.credit)
            if cache.leave_to_lru and cache.evictions > self._evictions:  # it goes on learning
                self._note(Candidates(cache, cache.proposed()))
            self._evictions = cache.evictions
            self._lru.follow(cache, begin, end)
        pages = cache.trace.lists["pages"]
        capacity = min(cache.capacity, len(cache.size) + 1)  # in pages, where that of the cache is in bytes
        for at in range(begin, end):
            entry = self._pending.get(pages[at])
            if entry is not None and entry[0] < at:  # within a request a page may be noted after its use
                noted, features = self._pending.pop(pages[at])
                self._learn(features, at - noted, capacity)
        longest = self.window * capacity
        while self._pending:
            page = next(iter(self._pending))
            noted, features = self._pending[page]
            if end - noted <= longest:
                break
            del self._pending[page]
            self._learn(features, 2 * longest, capacity)

    def _learn(self, features: np.ndarray, distance: float, capacity: int) -> None:
        assert self._model is not None
        self._examples.append((features, self._model.target(distance, capacity)))
        if len(self._examples) >= self._model.batch:
            made, targets = zip(*self._examples, strict=True)
            self._model.fit(np.array(made), np.array(targets))
            self._examples, self._fitted = [], True
