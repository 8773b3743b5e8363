"""The cut: scores of one or all layers, a budget and an allocation give the slots that stay."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kv_gym.budgets.allocation import Allocation, Layer
from kv_gym.budgets.selection import merit, protected, protection_within
from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Policy


def judged(
    scores: Tensor, allocation: Allocation, view: CacheView, sinks: int, recent: int, place: int = 0, layers: int = 1
) -> Layer:
    """A layer ready to be cut: scores made comparable, protected slots above all others.

    Args:
        scores: `[batch, kv_heads, tokens]`, the policy's.
        allocation: compares heads.
        view: the slots; its budget is an equal share of the total.
        sinks, recent: first and last tokens that always stay.
        place, layers: which of how many evicting layers it is.
    """
    merits = merit(allocation.compared(scores, view), view, protected(view, sinks, recent))
    first, last = protection_within(view.budget[:, 0], sinks, recent)
    return Layer(view, merits, place, layers, first + last)


def cut(
    policy: Policy, allocation: Allocation, views: Sequence[CacheView], sinks: int, recent: int
) -> list[Tensor]:  # fmt: skip
    """The slots of a whole model that stay: bool `[batch, kv_heads, tokens]` for each of its evicting layers."""
    layers = [
        judged(policy.score(view), allocation, view, sinks, recent, place, len(views))
        for place, view in enumerate(views)
    ]
    return allocation.kept(layers)
