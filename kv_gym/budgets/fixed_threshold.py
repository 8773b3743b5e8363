"""A threshold that the caller names: a head keeps every slot that scores above it, whatever the budget.

As KVzap (arXiv 2601.07891) and Attention-Gate (arXiv 2410.12876) decide: the text says how much is kept, not a budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.budgets.allocation import Allocation, ScoredLayer
from kv_gym.budgets.calibrated import refuse_no_scale
from kv_gym.budgets.order import LOWEST, sortable
from kv_gym.devices import to_device
from kv_gym.policies.base import Policy


@dataclass(frozen=True)
class FixedThreshold(Allocation):
    """Keeps the slots that score above `threshold`, in units of the policy's scores; protected ones stay in any case.

    Every layer is cut as soon as it has been read. The budget only says whether a row is cut: with one for all tokens
    (1.0, or as many slots as there are tokens) everything stays. ``cache.kept()`` and ``cache.nbytes()`` give what is
    kept.
    """

    own_totals = True
    syntax = ":SCORE"
    threshold: float = 0.0

    @classmethod
    def parse(cls, setting: str, within: Allocation) -> Allocation | None:
        try:
            threshold = float(setting)
        except ValueError:
            return None
        return cls(threshold) if math.isfinite(threshold) else None

    @property
    def name(self) -> str:
        return f"threshold:{self.threshold:g}"

    def refuse_unfit(self, policy: Policy) -> None:
        refuse_no_scale(policy)

    def slots(self, layers: Sequence[ScoredLayer]) -> list[Tensor]:
        return [self._above(layer) for layer in layers]

    def _above(self, layer: ScoredLayer) -> Tensor:
        whole = torch.tensor([row.budget >= row.seen for row in layer.row_counts])
        edge = int(sortable(torch.tensor([self.threshold]))[0] + 1) << 31
        least = to_device(torch.where(whole, LOWEST + 1, edge), layer.priorities.device)[:, None, None]
        return (layer.priorities >= least).sum(-1)
