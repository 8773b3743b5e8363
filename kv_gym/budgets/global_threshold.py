"""One threshold over all slots of the model: a head may keep nothing, or all it has; the total is exact.

Source: kv_gym's own trials; with equal budgets per head the same scores need about three times the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.budgets.allocation import ScoredLayer
from kv_gym.budgets.thresholds import ThresholdAllocation, highest


@dataclass(frozen=True)
class GlobalThreshold(ThresholdAllocation):
    """The best slots of the whole model, wherever they are."""

    whole_model = True

    @property
    def rule(self) -> str:
        return "global"

    def slots(self, layers: Sequence[ScoredLayer]) -> list[Tensor]:
        return [kept.sum(-1) for kept in self.kept(layers)]

    def kept(self, layers: Sequence[ScoredLayer]) -> list[Tensor]:
        sizes = [layer.priorities[0].numel() for layer in layers]
        rows = torch.cat([layer.priorities.flatten(1) for layer in layers], 1)
        totals = torch.stack([layer.view.budget.sum(1) for layer in layers]).sum(0)
        kept = torch.stack([highest(row, int(total)) for row, total in zip(rows, totals, strict=True)])
        return [part.view_as(layer.priorities) for part, layer in zip(kept.split(sizes, 1), layers, strict=True)]
