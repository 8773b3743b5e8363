"""Decisions of a page cache with the next use of every candidate, recorded while a policy runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kv_gym.pages.cache import Candidates, PageCache
from kv_gym.pages.features import feature_matrix
from kv_gym.pages.policies.base import PageRankingPolicy
from kv_gym.pages.requests import NEVER, RequestTrace


class Decisions(NamedTuple):
    """Recorded decisions.

    Attributes:
        features: `[decisions, K, F]` float32, 0 where there are fewer than K candidates.
        distance: `[decisions, K]` float32 accesses until each is used next; twice the trace where it is not.
        mask: `[decisions, K]` bool, which candidates there are.
    """

    features: np.ndarray
    distance: np.ndarray
    mask: np.ndarray


def record_decisions(
    trace: RequestTrace,
    policy: PageRankingPolicy,
    capacity: int,
    semantics: str,
    features: Sequence[str],
    count: int,
    random: np.random.Generator,
    training: int,
) -> tuple[Decisions, float]:
    """Run a policy over a trace and keep `count` of the decisions that it meets, drawn evenly.

    Decisions are those of the first `training` requests, less their last tenth, after which too much is unknown; what
    is used next only after these requests counts as not used any more.

    Args:
        trace: the requests.
        policy: decides; it is shown K candidates.
        capacity: of the cache.
        semantics: ``objects`` or ``prefix``.
        features: F names of what is recorded of each candidate.
        count: the most decisions to keep.
        random: draws them.
        training: requests to record in; hits are counted after them.

    Returns:
        The decisions, and the hit rate on the requests from number `training` on (0 where there are none).
    """
    cache = PageCache(trace, capacity, semantics, policy.candidates, future=True, drawn=policy.drawn)
    policy.reset(0)
    end = int(trace.starts[training])
    last, longest = int(0.9 * end), 2 * end
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    met = 0
    for _ in cache.serve(0, training):
        pages = cache.shown()
        if len(pages) == 1:
            cache.evict(pages[0])
            continue
        shown = Candidates(cache, pages)
        if count and cache.access < last:
            place = met if met < count else int(random.integers(met + 1))
            met += 1
            if place < count:  # reservoir sampling
                until = np.where(shown.next_use < end, shown.next_use, NEVER) - cache.access
                distance = np.minimum(until, longest).astype(np.float32)
                kept[place : place + 1] = [(feature_matrix(shown, features), distance)]
        cache.evict(pages[int(np.argmin(policy.rank(shown)))])
    before = cache.hits
    for _ in cache.serve(training, trace.requests):
        pages = cache.shown()
        cache.evict(pages[0] if len(pages) == 1 else pages[int(np.argmin(policy.rank(Candidates(cache, pages))))])
    made = Decisions(
        np.zeros((len(kept), policy.candidates, len(features)), np.float32),
        np.ones((len(kept), policy.candidates), np.float32),
        np.zeros((len(kept), policy.candidates), bool),
    )
    for row, (seen, distance) in enumerate(kept):
        made.features[row, : len(seen)] = seen
        made.distance[row, : len(seen)] = distance
        made.mask[row, : len(seen)] = True
    return made, (cache.hits - before) / max(len(trace) - end, 1)
