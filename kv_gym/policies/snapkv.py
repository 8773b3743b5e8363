"""SnapKV: the attention that the last few prompt queries pay, smoothed over neighbouring tokens.

Window and kernel are those of the authors' model patches.
Differs from the paper in: one score per KV head, the mean over its query heads (the paper repeats the keys);
the observation window shrinks with small budgets, as every protection here does, so its own tokens have scores too.
Comparisons in other papers often use `pooling="max", kernel=7`, and Ada-KV's code offers `reduce="max"`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Paper, WindowPolicy
from kv_gym.policies.scoring.neighbours import smooth


@dataclass(frozen=True)
class SnapKV(WindowPolicy):
    """Mean attention of the last `window` queries, pooled over `kernel` neighbours; the window itself is kept.

    `pooling` over neighbours is avg or max, and `reduce` over the query heads of a KV head mean or max.
    """

    paper = Paper(
        "SnapKV: LLM Knows What You are Looking for Before Generation", "2404.14469", "section 4", venue="NeurIPS 2024"
    )
    comparable = True
    prompt_only = True
    window: int = 32
    kernel: int = 5
    pooling: str = "avg"
    reduce: str = "mean"

    def __post_init__(self) -> None:
        self._require_window(self.kernel)
        self._require(self.pooling in ("avg", "max"), "pooling avg or max")
        self._require(self.reduce in ("mean", "max"), "reduce mean or max")

    def score(self, view: CacheView) -> Tensor:
        attention = view.attention(self.window)
        window = attention.shape[2]
        # a row that has seen fewer tokens has fewer queries
        received = attention.sum(2) / view.seen.clamp(max=window)[:, None, None]
        pooled = smooth(received, view, window, self.kernel, self.pooling)
        pooled = pooled.unflatten(1, (view.keys.shape[1], -1))
        return pooled.mean(2) if self.reduce == "mean" else pooled.amax(2)
