"""R-KV: attention of the last queries, less how much a key repeats other keys.

The settings are those of the paper's command line: 0.1 of importance less 0.9 of redundancy. Importance:
products maximal over the query heads, softmax over keys older than the window, mean over 8 queries, maximum over 7
neighbours. Redundancy: softmax of the mean cosine to all keys; of the keys that are like a key, the newest is not
charged for it.
Differs from the paper in: a key that is like no other excuses nobody (the code excuses its first key); the window
shrinks with small budgets, as every protection here does, so its tokens have an importance too, from a softmax of
their own; rows of similarities are computed in chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Paper, WindowPolicy
from kv_gym.policies.scoring.neighbours import smooth

_CHUNK = 32  # keys compared with all others at a time


@dataclass(frozen=True)
class RKV(WindowPolicy):
    """`importance` of the attention score and the rest of the redundancy; quadratic in tokens, linear in memory.

    Attributes:
        window: last queries, whose tokens are kept.
        kernel: neighbours over which importance is maximal; odd.
        importance: weight of importance (lambda in the paper).
        threshold: cosine above which two keys are alike.
    """

    paper = Paper("R-KV: Redundancy-aware KV Cache Compression for Reasoning Models", "2505.24133")
    window: int = 8
    kernel: int = 7
    importance: float = 0.1
    threshold: float = 0.5

    def __post_init__(self) -> None:
        self._require_window(self.kernel)
        self._require(0 <= self.importance <= 1, "importance from 0 to 1")
        self._require(0 <= self.threshold < 1, "threshold from 0 to below 1")

    def score(self, view: CacheView) -> Tensor:
        return self.importance * self._importance(view) - (1 - self.importance) * self._redundancy(view)

    def _importance(self, view: CacheView) -> Tensor:
        if view.queries is None:
            raise ValueError("this view holds no queries: r_kv needs its `needs_queries`")
        queries = view.queries[:, :, -self.window :].float()
        window, d = queries.shape[2:]
        products = queries.unflatten(1, (view.keys.shape[1], -1)) @ view.keys.float().transpose(-1, -2)[:, :, None]
        logits = products.amax(2) * (d**-0.5 if view.scaling is None else view.scaling)  # [B, H, window, n]
        queried_at = view.query_positions(window)[:, None, :, None]
        visible = view.valid[:, :, None] & (view.positions[:, :, None] <= queried_at)
        recent = (view.age < window)[:, :, None]
        newer, older = (
            logits.masked_fill(~(visible & side), float("-inf")).softmax(-1).nan_to_num(0.0)
            for side in (recent, ~recent)
        )
        received = torch.where(recent, newer, older).sum(2) / view.seen.clamp(max=window)[:, None, None]
        return smooth(received, view, window, self.kernel, "max")

    def _redundancy(self, view: CacheView) -> Tensor:
        order = view.positions.argsort(-1)  # so that the newest of several is the last of them
        valid = view.valid.gather(-1, order)
        keys = view.keys.float().gather(2, order[..., None].expand_as(view.keys))
        unit = F.normalize(keys, dim=-1) * valid[..., None]
        others = unit.transpose(-1, -2)
        # every key's cosines summed: the product with the sum of all keys, less that with itself
        total = (unit.sum(2, keepdim=True) @ others)[:, :, 0] - unit.square().sum(-1)
        places = torch.arange(unit.shape[2], device=unit.device, dtype=torch.int32)
        for start in range(0, unit.shape[2], _CHUNK):
            cosines = unit[:, :, start : start + _CHUNK] @ others  # [B, H, chunk, n]
            cosines.diagonal(start, -2, -1).zero_()
            newest = torch.where(cosines > self.threshold, places, -1).amax(-1, keepdim=True).long()
            spared = cosines.gather(-1, newest.clamp(min=0)) * (newest >= 0)
            total.scatter_add_(-1, newest.clamp(min=0)[..., 0], -spared[..., 0])
        mean = total / valid.sum(-1, keepdim=True).clamp(min=1)
        redundancy = mean.masked_fill(~valid, float("-inf")).softmax(-1).nan_to_num(0.0)
        return torch.empty_like(redundancy).scatter_(-1, order, redundancy)
