"""What an agent sees of the candidates for eviction, on scales that fit a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from kv_gym.errors import UserError
from kv_gym.pages.cache import COLUMNS, Candidates
from kv_gym.pages.requests import RequestTrace


@lru_cache
def _order(count: int) -> np.ndarray:
    return np.arange(count) / 16


# names, and either a column of the cache or what is computed from several; then what its logarithm is divided by
_LOGARITHMS: dict[str, tuple[str | Callable[[Candidates], np.ndarray], float]] = {
    "age": (lambda pages: pages.age, 10),
    "gap": (lambda pages: pages.gap, 10),
    "hits": ("uses", 4),
    "seen": ("seen", 5),
    "period": ("period", 10),
    "size": (lambda pages: pages.size / pages.capacity * 1000, 7),
    "depth": ("depth", 5),
    "length": ("length", 5),
    "previous": ("previous", 10),
    "often": (lambda pages: pages.decayed[:, 0], 2),
    "steady": (lambda pages: pages.decayed[:, 1], 3),
    "behind": ("behind", 5),
    "known": ("known", 5),
    "turn": ("turn", 3),
    "pace": ("pace", 10),
    "parent_age": (lambda pages: pages.parent_age, 10),
    "predecessor_age": (lambda pages: pages.predecessor_age, 10),
    "before_age": (lambda pages: pages.returned[:, 0], 10),
    "after_age": (lambda pages: pages.returned[:, 1], 10),
}
_OTHERS: dict[str, Callable[[Candidates], np.ndarray]] = {
    "ttl": lambda pages: np.where(
        np.isfinite(pages.ttl), np.log1p(np.minimum(np.maximum(pages.ttl, 0), 1e7)) / 16, 1.0
    ),
    "order": lambda pages: _order(len(pages)),
}


BASIC_FEATURES = ("age", "gap", "hits", "seen", "period", "size", "ttl", "depth", "length", "order")
"""What ``KVPage-v0`` shows by default: accesses since the last use, mean accesses between uses, hits while cached,
requests so far (also while it was not cached), accesses between the last two of them, size as a share of the capacity,
seconds until it expires, place in its request, pages of that request (all as logarithms), and place among the least
recently used."""

CHAIN_FEATURES = ("depth", "length", "behind", "known", "turn", "pace", "parent_age")
"""Those that say something of prefixes only: beside `depth` and `length`, of the request that last used the page, how
many of its pages come behind it, how many were known from earlier requests, which turn of a conversation it is and how
long ago the turn before was; and accesses since the page before it in the chain was used."""

NEIGHBOUR_FEATURES = ("predecessor_age", "before_age", "after_age")
"""What the pages do that were asked for around the last use of a page: how long ago the one just before it was used,
and how long ago any of the 16 before it, and of the 16 after it, was asked for again."""

FEATURES = (*BASIC_FEATURES, "previous", "often", "steady", *CHAIN_FEATURES[2:], *NEIGHBOUR_FEATURES)
"""All: also the accesses between the two uses before the last, two counts of uses that decay, and those of the
neighbours."""


def features_of(trace: RequestTrace, semantics: str) -> tuple[str, ...]:
    """The features that agents see if none are named: those that can differ between pages of a trace."""
    useless = {
        *NEIGHBOUR_FEATURES,  # younger than the published agents; the trees of `lrb` take them
        *(CHAIN_FEATURES if semantics == "objects" else ()),
        *(("size",) if trace.sizes is None else ()),
        *(("ttl",) if trace.ttl is None else ()),
    }
    return tuple(name for name in FEATURES if name not in useless)


def check_features(features: Sequence[str]) -> None:
    """Refuse names that are no features.

    Raises:
        UserError: an unknown name, or none at all.
    """
    if not features or set(features) - set(FEATURES):
        raise UserError(f"features {list(features)} are not known; expected some of {', '.join(FEATURES)}")


def feature_matrix(candidates: Candidates, features: Sequence[str]) -> np.ndarray:
    """Features of candidates, `[K, F]` float32, from 0 to about 1.

    Args:
        candidates: the pages.
        features: names of :data:`FEATURES`.
    """
    columns, computed, scales, others = _layout(tuple(features))
    found = candidates.columns.take(columns, 1)
    for place, compute in computed:
        found[:, place] = compute(candidates)
    found += 1
    made = found.astype(np.float32)
    np.log(made, made)  # of float32: five times as fast as log1p of float64
    made *= scales
    for place, compute in others:
        made[:, place] = compute(candidates)
    return made


@lru_cache
def _layout(features: tuple[str, ...]) -> tuple[np.ndarray, list, np.ndarray, list]:
    """Columns of the table to take at once, and what is computed in their place, before the logarithm or without."""
    sources = [_LOGARITHMS.get(name, ("seen", 1.0)) for name in features]
    columns = np.array([COLUMNS[source] if isinstance(source, str) else 0 for source, _ in sources])
    computed = [(place, source) for place, (source, _) in enumerate(sources) if not isinstance(source, str)]
    scales = np.array([1 / scale for _, scale in sources], np.float32)
    others = [(place, _OTHERS[name]) for place, name in enumerate(features) if name in _OTHERS]
    return columns, computed, scales, others
