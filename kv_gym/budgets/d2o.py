"""D2O's layer rule: many slots where attention is spread evenly over tokens, few where it is concentrated.

The formula is that of its code: the variance over tokens of the
attention that each received, min-max normalised over query heads, averaged; layers share by the softmax of minus that.
Differs from the code in: attention is that of the last `window` queries instead of the whole prompt's, which is
not kept; no layer is exempt (the code leaves two first layers and the last one full, outside of the budget);
numbers are rounded so that the total is exact. The paper's text has two sizes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.budgets.allocation import ScoredLayer
from kv_gym.budgets.layer_shares import LayerShares, window_attention
from kv_gym.devices import to_device
from kv_gym.errors import UserError
from kv_gym.policies.base import Paper


@dataclass(frozen=True)
class D2OShares(LayerShares):
    """Slots in proportion to exp(- normalised variance) of the last `window` queries' attention."""

    whole_model = True
    paper = Paper(
        "D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of Large Language Models",
        "2406.13035", venue="ICLR 2025",
    )  # fmt: skip
    window: int = 32

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UserError(f"d2o got window={self.window}; expected at least one query")

    @property
    def rule(self) -> str:
        return "d2o"

    @property
    def needs_queries(self) -> int:
        return self.window

    def weights(self, layers: Sequence[ScoredLayer], free: Sequence[int], capacity: Sequence[int]) -> Tensor:
        device = layers[0].priorities.device
        return torch.stack([to_device((-self._spread(layer)).exp(), device) for layer in layers], 1)

    def _spread(self, layer: ScoredLayer) -> Tensor:
        """Variance over tokens, `[batch]` float64 in [0, 1]."""
        attention, _ = window_attention(layer, self.window, self.rule)
        group = attention.shape[1] // layer.view.valid.shape[1]
        valid = layer.view.valid.repeat_interleave(group, 1)
        received = attention.sum(2).double()  # [batch, query_heads, tokens], zero where not valid
        count = valid.sum(-1)
        mean = received.sum(-1) / count.clamp(min=1)
        variance = ((received - mean[..., None]).square() * valid).sum(-1) / (count - 1).clamp(min=1)
        lowest, highest = variance.amin(-1, keepdim=True), variance.amax(-1, keepdim=True)
        return ((variance - lowest) / (highest - lowest + 1e-6)).mean(-1)
