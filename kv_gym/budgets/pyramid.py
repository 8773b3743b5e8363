"""PyramidKV: early layers spread their attention and get many slots, late ones few, in an arithmetic sequence.

`beta` is as in its code.
Differs from the code in: numbers are rounded so that the total is exact (the code's integer divisions lose some
slots); where the first layer's number exceeds the context the sequence becomes flatter, also for contexts shorter
than twice the budget, which the code divides equally; protected slots of any policy take the place of its window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kv_gym.budgets.allocation import ScoredLayer
from kv_gym.budgets.layer_shares import LayerShares
from kv_gym.errors import UserError
from kv_gym.policies.base import Paper


@dataclass(frozen=True)
class Pyramid(LayerShares):
    """From nearly twice the mean in the first layer down to 1 / `beta` of the mean in the last."""

    paper = Paper("PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", "2406.02069")
    beta: float = 20.0

    def __post_init__(self) -> None:
        if not self.beta >= 1:
            raise UserError(f"pyramid got beta={self.beta}; expected a number from 1, at which all layers are alike")

    @property
    def rule(self) -> str:
        return "pyramid"

    def weights(self, layers: Sequence[ScoredLayer], free: Sequence[int], capacity: Sequence[int]) -> list[list[float]]:
        count = layers[0].layer_count
        rows = []
        for mean, cap in zip(free, capacity, strict=True):
            high = min(2 * mean - mean / self.beta, cap)
            step = 2 * (high - mean) / max(1, count - 1)
            rows.append([high - ordinal * step if count > 1 else 1.0 for ordinal in range(count)])
        return rows
