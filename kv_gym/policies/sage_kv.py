"""SAGE-KV: the attention that the last prompt token pays picks what every later token may see.

Differs from the paper in: one score per KV head, the maximum over its query heads (the paper picks per group); the
recent part is a setting of the protection (the paper gives it half of what the sinks leave of the budget); evicting
once after the prompt is the caller's trigger.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Paper, Policy


@dataclass(frozen=True)
class SageKV(Policy):
    """Attention of the last query; `reduce` over the query heads of a KV head is max or mean."""

    paper = Paper(
        "LLMs Know What to Drop: Self-Attention Guided KV Cache Eviction for Efficient Long-Context Inference",
        "2503.08879",
        venue="ICLR 2025 workshop",
    )
    sinks = 4
    recent = 32
    comparable = True
    prompt_only = True
    reduce: str = "max"

    def __post_init__(self) -> None:
        self._require(self.reduce in ("max", "mean"), "reduce max or mean")

    @property
    def needs_queries(self) -> int:
        return 1

    def score(self, view: CacheView) -> Tensor:
        received = view.attention(1)[:, :, 0].unflatten(1, (view.keys.shape[1], -1))
        return received.amax(2) if self.reduce == "max" else received.mean(2)
