"""What an agent sees of the candidates for eviction, on scales that fit a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kv_gym.pages.cache import Candidates

_FEATURES: dict[str, Callable[[Candidates, int], np.ndarray]] = {
    "age": lambda seen, capacity: np.log1p(seen.age) / 10,
    "gap": lambda seen, capacity: np.log1p(seen.gap) / 10,
    "hits": lambda seen, capacity: np.log1p(seen.hits) / 4,
    "size": lambda seen, capacity: np.log1p(seen.size / capacity * 1000) / 7,
    "ttl": lambda seen, capacity: np.where(
        np.isfinite(seen.ttl), np.log1p(np.minimum(np.maximum(seen.ttl, 0), 1e7)) / 16, 1.0
    ),
    "depth": lambda seen, capacity: np.log1p(seen.depth) / 5,
    "length": lambda seen, capacity: np.log1p(seen.length) / 5,
    "order": lambda seen, capacity: np.arange(len(seen)) / 16,
}

FEATURES = tuple(_FEATURES)
"""Names of the features: accesses since the last use, mean accesses between uses, hits while cached, size as a share of
the capacity, seconds until it expires, place in its request, pages of that request (all as logarithms), and place among
the least recently used."""


def feature_matrix(candidates: Candidates, features: Sequence[str], capacity: int) -> np.ndarray:
    """Features of candidates, `[K, F]` float32, from 0 to about 1.

    Args:
        candidates: the pages.
        features: names of :data:`FEATURES`.
        capacity: of the cache.
    """
    return np.stack([_FEATURES[name](candidates, capacity) for name in features], 1).astype(np.float32)
