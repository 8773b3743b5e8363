"""CAKE: the attention of the last queries, and how much it shifts from one of them to the next.

The paper's indicator of tokens, with the settings of its code: mean plus 200 times the
unbiased variance over the window's queries, smoothed over 5 neighbours.
Differs from the paper in: how layers share the budget is an allocation, not part of the score; while decoding the same
score is used (the code takes the newest query's attention alone); the window shrinks with small budgets, as every
protection here does, so its own tokens have scores too.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kv_gym.cache_view import CacheView, group_mean
from kv_gym.policies.base import Paper, WindowPolicy
from kv_gym.policies.scoring.neighbours import smooth


@dataclass(frozen=True)
class CAKE(WindowPolicy):
    """Mean + `gamma` * variance of the last `window` queries' attention, pooled over `kernel` neighbours."""

    paper = Paper(
        "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences", "2503.12491", venue="ICLR 2025"
    )
    comparable = True
    window: int = 32
    kernel: int = 5
    gamma: float = 200.0

    def __post_init__(self) -> None:
        self._require_window(self.kernel)

    def score(self, view: CacheView) -> Tensor:
        attention = view.attention(self.window)
        window = attention.shape[2]
        # a row that has seen fewer tokens has fewer queries
        queries = view.seen.clamp(max=window)[:, None, None]
        real = (view.query_positions(window) >= 0)[:, None, :, None]
        mean = attention.sum(2) / queries
        variance = ((attention - mean[:, :, None]) * real).square().sum(2) / (queries - 1).clamp(min=1)
        return smooth(group_mean(mean + self.gamma * variance, view.keys.shape[1]), view, window, self.kernel)
