"""MPCache: keep the tokens that any of the last fifth of the prompt's queries attends to, the same in all heads.

The paper's static pass after the prompt.
Differs from the paper in: the budget decides how many stay, by the largest attention that a token got from a query (the
paper keeps what passes a threshold of each data set); at most `window` queries count; attention is the
model's own (the code neither scales the products nor masks later keys); selecting clusters at each step, which
deletes nothing, is not part of the score; where heads hold different tokens, a token's absence from a head
counts as no attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kv_gym.cache_view import CacheView, group_mean
from kv_gym.policies.base import Paper, Policy
from kv_gym.policies.scoring.neighbours import mean_over_heads


@dataclass(frozen=True)
class MPCache(Policy):
    """Largest attention, averaged over heads, that the last `share` of all queries pay, at most `window` of them."""

    paper = Paper(
        "MPCache: MPC-Friendly KV Cache Eviction for Efficient Private LLM Inference",
        "2501.06807",
        venue="NeurIPS 2025",
    )
    comparable = True
    prompt_only = True
    share: float = 0.2
    window: int = 32

    def __post_init__(self) -> None:
        self._require(0 < self.share <= 1 and self.window >= 1, "share in (0, 1] and window from 1")

    @property
    def needs_queries(self) -> int:
        return self.window

    def score(self, view: CacheView) -> Tensor:
        attention = view.attention(self.window)
        received = mean_over_heads(group_mean(attention, view.keys.shape[1]), view)
        first = view.seen - (view.seen * self.share).ceil().long().clamp(min=1)
        counted = view.query_positions(attention.shape[2]) >= first[:, None]
        return (received * counted[:, None, :, None]).amax(2)
