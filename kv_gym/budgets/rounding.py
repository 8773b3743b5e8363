"""Dealing out a whole number of slots in proportion to weights, exact to the slot."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

_STEPS = 2**48  # weights are rounded to this many parts of the largest; integers then leave nothing to rounding


def deal(total: int, weights: Sequence[float], caps: Sequence[int]) -> list[int]:
    """Whole numbers that sum to `total`, in proportion to `weights`, none above its cap.

    What a full part cannot take goes to the others in proportion, and alike to all where their weights are zero. What
    rounding down leaves goes one by one to the largest remainders, of equal ones to the first.

    Args:
        total: to deal out, from 0; where all caps together are less, every part is full.
        weights: one per part, finite and not negative.
        caps: the most that each part takes, from 0.

    Returns:
        One number per part.
    """
    return list(_deal(total, tuple(weights), tuple(caps)))


@lru_cache(maxsize=512)  # every layer of a model asks for the same
def _deal(total: int, weights: tuple[float, ...], caps: tuple[int, ...]) -> tuple[int, ...]:
    largest = max(weights) or 1.0
    exact = [round(weight / largest * _STEPS) for weight in weights]
    dealt, rest, open_ = list(caps), min(total, sum(caps)), list(range(len(caps)))
    while True:
        shares = {i: exact[i] for i in open_} if any(exact[i] for i in open_) else dict.fromkeys(open_, 1)
        mass = sum(shares.values())
        full = {i for i, share in shares.items() if rest * share >= caps[i] * mass}
        if not full:
            break
        rest -= sum(caps[i] for i in full)
        open_ = [i for i in open_ if i not in full]
    for i, share in shares.items():
        dealt[i] = rest * share // mass
    left = rest - sum(dealt[i] for i in shares)
    for i in sorted(shares, key=lambda i: (-(rest * shares[i] % mass), i))[:left]:
        dealt[i] += 1
    return tuple(dealt)
