"""Rules that give layers different numbers of slots, and leave the heads of a layer to another rule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from kv_gym.budgets.allocation import Allocation, ScoredLayer, Uniform
from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.policies.base import Policy

_STEPS = 2**48  # weights are rounded to this many parts of the largest; integers then leave nothing to rounding


@dataclass(frozen=True)
class LayerShares(Allocation):
    """Divides the model's total among layers, then each layer's among its heads.

    Protected slots come first: every head has room for them, and what is left is divided by weights. No layer gets
    more than it can hold. A rule that looks at all layers is exact to the slot; one that cuts layer after layer too,
    as long as a layer's share grows no faster than tokens come (otherwise it is filled up as they come).

    Attributes:
        within: divides a layer's slots among its heads.
    """

    own_totals = True
    within: Allocation = field(default_factory=Uniform)

    @classmethod
    def parse(cls, setting: str, within: Allocation) -> Allocation | None:
        return None if setting else cls(within)

    @property
    @abstractmethod
    def rule(self) -> str:
        """What the command line calls the part of the rule that divides among layers."""

    @property
    def name(self) -> str:
        return self.rule if isinstance(self.within, Uniform) else f"{self.rule}+{self.within.name}"

    def refuse_unfit(self, policy: Policy) -> None:
        self.within.refuse_unfit(policy)

    def compared(self, scores: Tensor, view: CacheView) -> Tensor:
        return self.within.compared(scores, view)

    @abstractmethod
    def weights(self, layers: Sequence[ScoredLayer], free: Sequence[int], capacity: Sequence[int]) -> list[list[float]]:
        """What the layers of the model get, in proportion: for each row one number per evicting layer of the model.

        Args:
            layers: as in :meth:`slots`.
            free: slots per head on average, per row, without the protected ones.
            capacity: slots that a head can take in addition to its protected ones, per row.
        """

    def slots(self, layers: Sequence[ScoredLayer]) -> list[Tensor]:
        count, first = layers[0].layer_count, layers[0].view
        seen = first.seen.tolist()
        mean = [min(budget, n) for budget, n in zip(first.budget[:, 0].tolist(), seen, strict=True)]
        protected = [0] * len(mean) if layers[0].protected_slots is None else layers[0].protected_slots.tolist()
        protected = [min(count, slots) for count, slots in zip(protected, mean, strict=True)]
        free = [slots - count for slots, count in zip(mean, protected, strict=True)]
        capacity = [n - count for n, count in zip(seen, protected, strict=True)]
        cached = _cached_slots(layers) if self.whole_model else [[n] * count for n in seen]
        shares = []
        for row, weights in enumerate(self.weights(layers, free, capacity)):
            caps = [max(0, slots - protected[row]) for slots in cached[row]]
            shares.append([protected[row] + slots for slots in apportion(free[row] * count, weights, caps)])
        return [self.within.slots([_with_share(layer, shares)])[0] for layer in layers]


def _cached_slots(layers: Sequence[ScoredLayer]) -> list[list[int]]:
    """Slots that each layer holds per head, rounded down; one list per row."""
    return torch.stack([layer.view.valid.sum((1, 2)) // layer.view.valid.shape[1] for layer in layers], 1).tolist()


def _with_share(layer: ScoredLayer, shares: list[list[int]]) -> ScoredLayer:
    share = torch.tensor([row[layer.ordinal] for row in shares], device=layer.view.budget.device)
    return replace(layer, view=layer.view.with_budget(share[:, None].expand_as(layer.view.budget)))


def apportion(total: int, weights: Sequence[float], caps: Sequence[int]) -> list[int]:
    """Whole numbers that sum to `total`, in proportion to `weights`, none above its cap.

    What a full part cannot take goes to the others in proportion, and alike to all where their weights are zero. What
    rounding down leaves goes one by one to the largest remainders, of equal ones to the first.

    Args:
        total: to divide, from 0; where all caps together are less, every part is full.
        weights: one per part, finite and not negative.
        caps: the most that each part takes, from 0.

    Returns:
        One number per part.
    """
    return list(_apportion(total, tuple(weights), tuple(caps)))


@lru_cache(maxsize=512)  # every layer of a model asks for the same
def _apportion(total: int, weights: tuple[float, ...], caps: tuple[int, ...]) -> tuple[int, ...]:
    largest = max(weights) or 1.0
    exact = [round(weight / largest * _STEPS) for weight in weights]
    parts, rest, open_parts = list(caps), min(total, sum(caps)), list(range(len(caps)))
    while True:
        shares = (
            {i: exact[i] for i in open_parts} if any(exact[i] for i in open_parts) else dict.fromkeys(open_parts, 1)
        )
        mass = sum(shares.values())
        full = {i for i, share in shares.items() if rest * share >= caps[i] * mass}
        if not full:
            break
        rest -= sum(caps[i] for i in full)
        open_parts = [i for i in open_parts if i not in full]
    for i, share in shares.items():
        parts[i] = rest * share // mass
    remaining = rest - sum(parts[i] for i in shares)
    for i in sorted(shares, key=lambda i: (-(rest * shares[i] % mass), i))[:remaining]:
        parts[i] += 1
    return tuple(parts)


def window_attention(view: CacheView, window: int, rule: str) -> tuple[Tensor, Tensor]:
    """Attention of the last queries, for rules that weigh layers by it.

    Args:
        view: one layer.
        window: how many of the last queries; a context that is shorter has fewer.
        rule: the allocation's name, for the refusal.

    Returns:
        The attention, `[batch, query_heads, window, tokens]` float32; and which queries there are, `[batch, window]`
        bool: rows that have seen fewer tokens have fewer queries.

    Raises:
        UserError: the view does not hold the queries.
    """
    wanted = min(window, int(view.seen.max()))
    stored = 0 if view.queries is None else view.queries.shape[2]
    if stored < wanted:
        raise UserError(
            f"allocation {rule!r} reads the last {wanted} queries and layer {view.layer} holds {stored}: "
            f"make the cache with that allocation, or record with --window {window}"
        )
    attention = view.attention(wanted)
    ages = attention.new_ones(wanted).cumsum(0).flip(0)
    return attention, ages <= view.seen[:, None]
