"""The agent `distill`: pairwise ranking in the order of Golden Eviction, ForesightKV's supervised stage.

Paper: ForesightKV, arXiv 2602.03203 (ICML 2026): a slot's utility is the most attention that any later block of
queries pays it; the loss is the mean over pairs with different utility of max(0, margin - (f_better - f_worse)).
Differs from the paper in: inputs are key, value and position (no attention statistics), the sign (higher = keep), and
each slot is compared with a random subset of the others at every step instead of with all of them.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from kv_gym.policies.base import Paper
from kv_gym.policies.golden import Golden
from kv_gym.traces.sequence import Sequence
from kv_gym.training.learner import LossLearner, Metrics, Settings
from kv_gym.training.losses import pairwise_hinge


class DistillSettings(Settings):
    """Settings of `distill`, with those of every agent.

    Attributes:
        margin: by how much the better slot of a pair has to lead.
    """

    margin: NonNegativeFloat = 0.01


class Distill(LossLearner):
    """Pairwise ranking of each head's slots in the order of Golden Eviction."""

    paper = Paper(
        "ForesightKV: Optimizing KV Cache Eviction for Reasoning Models by Learning Long-Term Contribution",
        "2602.03203",
        venue="ICML 2026",
    )  # fmt: skip
    settings_class = DistillSettings
    settings: DistillSettings

    def utility(self, sequence: Sequence) -> np.ndarray:
        """`[L, H, n]`: the most mean attention per query that any block of any continuation pays."""
        return golden_utility(sequence)

    def loss(self, scores: Tensor, utility: Tensor) -> tuple[Tensor, Metrics]:
        """The hinge, over all contexts and heads."""
        return pairwise_hinge(scores, utility, self.settings.margin), {}


def golden_utility(sequence: Sequence) -> np.ndarray:
    """The score of Golden Eviction for every slot of a context, `[L, H, n]` float32."""
    views = (sequence.view(layer, oracle=True) for layer in range(len(sequence.layers)))
    return torch.cat([Golden().score(view) for view in views]).numpy()
