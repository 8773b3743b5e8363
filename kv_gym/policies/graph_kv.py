"""GraphKV: of near-duplicate tokens keep one: the best tokens lower the scores of similar ones.

Tokens are nodes, edges the cosine similarities e_ij of their keys.
The best tokens of the base are sources; each multiplies the scores of its `neighbours` most similar tokens, never its
own, by 1 - e_ij. One round, which by the paper's own ablation gives most of the gain.
Variant: the product, as in the text; the figure's worked example subtracts instead, and scores may turn negative.
Differs from the paper in: it names no number of neighbours ("adaptive"), here it is 8; sources are 0.3 of the budget;
similarities below zero count as zero; a base with negative scores gives the softmax of its scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Paper, Policy
from kv_gym.policies.scoring.neighbours import rank
from kv_gym.policies.wrapper import PolicyWrapper

CHUNK = 2**22  # similarities held at once


@dataclass(frozen=True)
class GraphKV(PolicyWrapper):
    """The base's scores, lowered where a better token has nearly the same key.

    Comparable where the base is: the factor has no unit, and untouched scores stay as they are.

    Attributes:
        over: the base.
        sources: share of the head's budget that become sources, at least one token.
        neighbours: tokens that each source lowers.
    """

    paper = Paper(
        "GraphKV: Breaking the Static Selection Paradigm with Graph-Based KV Cache Eviction",
        "2509.00388",
        venue="EMNLP 2025",
    )
    comparable = True
    over: str | Policy = "snapkv"
    sources: float = 0.3
    neighbours: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 < self.sources <= 1 and self.neighbours >= 1, "sources above 0 to 1, neighbours from 1")

    def score(self, view: CacheView) -> Tensor:
        scores = self.base_scores(view)
        batch, heads, n = scores.shape
        counts = (view.budget * self.sources).long().clamp(min=1)[..., None]
        largest = int(view.budget.max()) if view.largest_budget is None else view.largest_budget
        longest = min(n, int(largest * self.sources) + 1)  # a bound of the counts, however they are rounded
        sources = rank(scores, view).argsort(-1)[..., :longest]  # of equal scores the newer token, in any slot
        used = (torch.arange(longest, device=scores.device) < counts) & view.valid.gather(-1, sources)
        keys = view.keys.float()
        lengths = torch.linalg.vector_norm(keys, dim=-1).clamp_(min=1e-12)
        decay = torch.ones_like(scores)
        step = max(1, CHUNK // (batch * heads * n))
        for start in range(0, longest, step):
            chunk = sources[..., start : start + step]
            directions = keys.gather(2, chunk[..., None].expand(-1, -1, -1, keys.shape[-1]))
            directions /= lengths.gather(-1, chunk)[..., None]
            similar = directions @ keys.transpose(-1, -2) / lengths[:, :, None]  # [B, H, step, n]
            similar.masked_fill_(~view.valid[:, :, None], -1.0).scatter_(-1, chunk[..., None], -1.0)
            lowest = similar.topk(min(self.neighbours, n), -1).values[..., -1:]  # equals are neighbours too
            near = (similar >= lowest) & used[..., start : start + step, None]
            decay *= (1 - similar.masked_fill_(~near, 0.0).clamp_(0, 1 - 1e-6)).prod(2)
        return scores * decay
