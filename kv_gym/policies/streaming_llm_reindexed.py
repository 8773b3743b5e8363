"""StreamingLLM as published: recency with attention sinks, and positions counted inside the cache.

Differs from the paper in: the cache turns the keys by the model's own rotary embedding and counts positions back from
the newest token, which gives the same attention. In replay nothing is decoded, so there it is `streaming_llm`.
"""

from __future__ import annotations

from dataclasses import dataclass

from kv_gym.policies.base import Paper
from kv_gym.policies.streaming_llm import StreamingLLM


@dataclass(frozen=True)
class StreamingLLMReindexed(StreamingLLM):
    """The same scores and protection; kept keys have their places in the cache as positions."""

    paper = Paper(
        "Efficient Streaming Language Models with Attention Sinks", "2309.17453", "section 3", venue="ICLR 2024"
    )
    positions = "cache"
