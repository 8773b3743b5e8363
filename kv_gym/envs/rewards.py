"""The arithmetic of the rewards: who is ranked where, and what a ranking is worth over many budgets at once.

Slots are in time order here: slot ``t = position * heads + head``. For one head that is the order of the tokens;
for a joint ranking a slot of a newer token comes after every slot of an older one, so that "the newer token wins a
tie" is "the larger index wins".
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from kv_gym.budgets.budget import Budget, parse_budget
from kv_gym.errors import UserError

BudgetWeights = str | Mapping[Budget, float]


def in_time_order(slots: np.ndarray, heads: int) -> np.ndarray:
    """`[B, heads * N]` with one head after the other, to `[B, N * heads]` with one token after the other."""
    if heads == 1:
        return slots
    return slots.reshape(len(slots), heads, -1).swapaxes(1, 2).reshape(len(slots), -1)


def by_head(slots: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of :func:`in_time_order`."""
    if heads == 1:
        return slots
    return slots.reshape(len(slots), -1, heads).swapaxes(1, 2).reshape(len(slots), -1)


def _order_keys(scores: NDArray[np.float32], open_slots: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Integers that order like (open, score, index): sorting them is stable and far faster than a stable argsort."""
    if not np.isfinite(scores).all():
        raise UserError("the action holds a score that is not finite; expected numbers, best within [-1, 1]")
    # + 0.0 makes one zero of the two
    bits = np.where(open_slots, scores + np.float32(0.0), np.float32(-np.inf)).view(np.int32)
    keys = (bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))).astype(np.int64)  # floats order like these integers
    keys <<= 32
    keys |= np.arange(scores.shape[-1])
    return keys


def worst_first(scores: NDArray[np.float32], open_slots: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Indices `[B, N]` of every row's slots, from the first to be evicted to the last; closed slots come first.

    The same order as `kv_gym.budgets.keep_order` gives, reversed: ties go to the newer token.

    Args:
        scores: `[B, N]` float32 in time order, higher = keep.
        open_slots: `[B, N]` bool, the slots that are ranked: cached and not protected.

    Raises:
        UserError: a score is not finite.
    """
    keys = _order_keys(scores, open_slots)
    keys.sort(axis=-1)
    keys &= 0xFFFFFFFF
    return keys


def best(scores: NDArray[np.float32], open_slots: NDArray[np.bool_], room: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The `room` `[B]` (from 1) open slots of each row that rank highest, `[B, N]` bool; all where fewer are open.

    The last slots of :func:`worst_first`, found without placing every slot.
    """
    keys = _order_keys(scores, open_slots)
    size = keys.shape[-1]
    last = np.sort(keys, axis=-1)[np.arange(len(keys)), np.maximum(size - room, 0)]
    return open_slots & (keys >= last[:, None])


def protected_positions(n: int, seen: int, sinks: int, recent: int) -> NDArray[np.bool_]:
    """Which of the first `n` tokens are protected when `seen` tokens were seen, `[n]` bool."""
    position = np.arange(n)
    return (position < sinks) | (seen - 1 - position < recent)


def shrunk_protection(budget: int, sinks: int, recent: int) -> tuple[int, int]:
    """Sinks and recent tokens that a budget really protects: at most half of it, recent tokens give way first."""
    room = budget // 2
    sinks = min(sinks, room)
    return sinks, min(recent, room - sinks)


def budget_weights(weights: BudgetWeights, n: int, sinks: int, recent: int) -> tuple[NDArray[np.float64], int, int]:
    """The weight of every budget, and the protection that goes with them.

    Args:
        weights: ``"log"`` (budgets log-uniform up to n / 2, weight 1 / b), ``"uniform"`` (weight 1 up to n / 2), or
            a mapping from budgets (slots per head, or shares of the tokens) to weights.
        n: tokens of the context.
        sinks, recent: first and last tokens to protect; they shrink to half the largest budget.

    Returns:
        `[n + 1]` float64, the weight of each budget in slots per head, zero at and below the number of protected
        tokens, where there is nothing to choose; then sinks and recent as they hold.

    Raises:
        UserError: another name, or a mapping with no positive weight above the protected tokens.
    """
    by_budget = np.zeros(n + 1)
    if isinstance(weights, str):
        if weights not in ("log", "uniform"):
            raise UserError(f"budget_weights is {weights!r}; expected 'log', 'uniform' or a mapping budget -> weight")
        budgets = np.arange(1, max(1, n // 2) + 1)
        by_budget[budgets] = 1.0 / budgets if weights == "log" else 1.0
    else:
        for budget, weight in weights.items():
            by_budget[min(n, slots(budget, n))] += weight
    if by_budget.min() < 0 or not by_budget.any():
        raise UserError(f"budget_weights {weights} are not all positive; expected a mapping budget -> weight above 0")
    sinks, recent = shrunk_protection(int(np.flatnonzero(by_budget)[-1]), sinks, recent)
    by_budget[: int(protected_positions(n, n, sinks, recent).sum()) + 1] = 0.0
    return by_budget, sinks, recent


def slots(budget: Budget, n: int) -> int:
    """A budget in slots per head for a context of `n` tokens; a share is rounded down, to at least 1."""
    parsed = parse_budget(budget)
    # the tiny term keeps 0.29 * 100 at 29, as kv_gym.budgets.slots_per_head does
    return parsed if isinstance(parsed, int) else max(1, int(parsed * n + 1e-6))


def rank_weights(by_budget: NDArray[np.float64], protected: int, heads: int = 1) -> NDArray[np.float64]:
    """Λ: what it is worth to be ranked r-th among the open slots, `[heads * n]` float64, falling with r.

    A slot of rank r (from 0) stays at every total budget above ``protected + r``, so that the sum over budgets of
    weight times kept utility is the sum over slots of utility times Λ(rank): one pass, no loop over budgets.

    Args:
        by_budget: `[n + 1]` weights of budgets per head, zero up to `protected`.
        protected: protected tokens per head.
        heads: heads that share one ranking; a budget of b per head is `b * heads` slots in all.
    """
    n = len(by_budget) - 1
    tails = by_budget[::-1].cumsum()[::-1]  # tails[b]: weight of all budgets from b on
    needed = np.arange(heads * n) + 1 + protected * heads  # the smallest total that keeps rank r
    per_head = -(-needed // heads)
    return np.where(per_head <= n, tails[np.minimum(per_head, n)], 0.0)
