"""One-bit predictions for paging: what a perfect predictor says, a noisy one, and one that is learned.

Source: Antoniadis et al., "Paging with Succinct Predictions", ICML 2023, arXiv 2210.02775. The definitions of the bits
follow the abstract and an independent implementation: the paper's pseudo-code was not at hand. They were checked
against the paper's bounds.
"""

from __future__ import annotations

import heapq

import numpy as np

from kv_gym.errors import UserError
from kv_gym.pages.requests import RequestTrace

PREDICTORS = ("oracle", "zeros", "ones", "learned")


def discard_bits(trace: RequestTrace, capacity: int) -> np.ndarray:
    """`[accesses]` bool: whether the best offline algorithm evicts the page before it is asked for again.

    The offline algorithm evicts the page with the farthest next use, among equals the least recently used. A page
    that is not asked for again and never evicted has 0.
    """
    bits = np.zeros(len(trace), bool)
    following = trace.next_use.tolist()
    latest: dict[int, int] = {}  # cached pages and their latest access
    heap: list[tuple[int, int, int]] = []
    for at, page in enumerate(trace.pages.tolist()):
        if page not in latest and len(latest) == capacity:
            while True:
                _, last, victim = heapq.heappop(heap)
                if latest.get(victim) == last:
                    break
            bits[latest.pop(victim)] = True
        latest[page] = at
        heapq.heappush(heap, (-following[at], at, page))
    return bits


def phases(trace: RequestTrace, capacity: int) -> np.ndarray:
    """`[accesses]` int64, the phase of each access: a phase ends before its (capacity + 1)-th different page."""
    found = np.zeros(len(trace), np.int64)
    phase = 0
    seen: set[int] = set()
    for at, page in enumerate(trace.pages.tolist()):
        if page not in seen and len(seen) == capacity:
            phase, seen = phase + 1, set()
        seen.add(page)
        found[at] = phase
    return found


def phase_bits(trace: RequestTrace, capacity: int) -> np.ndarray:
    """`[accesses]` bool: whether the page is not asked for in the next phase."""
    asked = list(zip(phases(trace, capacity).tolist(), trace.pages.tolist(), strict=True))
    known = set(asked)
    return np.array([(phase + 1, page) not in known for phase, page in asked])


def predicted_bits(
    bits: np.ndarray, trace: RequestTrace, capacity: int, predictor: str = "oracle", flip: float = 0.0, seed: int = 0
) -> np.ndarray:
    """What a predictor says.

    Args:
        bits: the true ones, of :func:`discard_bits` or :func:`phase_bits`.
        trace: the requests.
        capacity: pages that fit.
        predictor: ``oracle``; ``zeros`` or ``ones``, constants; ``learned``, see :func:`learned_bits`.
        flip: share of bits turned over at random.
        seed: of what is turned over.

    Raises:
        UserError: an unknown predictor, or a share beyond 0 to 1.
    """
    if predictor not in PREDICTORS:
        raise UserError(f"predictor {predictor!r} is not known; expected one of {', '.join(PREDICTORS)}")
    if not 0 <= flip <= 1:
        raise UserError(f"a share of {flip} bits cannot be turned over; expected 0 to 1")
    if predictor == "learned":
        predicted = learned_bits(bits, trace)
    else:
        predicted = {"oracle": bits, "zeros": np.zeros_like(bits), "ones": np.ones_like(bits)}[predictor]
    return predicted ^ (np.random.default_rng(seed).random(len(bits)) < flip)


def learned_bits(bits: np.ndarray, trace: RequestTrace, share: float = 0.3, rounds: int = 30) -> np.ndarray:
    """Bits of a logistic regression, fitted to the first part of the trace alone.

    It sees of each access: logarithms of the gap since the page's last use, of the mean gap, and of the number of uses
    so far; depth and length of the request. Bits within the part that it is fitted to are predictions too.

    Args:
        bits: the true ones; only those of the first part are read.
        trace: the requests.
        share: of the trace that it is fitted to.
        rounds: of Newton's method.
    """
    features = access_features(trace)
    known = slice(0, max(1, int(len(trace) * share)))
    x, y = features[known], bits[known].astype(float)
    weights = np.zeros(x.shape[1])
    for _ in range(rounds):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        gradient = x.T @ (p - y) + 1e-3 * weights
        curvature = (x * (p * (1 - p))[:, None]).T @ x + 1e-3 * np.eye(len(weights))
        weights -= np.linalg.solve(curvature, gradient)
    return features @ weights > 0


def access_features(trace: RequestTrace) -> np.ndarray:
    """`[accesses, 7]` float64, what is known of each access when it comes, and a constant."""
    order = np.argsort(trace.pages, kind="stable")
    pages, at = trace.pages[order], order
    first = np.concatenate(([True], pages[1:] != pages[:-1]))
    gap = np.where(first, 0, np.diff(at, prepend=at[0]))
    begin = np.maximum.accumulate(np.where(first, np.arange(len(pages)), 0))
    uses = np.arange(len(pages)) - begin
    mean_gap = np.where(uses > 0, (at - at[begin]) / np.maximum(uses, 1), 0)
    columns = np.empty((len(pages), 3))
    columns[order] = np.stack((np.log1p(gap), np.log1p(mean_gap), np.log1p(uses)), 1)
    lengths = np.diff(trace.starts)
    place = np.arange(len(trace)) - np.repeat(trace.starts[:-1], lengths)
    length = np.repeat(lengths, lengths)
    return np.column_stack(
        (columns, columns[:, 2] == 0, np.log1p(place), np.log1p(length - place), np.ones(len(trace)))
    )


def prediction_errors(bits: np.ndarray, predicted: np.ndarray) -> tuple[int, int]:
    """How many bits were predicted 0 and are 1, and how many were predicted 1 and are 0."""
    return int((bits & ~predicted).sum()), int((~bits & predicted).sum())
