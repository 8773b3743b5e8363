"""SnapKV: the attention that the last few prompt queries pay, smoothed over neighbouring tokens.

Paper: arXiv 2404.14469 (NeurIPS 2024), section 4.
Differs from the paper in: one score per KV head, the mean over its query heads (the paper repeats the keys);
the observation window shrinks with small budgets, as every protection here does, so its own tokens have scores too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kv_gym.cache_view import CacheView, group_mean
from kv_gym.errors import UserError
from kv_gym.policies.base import Policy


@dataclass(frozen=True)
class SnapKV(Policy):
    """Mean attention of the last `window` queries, pooled over `kernel` neighbours; the window itself is kept."""

    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError(f"snapkv got window={self.window}, kernel={self.kernel}; expected both above 0, kernel odd")

    @property
    def needs_queries(self) -> int:
        return self.window

    @property
    def protection(self) -> tuple[int, int]:
        return 0, self.window

    def score(self, view: CacheView) -> Tensor:
        attention = view.attention(self.window)
        received = group_mean(attention.mean(2), view.keys.shape[1])
        order = view.positions.argsort(-1)  # neighbours in the text, however the slots lie
        received = received.gather(-1, order)
        # the paper drops the window before it pools, so neither side smooths into the other
        recent = view.age.gather(-1, order) < attention.shape[2]
        pooled = torch.where(recent, self._pool(received * recent), self._pool(received * ~recent))
        return torch.empty_like(pooled).scatter_(-1, order, pooled)

    def _pool(self, received: Tensor) -> Tensor:
        # zero padding counted in the mean, as in the reference code
        return F.avg_pool1d(received.flatten(0, 1)[:, None], self.kernel, 1, self.kernel // 2)[:, 0].view_as(received)
