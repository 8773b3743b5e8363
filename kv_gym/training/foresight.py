"""The agent `foresight`: learns Golden Eviction first, then from its own evictions, block by block.

Paper: ForesightKV, arXiv 2602.03203 (ICML 2026). Stage 1 ranks the slots of states on the golden path by the most
attention that any later block pays them (pairwise hinge, as `distill`); stage 2 is GRPO on sampled evictions.
Differs from the paper in: stage 2 starts from states that the policy's own cuts lead to (theirs samples whole
trajectories and gives every step one advantage), and is paid by the attention of the rest of the continuation instead
of the loss of low-entropy tokens; the ratio is that of the distribution which drew the action (theirs gathers a
softmax over all slots), per draw; each head has a group of its own. Inputs are key, value and position; attention is
the maximum over the query heads of a KV head.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from kv_gym.devices import to_device
from kv_gym.errors import UserError
from kv_gym.policies.base import Paper
from kv_gym.policies.scorer import Scorer
from kv_gym.policies.scoring.network import ScoringNetwork
from kv_gym.traces.sequence import Contexts
from kv_gym.training.grpo import GroupLearner, GRPOSettings, RankingGroup
from kv_gym.training.learner import Metrics, sequence_inputs
from kv_gym.training.losses import pairwise_hinge
from kv_gym.training.on_policy_states import DecisionStates, OnPolicyStates
from kv_gym.training.plackett_luce import PADDING_SCORE


class ForesightSettings(GRPOSettings):
    """Settings of `foresight`, with those of `grpo`; `slots` has no effect.

    Attributes:
        distill: share of the steps that learn Golden Eviction; 0 leaves that stage out.
        margin: of its hinge.
        budget: share of the context's slots that stay.
    """

    ranking: Literal["head"] = "head"
    distill: NonNegativeFloat = 0.5
    margin: NonNegativeFloat = 0.01
    budget: Annotated[float, Field(gt=0, le=1)] = 0.25


class Foresight(GroupLearner):
    """Learns the order of Golden Eviction first, then from its own evictions by GRPO."""

    paper = Paper(
        "ForesightKV: Optimizing KV Cache Eviction for Reasoning Models by Learning Long-Term Contribution",
        "2602.03203",
        venue="ICML 2026",
    )  # fmt: skip
    settings_class = ForesightSettings
    settings: ForesightSettings
    samples = 0
    any_inputs = False  # states after cuts hold keys, values and positions

    def prepare(self, sequences: Contexts) -> None:
        """Read every block of every continuation."""
        self.fit_standardisation(map(sequence_inputs, sequences))
        self._states = OnPolicyStates(sequences, self.settings.budget, *self.settings.protect, self.memory)

    def reward(self, policy: Scorer, validation: Contexts) -> float | None:
        """What the environment pays in eviction mode, on contexts that the optimiser never saw; 1 is perfect.

        None where nothing can be lost there at this budget: the utility kept at the end of contexts decides then.
        """
        try:
            unseen = OnPolicyStates(validation, self.settings.budget, *self.settings.protect)
        except UserError:
            return None
        with torch.no_grad():
            return unseen.reward(policy.network)

    def step(self, step: int) -> Metrics:
        """One hinge on golden states, or one batch of sampled cuts of the policy's own states."""
        self.start_step(step)
        settings = self.settings
        distill_steps = round(min(1.0, settings.distill) * settings.steps)
        if step < distill_steps:
            states = self._states.draw(settings.contexts, None, highest=True).to(self.device)
            self.samples = len(states.heads)
            with self.precision():
                scores = self.network(states.inputs, states.heads).float()
            loss = pairwise_hinge(scores, states.utility, settings.margin, states.mask)
            return {"loss": loss.detach(), "gradient_norm": self.optimizer_step(loss)}
        self.update_reference(step - distill_steps)
        with torch.no_grad():
            drawn = self._states.draw(settings.contexts, self.network)
        states = drawn.to(self.device)
        self.samples = len(states.heads) * settings.group
        sign, utility, weights = cut_action(drawn)
        lowest = float(utility.min()) - 1  # last in the best order too
        utility = to_device(utility.masked_fill(~drawn.mask, lowest), self.device)
        sign = to_device(sign, self.device)

        def score(network: ScoringNetwork) -> Tensor:
            with self.precision():
                scores = network(states.inputs, states.heads).float()
            return (scores * sign).masked_fill(~states.mask, PADDING_SCORE)

        with torch.no_grad():
            scores, reference = score(self.network), score(self.reference)
        group = RankingGroup.sample(scores, reference, utility, weights, settings.group)
        return self.optimise(group, lambda: score(self.network))


def cut_action(states: DecisionStates) -> tuple[Tensor, Tensor, Tensor]:
    """The action of a cut: to draw the slots that stay or the slots that go, whichever are fewer.

    Returns:
        sign: `[B, 1]`, 1 where the slots that stay are drawn with odds e^f, -1 where those that go are, with e^-f.
        utility: `[B, n]`, so that the utility of all drawn slots is that of all slots that stay.
        weights: `[B, n]`, 1 for every draw and 0 behind; all 0 where everything may stay.
    """
    slots, room = states.mask.sum(-1), states.room
    evicted = (slots - room).clamp(min=0)
    draws_kept = room <= evicted
    draws = torch.where(evicted == 0, 0, torch.where(draws_kept, room, evicted))
    # where evicted slots are drawn, each earns an equal part of all utility, less its own
    share = states.utility.sum(-1) / draws.clamp(min=1)
    utility = torch.where(draws_kept[:, None], states.utility, share[:, None] - states.utility)
    weights = (torch.arange(states.utility.shape[-1]) < draws[:, None]).float()
    return torch.where(draws_kept, 1.0, -1.0)[:, None], utility, weights
