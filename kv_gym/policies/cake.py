"""CAKE: the attention of the last queries, and how much it shifts from one of them to the next.

Paper: arXiv 2503.12491 (ICLR 2025), the indicator of tokens, with the settings of its code: mean plus 200 times the
unbiased variance over the window's queries, smoothed over 5 neighbours.
Differs from the paper in: how layers share the budget is an allocation, not part of the score; while decoding the same
score is used (the code takes the newest query's attention alone); the window shrinks with small budgets, as every
protection here does, so its own tokens have scores too.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kv_gym.cache_view import CacheView, group_mean
from kv_gym.policies.base import Policy
from kv_gym.policies.scoring.attention_hits import query_positions
from kv_gym.policies.scoring.neighbours import refuse_window, smooth


@dataclass(frozen=True)
class CAKE(Policy):
    """Mean + `gamma` * variance of the last `window` queries' attention, pooled over `kernel` neighbours."""

    comparable = True
    window: int = 32
    kernel: int = 5
    gamma: float = 200.0

    def __post_init__(self) -> None:
        refuse_window(self.name, self.window, self.kernel)

    @property
    def needs_queries(self) -> int:
        return self.window

    @property
    def protection(self) -> tuple[int, int]:
        return 0, self.window

    def score(self, view: CacheView) -> Tensor:
        attention = view.attention(self.window)
        window = attention.shape[2]
        # a row that has seen fewer tokens has fewer queries
        queries = view.seen.clamp(max=window)[:, None, None]
        real = (query_positions(view, window) >= 0)[:, None, :, None]
        mean = attention.sum(2) / queries
        variance = ((attention - mean[:, :, None]) * real).square().sum(2) / (queries - 1).clamp(min=1)
        return smooth(group_mean(mean + self.gamma * variance, view.keys.shape[1]), view, window, self.kernel)
