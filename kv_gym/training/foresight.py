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

from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.errors import UserError
from kv_gym.policies.scorer import Scorer
from kv_gym.traces.sequence import Sequence
from kv_gym.training.contexts import inputs_of
from kv_gym.training.distill import pairwise_hinge
from kv_gym.training.grpo import Group, GroupLearner, GRPOSettings
from kv_gym.training.learner import Told
from kv_gym.training.on_policy_states import Reached, States
from kv_gym.training.plackett_luce import ABSENT


@dataclass(frozen=True)
class ForesightSettings(GRPOSettings):
    """Settings of `foresight`, beside those of `grpo`; `slots` does not matter to it.

    Attributes:
        distill: share of the steps that learn Golden Eviction; 0 leaves that stage out.
        margin: of its hinge.
        budget: share of the context's slots that stay.
    """

    distill: float = 0.5
    margin: float = 0.01
    budget: float = 0.25


def shorter_side(states: States) -> tuple[Tensor, Tensor, Tensor]:
    """The action of a cut: to draw what stays, or what goes, whichever are fewer slots.

    Returns:
        sign: `[B, 1]`, 1 where the slots that stay are drawn with odds e^f, -1 where those that go are, with e^-f.
        worth: `[B, n]`, so that the worth of all drawn slots is that of all slots that stay.
        weights: `[B, n]`, 1 for every draw and 0 behind; all 0 where everything may stay.
    """
    count, room = states.there.sum(-1), states.room
    goes = (count - room).clamp(min=0)
    keeping = room <= goes
    draws = torch.where(goes == 0, 0, torch.where(keeping, room, goes))
    share = states.worth.sum(-1) / draws.clamp(min=1)  # drawn slots share what all are worth, less what goes with them
    worth = torch.where(keeping[:, None], states.worth, share[:, None] - states.worth)
    weights = (torch.arange(states.worth.shape[-1]) < draws[:, None]).float()
    return torch.where(keeping, 1.0, -1.0)[:, None], worth, weights


class Foresight(GroupLearner):
    """Two stages on one network."""

    settings = ForesightSettings
    chosen: ForesightSettings
    samples = 0
    any_inputs = False  # states after cuts hold keys, values and positions

    def __init__(self, *arguments, **keywords):
        """Refuse a joint ranking: every head is cut to the same budget here."""
        super().__init__(*arguments, **keywords)
        if self.chosen.ranking != "head":
            raise UserError(f"ranking is {self.chosen.ranking!r}; foresight evicts head by head, so expected 'head'")
        self._first = round(min(1.0, self.chosen.distill) * self.chosen.steps)

    def prepare(self, sequences: list[Sequence]) -> None:
        """Read every block of every continuation."""
        self.standardise_fresh(map(inputs_of, sequences))
        self._reached = Reached(sequences, self.chosen.budget, *self.chosen.protect)

    def reward(self, policy: Scorer, validation: list[Sequence]) -> float | None:
        """What the environment pays in eviction mode, on contexts that the optimiser never saw; 1 is perfect.

        None where nothing can be lost there at this budget: the utility kept at the end of contexts decides then.
        """
        try:
            unseen = Reached(validation, self.chosen.budget, *self.chosen.protect)
        except UserError:
            return None
        with torch.no_grad():
            return unseen.reward(policy.network)

    def step(self, step: int) -> Told:
        """One hinge on golden states, or one batch of sampled cuts of the policy's own states."""
        self.begin(step)
        if step < self._first:
            states = self._reached.draw(self.chosen.contexts, None, highest=True)
            self.samples = len(states.heads)
            scores = self.network(states.inputs, states.heads)
            loss = pairwise_hinge(scores, states.worth, self.chosen.margin, states.there)
            return {"loss": loss.detach(), "gradient_norm": self.descend(loss)}
        self.refer(step - self._first)
        with torch.no_grad():
            states = self._reached.draw(self.chosen.contexts, self.network)
        self.samples = len(states.heads) * self.chosen.group
        sign, worth, weights = shorter_side(states)

        def scores_of(network) -> Tensor:
            return (network(states.inputs, states.heads) * sign).masked_fill(~states.there, ABSENT)

        with torch.no_grad():
            scores, reference = scores_of(self.network), scores_of(self.reference)
        worth = worth.masked_fill(~states.there, float(worth.min()) - 1)  # behind all others in the best order too
        group = Group.sample(scores, reference, worth, weights, self.chosen.group)
        return self.optimise(group, lambda: scores_of(self.network))
