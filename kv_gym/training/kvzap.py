"""The agent `kvzap`: every head regresses the logarithm of a slot's utility from the token's hidden state.

Paper: KVzap, arXiv 2601.07891: a linear map or a small network for each layer, from the hidden state that the layer's
attention receives to the logarithm of KVzip's score, for all heads at once; slots below one threshold go.
Differs from the paper in: the target is what recorded continuations attended to (the paper's is the most attention
that any query pays while the model repeats the context, times what the value adds over the residual stream); every KV
head has a network of its own; ReLU in place of GELU; hidden states are standardised. Scores are logarithms of
attention per query, on one scale for all heads and contexts: one threshold may cut them, fixed ahead too.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kv_gym.devices import to_device
from kv_gym.policies.base import Paper
from kv_gym.policies.scoring.inputs import HIDDEN
from kv_gym.traces.sequence import Contexts, Sequence
from kv_gym.training.distill import golden_utility
from kv_gym.training.learner import InputNames, LossLearner, Metrics, Settings

MIN_UTILITY = 1e-6  # attention per query below which slots are worth the same


class KVzapSettings(Settings):
    """Settings of `kvzap`, with those of every agent.

    Attributes:
        network: ``linear``, or ``mlp`` with one hidden layer.
        target: utility of a slot: ``expected``, the mean attention per query over the continuations; or ``max``, the
            most that any block of their queries pays it (nearer to the paper: the maximum over single queries).
    """

    inputs: InputNames = (HIDDEN,)
    network: Literal["linear", "mlp"] = "mlp"
    target: Literal["expected", "max"] = "expected"

    @property
    def depth(self) -> int:
        """Hidden layers of the networks."""
        return 1 if self.network == "mlp" else 0


class KVzap(LossLearner):
    """Every head regresses the logarithm of a slot's utility from the token's hidden state."""

    paper = Paper("KVzap: Fast, Adaptive, and Faithful KV Cache Pruning", "2601.07891")
    settings_class = KVzapSettings
    calibrated = True
    absolute = True
    settings: KVzapSettings

    def prepare(self, sequences: Contexts) -> None:
        """Read the contexts; the bias of a network from scratch starts at the mean of each head."""
        super().prepare(sequences)
        targets = torch.cat([_log_utility(context.utility) for context in self.contexts.first()], 1)  # [heads, slots]
        self.variance = targets.var(1, correction=0).clamp(min=1e-12)
        if self.from_scratch:
            with torch.no_grad():
                self.network.biases[-1].copy_(targets.mean(1)[:, None, None])

    def utility(self, sequence: Sequence) -> np.ndarray:
        """`[L, H, n]` float32, attention per query, as `target` says."""
        return golden_utility(sequence) if self.settings.target == "max" else sequence.utility()

    def loss(self, scores: Tensor, utility: Tensor) -> tuple[Tensor, Metrics]:
        """Mean squared error in nats; ``explained`` is the paper's R squared, as a mean over heads."""
        error = (scores - _log_utility(utility)).square()
        explained = 1 - error.detach().mean((0, 2)) / to_device(self.variance, error.device)
        return error.mean(), {"explained": explained.mean()}


def _log_utility(utility: Tensor) -> Tensor:
    return utility.clamp(min=MIN_UTILITY).log()
