"""Ada-KV: one threshold over the heads of each layer, so that heads with spread attention get more slots.

Differs from the paper in: the safeguard is a floor, every head keeps its own best `alpha` share of an equal budget and
one threshold decides on the rest, as kvpress does it; the paper mixes the counts that the threshold gives with equal
ones. Scores must be comparable or made so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kv_gym.budgets.allocation import ScoredLayer
from kv_gym.budgets.order import top_mask
from kv_gym.budgets.thresholds import ThresholdAllocation, highest
from kv_gym.errors import UserError
from kv_gym.policies.base import Paper

_HIGHEST = 2**63 - 1


@dataclass(frozen=True)
class Ada(ThresholdAllocation):
    """The best slots of the layer, whichever heads they are in; the layer's total is exact.

    Attributes:
        alpha: the share of an equal budget that every head has for certain; 1 is uniform.
    """

    paper = Paper(
        "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference", "2407.11550",
        venue="NeurIPS 2025",
    )  # fmt: skip
    alpha: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"ada got alpha={self.alpha}; expected a share from 0 to 1")

    @property
    def rule(self) -> str:
        return "ada"

    def slots(self, layers: Sequence[ScoredLayer]) -> list[Tensor]:
        return [self._divided(layer) for layer in layers]

    def _divided(self, layer: ScoredLayer) -> Tensor:
        budget = layer.view.budget
        floor = (budget.double() * self.alpha + 1e-6).long()  # the tiny term keeps 0.2 * 15 at 3
        priorities = layer.priorities.masked_fill(top_mask(layer.priorities, floor), _HIGHEST)
        return highest(priorities.flatten(1), budget.sum(1)).view_as(priorities).sum(-1)
