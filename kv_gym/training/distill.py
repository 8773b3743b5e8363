"""The agent `distill`: pairwise ranking in the order of Golden Eviction, ForesightKV's supervised stage.

Paper: arXiv 2602.03203 (ICML 2026): a slot's target is the most attention that any later block of queries pays it;
the loss is the mean over pairs with different targets of max(0, margin - (f_better - f_worse)).
Differs from the paper in: inputs are key, value and position (no attention statistics), the sign (higher = keep), and
each slot is compared with a random subset of the others at every step instead of with all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kv_gym.policies.golden import Golden
from kv_gym.traces.sequence import Sequence
from kv_gym.training.learner import LossLearner, Told
from kv_gym.training.settings import Settings


@dataclass(frozen=True)
class DistillSettings(Settings):
    """Settings of `distill`, beside those of every agent.

    Attributes:
        margin: by how much the better slot of a pair has to lead.
    """

    margin: float = 0.01


def pairwise_hinge(scores: Tensor, target: Tensor, margin: float, there: Tensor | None = None) -> Tensor:
    """Mean hinge over pairs of slots whose targets differ.

    Args:
        scores, target: `[..., n]`.
        margin: by how much the better one has to lead.
        there: `[..., n]` bool, slots that count; None means all.

    Every slot is compared with at most 128 others, drawn anew at every call and the same in every row.
    """
    n = scores.shape[-1]
    against = torch.randperm(n)[:128] if n > 128 else torch.arange(n)
    sign = (target[..., :, None] - target[..., None, against]).sign()
    if there is not None:
        sign *= there[..., :, None] & there[..., None, against]
    lead = scores[..., :, None] - scores[..., None, against]
    counted = sign.abs()
    return (margin * counted - sign * lead).relu().sum() / counted.sum().clamp(min=1)


class Distill(LossLearner):
    """Descends :func:`pairwise_hinge` against the golden order of whole contexts, head by head."""

    settings = DistillSettings
    chosen: DistillSettings

    @classmethod
    def worth(cls, sequence: Sequence) -> np.ndarray:
        """`[L, H, n]`: the most mean attention per query that any block of any continuation pays."""
        golden = Golden()
        views = (sequence.view(layer, oracle=True) for layer in range(len(sequence.layers)))
        return torch.cat([golden.score(view) for view in views]).numpy()

    def loss(self, scores: Tensor, worth: Tensor) -> tuple[Tensor, Told]:
        """The hinge, over all contexts and heads."""
        return pairwise_hinge(scores, worth, self.chosen.margin), {}
