"""Ada-KV: one threshold over the heads of each layer, so that heads with spread attention get more slots.

Paper: arXiv 2407.11550 (NeurIPS 2025).
Differs from the paper in: the safeguard is a floor, every head keeps its own best `alpha` share of an equal budget and
one threshold decides on the rest, as kvpress does it; the paper mixes the counts that the threshold gives with equal
ones. Scores must be comparable or made so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.budgets.allocation import Allocation, Layer
from kv_gym.budgets.global_threshold import best, refuse_incomparable
from kv_gym.budgets.normalisation import NORMALISATIONS
from kv_gym.budgets.selection import top
from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.policies.base import Policy

_HIGHEST = 2**63 - 1


@dataclass(frozen=True)
class Ada(Allocation):
    """The best slots of the layer, whichever heads they are in; the layer's total is exact.

    Attributes:
        normalisation: how scores are made comparable across heads, or "" to compare them as they are.
        alpha: the share of an equal budget that every head has for certain; 1 is uniform.
    """

    normalisation: str = ""
    alpha: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"ada got alpha={self.alpha}; expected a share from 0 to 1")

    @property
    def name(self) -> str:
        return f"ada:{self.normalisation}" if self.normalisation else "ada"

    def refuse_unfit(self, policy: Policy) -> None:
        refuse_incomparable(policy, self.normalisation, self.name)

    def compared(self, scores: Tensor, view: CacheView) -> Tensor:
        return NORMALISATIONS[self.normalisation](scores, view) if self.normalisation else scores

    def slots(self, layers: Sequence[Layer]) -> list[Tensor]:
        return [self._divided(layer) for layer in layers]

    def _divided(self, layer: Layer) -> Tensor:
        budget = layer.view.budget
        floor = (budget.double() * self.alpha + 1e-6).long()  # the tiny term keeps 0.2 * 15 at 3
        merits = layer.merits.masked_fill(top(layer.merits, floor), _HIGHEST)
        rows = zip(merits.flatten(1), budget.sum(1).tolist(), strict=True)
        return torch.stack([best(row, total) for row, total in rows]).view_as(merits).sum(-1)
