"""Rules that give layers different numbers of slots, and leave the heads of a layer to another rule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from kv_gym.budgets.allocation import Allocation, RowCounts, ScoredLayer, Uniform
from kv_gym.budgets.order import inverse_permutation
from kv_gym.cache_view import CacheView
from kv_gym.devices import number_tensor, to_device
from kv_gym.errors import UserError
from kv_gym.policies.base import Policy

_STEPS = 2**30  # weights are rounded to this many parts of the largest; times a total they still fit into int64


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
    def weights(
        self, layers: Sequence[ScoredLayer], free: Sequence[int], capacity: Sequence[int]
    ) -> list[list[float]] | Tensor:
        """What the layers of the model get, in proportion: for each row one number per evicting layer of the model.

        A rule with `whole_model` gives them as a tensor `[batch, layers]` float64, and no layer then gets more than it
        holds.

        Args:
            layers: as in :meth:`slots`.
            free: slots per head on average, per row, without the protected ones.
            capacity: slots that a head can take in addition to its protected ones, per row.
        """

    def slots(self, layers: Sequence[ScoredLayer]) -> list[Tensor]:
        first, device = layers[0], layers[0].priorities.device
        protected, free = _protected_and_free(first.row_counts)
        capacity = [row.seen - count for row, count in zip(first.row_counts, protected, strict=True)]
        weights = self.weights(layers, free, capacity)
        if isinstance(weights, Tensor):  # how many slots each layer holds matters, and only the device knows it
            held = torch.stack([_slots_per_head(layer.view, device) for layer in layers], 1)
            columns = list(self.divide(first.row_counts, first.layer_count, weights, held).unbind(1))
        else:
            front = number_tensor(protected, device)
            parts = [
                apportion(slots * first.layer_count, row, [cap] * first.layer_count)
                for slots, row, cap in zip(free, weights, capacity, strict=True)
            ]  # fmt: skip
            columns = [front + number_tensor([row[layer.ordinal] for row in parts], device) for layer in layers]
        return [self.slots_within(*pair) for pair in zip(layers, columns, strict=True)]

    def divide(self, row_counts: Sequence[RowCounts], layer_count: int, weights: Tensor, held: Tensor) -> Tensor:
        """The model's total divided among some layers, by weights: slots per head, `[batch, layers]` int64.

        Args:
            row_counts: of the rows.
            layer_count: evicting layers of the model.
            weights: `[batch, layers]` float64 of the layers among which it is divided.
            held: `[batch, layers]` int64, slots per head that each of them holds, and gets at most.
        """
        protected, free = _protected_and_free(row_counts)
        front = number_tensor(protected, weights.device)[:, None]
        totals = number_tensor([slots * layer_count for slots in free], weights.device)
        return front + apportion_rows(totals, weights, (held - front).clamp(min=0))

    def slots_within(self, layer: ScoredLayer, share: Tensor) -> Tensor:
        """Slots of each head, `[batch, kv_heads]`, of a layer that gets `share [batch]` slots per head."""
        return self.within.slots([_with_share(layer, share)])[0]


def _protected_and_free(row_counts: Sequence[RowCounts]) -> tuple[list[int], list[int]]:
    """Slots per head that are protected, and those beyond them of an equal share of the total, per row."""
    mean = [min(row.budget, row.seen) for row in row_counts]
    protected = [min(row.protected, slots) for row, slots in zip(row_counts, mean, strict=True)]
    return protected, [slots - count for slots, count in zip(mean, protected, strict=True)]


def _slots_per_head(view: CacheView, device: torch.device) -> Tensor:
    """Slots that a layer holds per head, rounded down, `[batch]`."""
    return to_device(view.valid.sum((1, 2)) // view.valid.shape[1], device)


def _with_share(layer: ScoredLayer, share: Tensor) -> ScoredLayer:
    share = to_device(share, layer.view.budget.device)
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
    exact = torch.tensor([weights], dtype=torch.float64)
    return tuple(apportion_rows(torch.tensor([total]), exact, torch.tensor([caps], dtype=torch.int64))[0].tolist())


def apportion_rows(totals: Tensor, weights: Tensor, caps: Tensor) -> Tensor:
    """:func:`apportion` for rows, where their tensors are: an accelerator is not waited for.

    Args:
        totals: `[rows]` int64.
        weights: `[rows, parts]` float64.
        caps: `[rows, parts]` int64.

    Returns:
        `[rows, parts]` int64.
    """
    largest = weights.amax(1, keepdim=True)
    exact = (weights / torch.where(largest > 0, largest, 1.0) * _STEPS).round().long()
    rest = torch.minimum(totals, caps.sum(1))[:, None]
    is_open = torch.ones_like(caps, dtype=torch.bool)
    for _ in range(caps.shape[1]):  # a round closes a part at least, or changes nothing
        left, shares, mass = _open_shares(rest, exact, caps, is_open)
        full = is_open & (left * shares >= caps * mass)
        if full.device.type == "cpu" and not bool(full.any()):
            break
        is_open = is_open & ~full
    left, shares, mass = _open_shares(rest, exact, caps, is_open)
    parts = torch.where(is_open, left * shares // mass, caps)
    remainders = torch.where(is_open, left * shares % mass, -1)
    remaining = rest - parts.sum(1, keepdim=True)
    return parts + (inverse_permutation(remainders.argsort(dim=1, descending=True, stable=True)) < remaining).long()


def _open_shares(rest: Tensor, exact: Tensor, caps: Tensor, is_open: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the full parts leave `[rows, 1]`, how the open ones share it `[rows, parts]`, and the sum of these."""
    shares = exact * is_open
    shares = torch.where(shares.sum(1, keepdim=True) > 0, shares, is_open.long())
    return rest - (caps * ~is_open).sum(1, keepdim=True), shares, shares.sum(1, keepdim=True).clamp(min=1)


def window_attention(layer: ScoredLayer, window: int, rule: str) -> tuple[Tensor, Tensor]:
    """Attention of the last queries, for rules that weigh layers by it.

    Args:
        layer: whose queries.
        window: how many of the last queries; a context that is shorter has fewer.
        rule: the allocation's name, for the refusal.

    Returns:
        The attention, `[batch, query_heads, window, tokens]` float32; and which queries there are, `[batch, window]`
        bool: rows that have seen fewer tokens have fewer queries.

    Raises:
        UserError: the view does not hold the queries.
    """
    view = layer.view
    wanted = min(window, max(row.seen for row in layer.row_counts))
    stored = 0 if view.queries is None else view.queries.shape[2]
    if stored < wanted:
        raise UserError(
            f"allocation {rule!r} reads the last {wanted} queries and layer {view.layer} holds {stored}: "
            f"make the cache with that allocation, or record with --window {window}"
        )
    attention = view.attention(wanted)
    ages = attention.new_ones(wanted).cumsum(0).flip(0)
    return attention, ages <= view.seen[:, None]
