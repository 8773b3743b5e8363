"""EpiCache's score: the largest attention that any query of a probe pays to a slot.

The probe is a text that the model reads behind the context before a cut (the cache's `probe`); its own keys are not in
the softmax, so the slots share all of it. Without a probe the queries are those of the newest `window` tokens.
Differs from the paper in: the first tokens are a setting of the protection (the code protects none, and they stay by
their scores), and the probe's positions follow the context (in the code its first one is the last token's).
Conversations, episodes and the cache of each are :class:`kv_gym.live.EpisodicCache`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Paper, Policy


@dataclass(frozen=True)
class EpiCacheScore(Policy):
    """Largest softmax weight over the queries of a probe, or the last `window` ones, and a KV head's query heads."""

    paper = Paper(
        "EpiCache: Episodic KV Cache Management for Long Conversational Question Answering",
        "2509.17396",
        venue="ICML 2026",
    )
    sinks = 4
    comparable = True
    prompt_only = True
    window: int = 32

    def __post_init__(self) -> None:
        self._require(self.window >= 1, "window above 0")

    @property
    def needs_queries(self) -> int:
        return self.window

    def score(self, view: CacheView) -> Tensor:
        attention = view.attention(None if view.probe_length else self.window)
        return attention.unflatten(1, (view.keys.shape[1], -1)).amax((2, 3))
