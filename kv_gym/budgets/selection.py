"""From scores to kept slots, and to the utility that they hold: one function for replay, training and leaderboards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kv_gym.budgets.allocation import Allocation, ScoredLayer, Uniform
from kv_gym.budgets.budget import Budget, uniform
from kv_gym.budgets.order import protection_for
from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Policy


def select(policy: Policy, view: CacheView, sinks: int, recent: int) -> Tensor:
    """The slots of one layer that a policy keeps within ``view.budget``: `[batch, kv_heads, tokens]` bool."""
    return select_slots(policy, Uniform(), [view], sinks, recent)[0]


def select_slots(
    policy: Policy, allocation: Allocation, views: Sequence[CacheView], sinks: int, recent: int,
    scores: Sequence[Tensor] | None = None,
) -> list[Tensor]:  # fmt: skip
    """The slots of a whole model that stay: bool `[batch, kv_heads, tokens]` for each of its evicting layers.

    Args:
        policy: scores the slots.
        allocation: divides the total among heads.
        views: one per evicting layer, in order; their budgets are equal shares of the total.
        sinks: first tokens that always stay.
        recent: last tokens that always stay.
        scores: the policy's, where they are known already.
    """
    if scores is None:
        scores = [policy.score(view) for view in views]
    layers = [
        ScoredLayer.of(score, allocation, view, sinks, recent, ordinal, len(views))
        for ordinal, (score, view) in enumerate(zip(scores, views, strict=True))
    ]
    return allocation.kept(layers)


@dataclass(frozen=True)
class Selection:
    """Which slots of one recorded context stay, and the utility that they hold.

    Attributes:
        kept: `[layers, kv_heads, tokens]` bool.
        utility: `[layers, kv_heads, tokens]` float64, of every slot.
    """

    kept: Tensor
    utility: Tensor

    @cached_property
    def kept_utility(self) -> Tensor:
        """Utility of the kept slots of each head, `[layers, kv_heads]` float64."""
        return (self.utility * self.kept).sum(-1)

    @cached_property
    def total_utility(self) -> Tensor:
        """Utility of all slots of each head, `[layers, kv_heads]` float64."""
        return self.utility.sum(-1)

    @property
    def utility_kept(self) -> float:
        """Share of all utility that stays."""
        return float(self.kept_utility.sum() / self.total_utility.sum().clamp(min=1e-12))


def select_context(
    policy: Policy,
    allocation: Allocation,
    views: Sequence[CacheView],
    budget: Budget,
    utility: Tensor,
    *,
    sinks: int | None = None,
    recent: int | None = None,
    scores: Sequence[Tensor] | None = None,
) -> Selection:
    """Cut one recorded context to a budget, and see what its future loses.

    A sample of a context's slots is cut as if it were a context of so many tokens: budgets are shares of the sample,
    and protection counts its slots.

    Args:
        policy: scores the slots.
        allocation: divides the total among heads.
        views: one per recorded layer, with one row each; their budgets are replaced.
        budget: slots per head, or a share of the recorded slots.
        utility: `[layers, kv_heads, tokens]`, what each slot is worth.
        sinks: first tokens that always stay; None means the policy's own number.
        recent: last tokens that always stay; None means the policy's own number.
        scores: the policy's, where they are known already and do not depend on the budget.
    """
    heads, n = utility.shape[1:]
    seen = torch.full((1,), n, device=views[0].keys.device)
    views = [view.with_budget(uniform(budget, seen, heads)) for view in views]
    if scores is None:
        scores = [policy.score(view) for view in views]
    # whole contexts are numbered so already
    order = torch.arange(n, device=seen.device).expand(1, heads, n)
    views = [replace(view, positions=order, seen=seen) for view in views]
    kept = select_slots(policy, allocation, views, *protection_for(policy, sinks, recent), scores)
    return Selection(torch.cat(kept), utility.double())
