"""Next use: evict what is needed latest, the optimal rule of classic caches.

A slot is requested by a block of later queries that pays it, per query, at least a threshold.
Differs from the paper in: a request is read from attention, to the resolution of the recorded blocks; of several
recorded continuations the waiting time is the mean; what is evicted cannot be fetched again, so the rule is optimal
for nothing here, and a bound neither on utility nor on accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Paper, Policy, recorded_future


@dataclass(frozen=True)
class NextUse(Policy):
    """Minus the share of the continuation that goes by before the first request: 0 at once, -1 never.

    Comparable: a wait is as long in every head.

    Attributes:
        threshold: attention per query that is a request; None means 1 / tokens seen, an even share.
    """

    paper = Paper(
        "A study of replacement algorithms for a virtual-storage computer",
        venue="Belady, IBM Systems Journal 5, 1966",
        url="https://doi.org/10.1147/sj.52.0078",
    )
    needs_future = True
    comparable = True
    threshold: float | None = None

    def __post_init__(self) -> None:
        self._require(self.threshold is None or self.threshold > 0, "a threshold above 0, or None")

    def score(self, view: CacheView) -> Tensor:
        future = recorded_future(self, view)
        if self.threshold is None:
            threshold = (1 / view.seen.clamp(min=1)).reshape(-1, 1, 1, 1)
        else:
            threshold = torch.tensor(self.threshold, device=view.keys.device)
        requested = future.attention[..., 0] >= threshold  # by any query head of the group
        starts = (future.block_numbers == 0).nonzero().flatten().tolist()
        waits = [
            (part.cumsum(-1) == 0).float() @ weights
            for part, weights in zip(
                requested.tensor_split(starts[1:], -1), future.weights.tensor_split(starts[1:]), strict=True
            )
        ]
        return -torch.stack(waits).sum(0)
