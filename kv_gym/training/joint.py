"""The agent `joint`: one ranking over all slots of the model.

Scores of every head and token of a context compete against the slots' utility: scores of different heads and layers
become comparable, and one threshold can cut them all. Not a published method; KVP (arXiv 2602.10238) ranks every head
alone. The utility and the loss are settings: see :mod:`kv_gym.training.targets` and :mod:`kv_gym.training.losses`;
``benchmarks/ablation.py`` compares them.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
from pydantic import NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor

from kv_gym.budgets import select_context
from kv_gym.budgets.global_threshold import GlobalThreshold
from kv_gym.errors import UserError
from kv_gym.policies.scorer import Scorer
from kv_gym.traces.sequence import Contexts, Sequence
from kv_gym.training.learner import LossLearner, Metrics, Protection, Settings
from kv_gym.training.losses import listwise_loss, poisson_loss, softmax_loss
from kv_gym.training.targets import FROM_MODEL, Target, limit_continuations, utility_function

Loss = Literal["softmax", "poisson", "listwise"]
LOSSES = get_args(Loss)
VALIDATION_TOTALS = (1 / 8, 1 / 16, 1 / 32, 1 / 64)


class JointSettings(Settings):
    """Settings of `joint`, with those of every agent.

    Attributes:
        loss: ``softmax`` over all slots, ``poisson`` (an absolute scale) or ``listwise`` (soft cuts to sampled totals).
        target: utility of a slot, one of :data:`kv_gym.training.targets.TARGETS`; ``auto`` is ``layers`` where the
            model is given and every slot was recorded, else ``mean``.
        continuations: how many recorded continuations of a context its utility is the mean of; None: all.
        totals: for ``listwise``: totals per context and step.
        smallest, largest: for ``listwise``: these totals, as shares of all drawn slots; drawn log-uniformly.
        temperature: for ``listwise``: distance from the threshold, in units of the scores, over which a gate opens.
    """

    protect: Protection = (0, 0)
    loss: Loss = "listwise"
    target: Literal["auto", Target] = "auto"
    continuations: PositiveInt | None = None
    totals: PositiveInt = 4
    smallest: NonNegativeFloat = 1 / 64
    largest: NonNegativeFloat = 1 / 4
    temperature: NonNegativeFloat = 0.5

    @model_validator(mode="after")
    def _refuse_empty_ranges(self) -> JointSettings:
        if not 0 < self.smallest <= self.largest < 1 or self.temperature <= 0:
            raise UserError(
                f"smallest, largest and temperature are {self.smallest}, {self.largest} and {self.temperature}; "
                "expected 0 < smallest <= largest < 1 and a temperature above 0"
            )
        return self


class Joint(LossLearner):
    """One ranking over all slots of the model, so that one threshold can cut all heads."""

    settings_class = JointSettings
    calibrated = True
    data_parallel = True
    settings: JointSettings

    @classmethod
    def resolve_settings(cls, settings: Settings, has_model: bool) -> Settings:
        """Replace ``auto`` by the best target of ``benchmarks/ablation.py``."""
        if getattr(settings, "target", "") != "auto":
            return settings
        return settings.model_copy(update={"target": "layers" if has_model else "mean"})

    @classmethod
    def statistics(cls, settings: Settings) -> tuple[str, ...]:
        """Those of the second reading, where it is the target."""
        return ("kvzip",) if getattr(settings, "target", "") == "kvzip" else ()

    @classmethod
    def model_requirement(cls, settings: Settings) -> str:
        """It reads the model for targets that depend on the model's output."""
        target = getattr(settings, "target", "")
        return f"with target {target!r} reads the model" if target in FROM_MODEL else ""

    def prepare(self, sequences: Contexts) -> None:
        """Make the target, read the contexts, and let a Poisson network from scratch begin at the mean utility."""
        settings = self.resolve_settings(self.settings, self.model is not None)
        self._target = utility_function(getattr(settings, "target", ""), self.model, sequences)
        self._validation_utility: dict[str, Tensor] = {}
        super().prepare(sequences)
        first = self.contexts.first()
        slots = sum(context.utility.numel() for context in first)
        self._mean_utility = max(sum(float(context.utility.sum()) for context in first) / slots, 1e-12)
        self.absolute = self.settings.loss == "poisson"
        if self.absolute and self.from_scratch:
            with torch.no_grad():
                self.network.biases[-1].fill_(math.log(self._mean_utility))

    def utility(self, sequence: Sequence) -> np.ndarray:
        """`[L, H, n]` float32 by the target, over the first `continuations` of the context."""
        return self._target(limit_continuations(sequence, self.settings.continuations))

    def loss(self, scores: Tensor, utility: Tensor) -> tuple[Tensor, Metrics]:
        """The loss of the settings, over all heads of each context."""
        settings = self.settings
        if settings.loss == "softmax":
            return softmax_loss(scores, utility), {}
        if settings.loss == "poisson":
            return poisson_loss(scores, utility, self._mean_utility), {}
        shares = torch.empty(settings.totals).uniform_(math.log(settings.smallest), math.log(settings.largest)).exp()
        return listwise_loss(scores, utility, shares, settings.temperature), {}

    def reward(self, policy: Scorer, validation: Contexts) -> float:
        """Share of the best utility that one threshold keeps, mean over four totals from 1/8 to 1/64; 1 is perfect.

        The policy's protection included, as it will be used; on contexts that the optimiser never saw.
        """
        shares = []
        for sequence in validation:
            if sequence.id not in self._validation_utility:
                self._validation_utility[sequence.id] = torch.from_numpy(self.utility(sequence))
            shares += kept_by_one_threshold(policy, sequence, self._validation_utility[sequence.id], VALIDATION_TOTALS)
        return sum(shares) / len(shares)


@torch.no_grad()
def kept_by_one_threshold(
    policy: Scorer, sequence: Sequence, utility: Tensor, totals: tuple[float, ...]
) -> list[float]:  # fmt: skip
    """Utility that the policy keeps of a context at each total, as a share of the most that the total can hold.

    Args:
        policy: its scores must compare across heads; its protection is included.
        sequence: the context, scored once.
        utility: `[L, H, n]`, non-negative.
        totals: shares of all slots.
    """
    rule = GlobalThreshold()
    views = [sequence.view_for(policy, layer) for layer in range(len(sequence.layers))]
    scores = [policy.score(view) for view in views]
    most = utility.flatten().sort(descending=True).values.double().cumsum(0)
    shares = []
    for total in totals:
        selection = select_context(policy, rule, views, total, utility, scores=scores)
        best = float(most[int(selection.kept.sum()) - 1])
        shares.append(float(selection.kept_utility.sum()) / best if best else 1.0)
    return shares
