"""CAKE's layer preference: many slots where attention is spread over the context and shifts from query to query.

Preference is the entropy of the window's attention on older
tokens to the power 1 / `tau1`, times its variance over the window's queries to the power 1 / `tau2`.
Differs from the paper in: all layers stay full until the last one is read (the paper shrinks earlier layers on the way,
with the same result except for clipping); protected slots of any policy take the place of its window; both
powers are 1 unless given (its authors tuned them per model and budget).
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
class Cake(LayerShares):
    """Slots in proportion to entropy^(1 / `tau1`) * variance^(1 / `tau2`) of the last `window` queries' attention."""

    whole_model = True
    paper = Paper(
        "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences", "2503.12491", venue="ICLR 2025"
    )
    window: int = 32
    tau1: float = 1.0
    tau2: float = 1.0

    def __post_init__(self) -> None:
        if self.window < 2 or not min(self.tau1, self.tau2) > 0:
            raise UserError(
                f"cake got window={self.window}, tau1={self.tau1}, tau2={self.tau2}; expected at least two queries "
                "and powers above 0"
            )

    @property
    def rule(self) -> str:
        return "cake"

    @property
    def needs_queries(self) -> int:
        return self.window

    def weights(self, layers: Sequence[ScoredLayer], free: Sequence[int], capacity: Sequence[int]) -> Tensor:
        device = layers[0].priorities.device
        return torch.stack([to_device(self._preference(layer), device) for layer in layers], 1)

    def _preference(self, layer: ScoredLayer) -> Tensor:
        """`[batch]` float64."""
        attention, real = window_attention(layer, self.window, self.rule)
        older = layer.view.age >= self.window  # [batch, kv_heads, tokens], as the window's own tokens are always kept
        group = attention.shape[1] // older.shape[1]
        attention = attention * (older & layer.view.valid).repeat_interleave(group, 1)[:, :, None]
        entropy = (-attention * (attention + 1e-10).log()).sum((1, 2, 3)).double().clamp(min=0)
        queries = real.sum(1)
        mean = attention.sum(2, keepdim=True) / queries.clamp(min=1)[:, None, None, None]
        deviations = (attention - mean).square() * real[:, None, :, None]
        variance = (deviations.sum((1, 2, 3)) / (queries - 1).clamp(min=1)).double()
        return entropy ** (1 / self.tau1) * variance ** (1 / self.tau2)
