"""D2O: accumulated attention with the first four tokens kept; what it evicts may be merged into what stays.

The token score of the paper's code, which is H2O's.
Differs from the paper in: merging and the sizes of layers are not part of the score; sums are means over the query
heads of each KV head (the code repeats the keys); the recent part is a setting of the protection (the paper gives
it half the budget).
"""

from __future__ import annotations

from dataclasses import dataclass

from kv_gym.policies.base import Paper
from kv_gym.policies.h2o import H2O


@dataclass(frozen=True)
class D2O(H2O):
    """H2O's score; only the protection differs."""

    paper = Paper(
        "D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of Large Language Models",
        "2406.13035",
        venue="ICLR 2025",
    )
    sinks = 4

    @property
    def statistics(self) -> str:
        return "h2o"  # the same sums
