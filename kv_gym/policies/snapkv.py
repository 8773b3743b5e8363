"""SnapKV: the attention that the last few prompt queries pay, smoothed over neighbouring tokens.

Paper: arXiv 2404.14469 (NeurIPS 2024), section 4.
Differs from the paper in: one score per KV head, the mean over its query heads (the paper repeats the keys);
the observation window shrinks with small budgets, as every protection here does.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from kv_gym.cache_view import CacheView, group_mean
from kv_gym.policies.base import Policy


@dataclass(frozen=True)
class SnapKV(Policy):
    """Mean attention of the last `window` queries, pooled over `kernel` neighbours; the window itself is kept."""

    window: int = 32
    kernel: int = 5

    @property
    def needs_queries(self) -> int:
        return self.window

    @property
    def protection(self) -> tuple[int, int]:
        return 0, self.window

    def score(self, view: CacheView) -> Tensor:
        received = group_mean(view.attention(self.window).mean(2), view.keys.shape[1])
        received = received.masked_fill(~view.valid, 0.0)
        # zero padding counted in the mean, as in the reference code
        return F.avg_pool1d(received.flatten(0, 1)[:, None], self.kernel, 1, self.kernel // 2)[:, 0].view_as(received)
