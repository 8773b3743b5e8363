"""The agent `joint`: one ranking over all slots of the model.

Softmax cross-entropy over every head and token of a context against the expected utility: scores of different
heads and layers compete, so that one threshold can cut them all. Not a published method; KVP (arXiv 2602.10238)
ranks every head alone.
"""

from __future__ import annotations

from torch import Tensor

from kv_gym.training.learner import LossLearner, Told


def joint_loss(scores: Tensor, utility: Tensor) -> Tensor:
    """Cross-entropy of one softmax per context.

    Args:
        scores: `[contexts, heads, n]` over all layers' KV heads.
        utility: same shape, non-negative.
    """
    flat, worth = scores.flatten(1), utility.flatten(1)
    target = worth / worth.sum(1, keepdim=True).clamp(min=1e-12)
    return -(target * flat.log_softmax(1)).sum(1).mean()


class Joint(LossLearner):
    """Descends :func:`joint_loss`."""

    calibrated = True

    def loss(self, scores: Tensor, worth: Tensor) -> tuple[Tensor, Told]:
        """One softmax over all heads of each context."""
        return joint_loss(scores, worth), {}
