"""SnapKV: the attention that the last few prompt queries pay, smoothed over neighbouring tokens.

Paper: arXiv 2404.14469 (NeurIPS 2024), section 4, with the window and kernel of its model patches.
Differs from the paper in: one score per KV head, the mean over its query heads (the paper repeats the keys);
the observation window shrinks with small budgets, as every protection here does, so its own tokens have scores too.
Comparisons in other papers often use `pooling="max", kernel=7`, and Ada-KV's code offers `reduce="max"`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.policies.base import Policy
from kv_gym.policies.scoring.neighbours import refuse_window, smooth


@dataclass(frozen=True)
class SnapKV(Policy):
    """Mean attention of the last `window` queries, pooled over `kernel` neighbours; the window itself is kept.

    `pooling` over neighbours is avg or max, and `reduce` over the query heads of a KV head mean or max.
    """

    comparable = True
    prompt_only = True
    window: int = 32
    kernel: int = 5
    pooling: str = "avg"
    reduce: str = "mean"

    def __post_init__(self) -> None:
        refuse_window(self.name, self.window, self.kernel)
        if self.pooling not in ("avg", "max") or self.reduce not in ("mean", "max"):
            raise UserError(
                f"snapkv got pooling={self.pooling!r}, reduce={self.reduce!r}; expected avg or max, and mean or max"
            )

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
        received = attention.sum(2) / view.seen.clamp(max=window)[:, None, None]
        pooled = smooth(received, view, window, self.kernel, self.pooling)
        pooled = pooled.unflatten(1, (view.keys.shape[1], -1))
        return pooled.mean(2) if self.reduce == "mean" else pooled.amax(2)
