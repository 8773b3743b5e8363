"""DropKV: the squared change of the attention output that each token's loss would cause, over the last queries.

For a query with weights p and output y,
losing slot j moves the output by p_j / (1 - p_j) * (y - v_j). Its square is summed over the last `window` queries,
averaged over the query heads of the KV head and pooled over neighbouring tokens; the window is kept. Defaults are
those of the authors' code (window 8, kernel 11); kvpress has 32 and 7.
Differs from the paper in: the weights stay in float32, so a sink's 1 - p is not rounded to zero; scored once, after
the prompt or whenever the trigger fires.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Paper, WindowPolicy
from kv_gym.policies.scoring.neighbours import smooth


@dataclass(frozen=True)
class DropKV(WindowPolicy):
    """Pooled squared change of the KV head's output. Not comparable: every head's values have a scale of their own.

    Attributes:
        window: queries that are summed over, and recent tokens that are kept.
        kernel: tokens that are pooled, odd.
        epsilon: added to 1 - p.
    """

    paper = Paper("DropKV", venue="NeurIPS 2026", url="https://openreview.net/forum?id=UVbaJoD3Qa")
    prompt_only = True
    window: int = 8
    kernel: int = 11
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        self._require_window(self.kernel)
        self._require(self.epsilon > 0, "epsilon above 0")

    def score(self, view: CacheView) -> Tensor:
        heads = view.keys.shape[1]
        values = view.values.float()
        attention = view.attention(self.window)
        group = attention.shape[1] // heads
        attention = attention.unflatten(1, (heads, group)).flatten(2, 3)  # [B, H, g * m, n]
        # differences one by one: where p is almost 1 the odds are a million, and so is what an expanded square loses
        distance = torch.cdist(attention @ values, values, compute_mode="donot_use_mm_for_euclid_dist")
        change = distance.mul_(attention).div_(1 - attention + self.epsilon).square_().sum(2)
        return smooth(change / group, view, 0, self.kernel)
