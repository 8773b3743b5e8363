"""CAKE's layer preference: many slots where attention is spread over the context and shifts from query to query.

Preference is the entropy of the window's attention on older
tokens to the power 1 / `tau1`, times its variance over the window's queries to the power 1 / `tau2`.
With ``cake:cascade`` a live cache cuts earlier layers while later ones are read (:mod:`kv_gym.live.cascade`); with
``cake`` all layers stay full until the last one is read, with the same result.
Differs from the paper in: what a full layer cannot take goes to the others in proportion (its code spreads it equally);
protected slots of any policy take the place of its window; both powers are 1 unless given (its authors tuned them per
model and budget).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.budgets.allocation import Allocation, ScoredLayer
from kv_gym.budgets.layer_shares import LayerShares, window_attention
from kv_gym.devices import to_device
from kv_gym.errors import UserError
from kv_gym.policies.base import Paper


@dataclass(frozen=True)
class Cake(LayerShares):
    """Slots in proportion to entropy^(1 / `tau1`) * variance^(1 / `tau2`) of the last `window` queries' attention.

    Attributes:
        cascade: a live cache cuts layers while later ones are read.
    """

    whole_model = True
    syntax = "[:cascade]"
    paper = Paper(
        "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences", "2503.12491", venue="ICLR 2025"
    )
    window: int = 32
    tau1: float = 1.0
    tau2: float = 1.0
    cascade: bool = False

    def __post_init__(self) -> None:
        if self.window < 2 or not min(self.tau1, self.tau2) > 0:
            raise UserError(
                f"cake got window={self.window}, tau1={self.tau1}, tau2={self.tau2}; expected at least two queries "
                "and powers above 0"
            )

    @classmethod
    def parse(cls, setting: str, within: Allocation) -> Allocation | None:
        return cls(within, cascade=setting == "cascade") if setting in ("", "cascade") else None

    @property
    def rule(self) -> str:
        return "cake:cascade" if self.cascade else "cake"

    @property
    def cascades(self) -> bool:  # type: ignore[override]
        """Whether a live cache cuts layers while later ones are read."""
        return self.cascade

    @property
    def needs_queries(self) -> int:
        return self.window

    def weights(self, layers: Sequence[ScoredLayer], free: Sequence[int], capacity: Sequence[int]) -> Tensor:
        device = layers[0].priorities.device
        return torch.stack([to_device(self.preference(layer), device) for layer in layers], 1)

    def preference(self, layer: ScoredLayer) -> Tensor:
        """The weight of a layer, `[batch]` float64."""
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
