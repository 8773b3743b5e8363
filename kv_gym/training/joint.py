"""The agent `joint`: one ranking over all slots of the model.

Scores of every head and token of a context compete against the slots' worth: scores of different heads and layers
become comparable, and one threshold can cut them all. Not a published method; KVP (arXiv 2602.10238) ranks every head
alone. What the worth is and how it is learned are settings: see :mod:`kv_gym.training.targets` and
:mod:`kv_gym.training.losses`; ``benchmarks/ablation.py`` compares them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kv_gym.budgets import uniform
from kv_gym.budgets.cut import judged
from kv_gym.budgets.global_threshold import GlobalThreshold
from kv_gym.errors import UserError
from kv_gym.policies.scorer import Scorer
from kv_gym.traces.sequence import Sequence
from kv_gym.training.learner import LossLearner, Told
from kv_gym.training.losses import listwise_loss, poisson_loss, softmax_loss
from kv_gym.training.settings import Settings
from kv_gym.training.targets import FROM_MODEL, TARGETS, continued, target_of

AUTO = "auto"
LOSSES = ("softmax", "poisson", "listwise")
VALIDATION_TOTALS = (1 / 8, 1 / 16, 1 / 32, 1 / 64)


@dataclass(frozen=True)
class JointSettings(Settings):
    """Settings of `joint`.

    Attributes:
        loss: ``softmax`` over all slots, ``poisson`` (an absolute scale) or ``listwise`` (soft cuts to sampled totals).
        target: what a slot is worth, one of :data:`kv_gym.training.targets.TARGETS`; ``auto`` is ``layers`` where the
            model is given and ``mean`` where it is not.
        continuations: how many recorded continuations of a context its worth is the mean of; None: all.
        totals: for ``listwise``: totals per context and step.
        smallest, largest: for ``listwise``: these totals, as shares of all drawn slots; drawn log-uniformly.
        temperature: for ``listwise``: distance from the threshold, in units of the scores, over which a gate opens.
    """

    protect: tuple[int, int] = (0, 0)
    loss: str = "listwise"
    target: str = AUTO
    continuations: int | None = None
    totals: int = 4
    smallest: float = 1 / 64
    largest: float = 1 / 4
    temperature: float = 0.5

    def __post_init__(self) -> None:
        """Refuse losses, targets and totals that there are not."""
        for name, known in (("loss", LOSSES), ("target", (AUTO, *TARGETS))):
            if getattr(self, name) not in known:
                raise UserError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        if not 0 < self.smallest <= self.largest < 1 or self.temperature <= 0:
            raise UserError(
                f"smallest, largest and temperature are {self.smallest}, {self.largest} and {self.temperature}; "
                "expected 0 < smallest <= largest < 1 and a temperature above 0"
            )


class Joint(LossLearner):
    """Descends the loss of its settings over all slots of each drawn context."""

    settings = JointSettings
    calibrated = True
    chosen: JointSettings

    @classmethod
    def settled(cls, settings: Settings, with_model: bool) -> Settings:
        """The target that ``auto`` stands for."""
        return settings.with_overrides({"target": worth_by(getattr(settings, "target", ""), with_model)})

    @classmethod
    def model_use(cls, settings: Settings) -> str:
        """It reads the model for targets that say what the model makes of a slot."""
        target = getattr(settings, "target", "")
        return f"with target {target!r} reads the model" if target in FROM_MODEL else ""

    def prepare(self, sequences: list[Sequence]) -> None:
        """Make the target, read the contexts, and let a fresh network begin at the mean worth."""
        self._target = target_of(worth_by(self.chosen.target, self.model is not None), self.model, sequences)
        self._held_out: dict[str, Tensor] = {}
        super().prepare(sequences)
        slots = sum(context.worth.numel() for context in self.contexts)
        self._typical = max(sum(float(context.worth.sum()) for context in self.contexts) / slots, 1e-12)
        self.absolute = self.chosen.loss == "poisson"
        if self.absolute and self.fresh:
            with torch.no_grad():
                self.network.biases[-1].fill_(math.log(self._typical))

    def worth(self, sequence: Sequence) -> np.ndarray:
        """`[L, H, n]` float32 by the target, over the first `continuations` of the context."""
        return self._target(continued(sequence, self.chosen.continuations))

    def loss(self, scores: Tensor, worth: Tensor) -> tuple[Tensor, Told]:
        """The loss of the settings, over all heads of each context."""
        chosen = self.chosen
        if chosen.loss == "softmax":
            return softmax_loss(scores, worth), {}
        if chosen.loss == "poisson":
            return poisson_loss(scores, worth, self._typical), {}
        low, high = math.log(chosen.smallest), math.log(chosen.largest)
        shares = torch.empty(chosen.totals).uniform_(low, high).exp()
        return listwise_loss(scores, worth, shares, chosen.temperature), {}

    def reward(self, policy: Scorer, validation: list[Sequence]) -> float:
        """Worth that one threshold keeps over the most that it could, mean over four totals from 1/8 to 1/64.

        The policy's protection included, as it will be used; on contexts that the optimiser never saw. 1 is perfect.
        """
        shares = []
        for sequence in validation:
            if sequence.id not in self._held_out:
                self._held_out[sequence.id] = torch.from_numpy(self.worth(sequence))
            shares += kept_by_one_threshold(policy, sequence, self._held_out[sequence.id], VALIDATION_TOTALS)
        return sum(shares) / len(shares)


def worth_by(target: str, with_model: bool) -> str:
    """The target, or the best of ``benchmarks/ablation.py`` in the place of ``auto``."""
    return target if target != AUTO else "layers" if with_model else "mean"


@torch.no_grad()
def kept_by_one_threshold(
    policy: Scorer, sequence: Sequence, worth: Tensor, totals: tuple[float, ...]
) -> list[float]:  # fmt: skip
    """Share of the best kept worth that the policy keeps of a context at each total, protection included.

    Args:
        policy: its scores must compare across heads.
        sequence: the context, scored once.
        worth: `[L, H, n]`, non-negative.
        totals: shares of all slots.
    """
    rule = GlobalThreshold()
    views = [sequence.view_for(policy, layer) for layer in range(len(sequence.layers))]
    scores = [policy.score(view) for view in views]
    most = worth.flatten().sort(descending=True).values.double().cumsum(0)
    shares = []
    for total in totals:
        room = uniform(total, views[0].seen, worth.shape[1])
        layers = [
            judged(score, rule, view.with_budget(room), *policy.protection, place, len(views))
            for place, (score, view) in enumerate(zip(scores, views, strict=True))
        ]
        keep = torch.cat(rule.kept(layers))
        best = float(most[int(keep.sum()) - 1])
        shares.append(float(worth[keep].sum(dtype=torch.float64)) / best if best else 1.0)
    return shares
