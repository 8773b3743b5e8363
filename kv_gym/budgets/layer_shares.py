"""Rules that give layers different numbers of slots, and leave the heads of a layer to another rule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kv_gym.budgets.allocation import Allocation, Layer
from kv_gym.budgets.rounding import deal
from kv_gym.budgets.uniform import Uniform
from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Policy


@dataclass(frozen=True)
class LayerShares(Allocation):
    """Deals the model's total out to layers, then each layer's among its heads.

    Protected slots come first: every head has room for them, and what is left is dealt by weights. No layer gets more
    than it can hold. A rule that looks at all layers is exact to the slot; one that cuts layer after layer too, as
    long as a layer's share grows no faster than tokens come (otherwise it is filled up as they come).

    Attributes:
        within: divides a layer's slots among its heads.
    """

    own_totals = True
    within: Allocation = field(default_factory=Uniform)

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
    def weights(self, layers: Sequence[Layer], free: Sequence[int], most: Sequence[int]) -> list[list[float]]:
        """What the layers of the model get, in proportion: for each row one number per evicting layer of the model.

        Args:
            layers: as in :meth:`slots`.
            free: slots per head on average, per row, protected ones not counted.
            most: the most that a head can take beside its protected ones, per row.
        """

    def slots(self, layers: Sequence[Layer]) -> list[Tensor]:
        count, first = layers[0].layers, layers[0].view
        seen = first.seen.tolist()
        room = [min(budget, n) for budget, n in zip(first.budget[:, 0].tolist(), seen, strict=True)]
        guarded = [0] * len(room) if layers[0].guarded is None else layers[0].guarded.tolist()
        guarded = [min(some, slots) for some, slots in zip(guarded, room, strict=True)]
        free = [slots - some for slots, some in zip(room, guarded, strict=True)]
        most = [n - some for n, some in zip(seen, guarded, strict=True)]
        held = _held(layers) if self.whole_model else [[n] * count for n in seen]
        shares = [
            [guarded[row] + slots for slots in deal(free[row] * count, weights, caps)]
            for row, weights in enumerate(self.weights(layers, free, most))
            for caps in [[max(0, slots - guarded[row]) for slots in held[row]]]
        ]
        return [self.within.slots([_with_share(layer, [row[layer.place] for row in shares])])[0] for layer in layers]


def _held(layers: Sequence[Layer]) -> list[list[int]]:
    """Slots that each layer holds per head, rounded down; one list per row."""
    held = torch.stack([layer.view.valid.sum((1, 2)) // layer.view.valid.shape[1] for layer in layers], 1)
    return held.tolist()


def _with_share(layer: Layer, share: list[int]) -> Layer:
    budget = torch.tensor(share, device=layer.view.budget.device)[:, None].expand_as(layer.view.budget)
    return replace(layer, view=layer.view.with_budget(budget))
