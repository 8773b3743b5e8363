"""What an agent sees of the candidates for eviction, on scales that fit a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kv_gym.pages.cache import Candidates

_FEATURES: dict[str, Callable[[Candidates], np.ndarray]] = {
    "age": lambda pages: np.log1p(pages.age) / 10,
    "gap": lambda pages: np.log1p(pages.gap) / 10,
    "hits": lambda pages: np.log1p(pages.hits) / 4,
    "seen": lambda pages: np.log1p(pages.seen) / 5,
    "period": lambda pages: np.log1p(np.where(pages.period > 0, pages.period, 1e6)) / 10,
    "size": lambda pages: np.log1p(pages.size / pages.capacity * 1000) / 7,
    "ttl": lambda pages: np.where(
        np.isfinite(pages.ttl), np.log1p(np.minimum(np.maximum(pages.ttl, 0), 1e7)) / 16, 1.0
    ),
    "depth": lambda pages: np.log1p(pages.depth) / 5,
    "length": lambda pages: np.log1p(pages.length) / 5,
    "order": lambda pages: np.arange(len(pages)) / 16,
}

FEATURES = tuple(_FEATURES)
"""Names of the features: accesses since the last use, mean accesses between uses, hits while cached, requests so far
(also while it was not cached), accesses between the last two of them, size as a share of the capacity, seconds until it
expires, place in its request, pages of that request (all as logarithms), and place among the least recently used."""


def feature_matrix(candidates: Candidates, features: Sequence[str]) -> np.ndarray:
    """Features of candidates, `[K, F]` float32, from 0 to about 1.

    Args:
        candidates: the pages.
        features: names of :data:`FEATURES`.
    """
    return np.stack([_FEATURES[name](candidates) for name in features], 1).astype(np.float32)
