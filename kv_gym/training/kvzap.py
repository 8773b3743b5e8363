"""The agent `kvzap`: every head regresses the logarithm of a slot's worth from the token's hidden state.

Paper: KVzap, arXiv 2601.07891: a linear map or a small network for each layer, from the hidden state that the layer's
attention receives to the logarithm of KVzip's score, for all heads at once; slots below one threshold go.
Differs from the paper in: the target is what recorded continuations attended to (the paper's is the most attention
that any query pays while the model repeats the context, times what the value adds over the residual stream); every KV
head has a network of its own; ReLU in place of GELU; hidden states are standardised. Scores are logarithms of
attention per query, on one scale for all heads and contexts: one threshold may cut them, fixed ahead too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kv_gym.errors import UserError
from kv_gym.policies.golden import Golden
from kv_gym.policies.scoring.inputs import HIDDEN
from kv_gym.traces.sequence import Sequence
from kv_gym.training.learner import LossLearner, Told
from kv_gym.training.settings import Settings

LEAST = 1e-6  # attention per query below which one slot is worth as little as another
NETWORKS = {"linear": 0, "mlp": 1}  # hidden layers, as in the paper
TARGETS = ("expected", "max")


@dataclass(frozen=True)
class KVzapSettings(Settings):
    """Settings of `kvzap`, beside those of every agent.

    Attributes:
        network: ``linear``, or ``mlp`` with one hidden layer.
        target: worth of a slot: ``expected``, the mean attention per query over the continuations; or ``max``, the most
            that any block of their queries pays it (nearer to the paper, which takes the maximum over single queries).
    """

    inputs: tuple[str, ...] = (HIDDEN,)
    network: str = "mlp"
    target: str = "expected"

    def __post_init__(self) -> None:
        """Refuse networks and targets that there are not."""
        for name, known in (("network", NETWORKS), ("target", TARGETS)):
            if getattr(self, name) not in known:
                raise UserError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")

    @property
    def depth(self) -> int:
        """Hidden layers of the networks."""
        return NETWORKS[self.network]


class KVzap(LossLearner):
    """Descends the mean squared error of scores against the natural logarithm of worth, at least a millionth."""

    settings = KVzapSettings
    calibrated = True
    absolute = True
    chosen: KVzapSettings

    def prepare(self, sequences: list[Sequence]) -> None:
        """Read the contexts; a fresh network begins at the mean of each head."""
        super().prepare(sequences)
        targets = torch.cat([_target(context.worth) for context in self.contexts], 1)  # [heads, slots]
        self._spread = targets.var(1, correction=0).clamp(min=1e-12)
        if self.fresh:
            with torch.no_grad():
                self.network.biases[-1].copy_(targets.mean(1)[:, None, None])

    def worth(self, sequence: Sequence) -> np.ndarray:
        """`[L, H, n]` float32, attention per query by the target's name."""
        if self.chosen.target == "expected":
            return super().worth(sequence)
        views = (sequence.view(layer, oracle=True) for layer in range(len(sequence.layers)))
        return torch.cat([Golden().score(view) for view in views]).numpy()

    def loss(self, scores: Tensor, worth: Tensor) -> tuple[Tensor, Told]:
        """Mean squared error in nats; ``explained`` is the paper's figure, R squared, as a mean over heads."""
        error = (scores - _target(worth)).square()
        explained = 1 - error.detach().mean((0, 2)) / self._spread
        return error.mean(), {"explained": explained.mean()}


def _target(worth: Tensor) -> Tensor:
    return worth.clamp(min=LEAST).log()
