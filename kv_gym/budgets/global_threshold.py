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
from kv_gym.devices import to_device


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
        device = layers[0].priorities.device  # the layers of a model may lie on several
        rows = torch.cat([to_device(layer.priorities.flatten(1), device) for layer in layers], 1)
        totals = torch.stack([to_device(layer.view.budget.sum(1), device) for layer in layers]).sum(0)
        parts = zip(highest(rows, totals).split(sizes, 1), layers, strict=True)
        return [to_device(part.view_as(layer.priorities), layer.priorities.device) for part, layer in parts]
