"""The agent `rloo`: KVP. Each head ranks its own slots, by sampled rankings with a leave-one-out baseline.

Paper: arXiv 2602.10238 (ICML 2026), section 4: rankings from a Plackett-Luce model by Gumbel-sort, the reward
R = - sum over all budgets of the utility that is evicted, divided by that of the ideal order, REINFORCE with the mean
of a group's other samples as baseline, advantages standardised.
Differs from the paper in: slots are drawn from whole contexts (the paper cuts a context at random and ranks what
lies before the cut); all heads train in one batched product with one gradient clip (the paper trains each alone);
the loss is divided by the number of slots, which AdamW does not see. The number of samples is not printed there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.errors import UserError
from kv_gym.training.learner import LossLearner, Told
from kv_gym.training.plackett_luce import Stages, sample_rankings
from kv_gym.training.settings import Settings


@dataclass(frozen=True)
class RLOOSettings(Settings):
    """Settings of `rloo`, beside those of every agent.

    Attributes:
        group: rankings sampled of each head of each context.
    """

    group: int = 8


def rank_cost_ratio(order: Tensor, worth: Tensor) -> Tensor:
    """KVP's cost of rankings: what all budgets from 1 to n - 1 evict, divided by what the ideal order evicts.

    A slot of rank r (from 0) is evicted by r budgets, so that the sum over budgets is the sum of worth times rank.

    Args:
        order: slot indices `[group, ..., n]`, best first.
        worth: `[..., n]` non-negative.

    Returns:
        `[group, ...]`, at least 1; 1 where no order costs anything.
    """
    rank = torch.arange(order.shape[-1], dtype=worth.dtype)
    cost = (worth.expand(order.shape).gather(-1, order) * rank).sum(-1)
    ideal = (worth.sort(-1, descending=True).values * rank).sum(-1)
    return torch.where(ideal > 0, cost / ideal.clamp(min=1e-12), torch.ones_like(cost))


def leave_one_out(reward: Tensor) -> Tensor:
    """Reward minus the mean reward of the group's other samples; the group is the first axis, of at least 2."""
    group = len(reward)
    return (reward - reward.mean(0)) * group / (group - 1)


class RLOO(LossLearner):
    """Descends the score-function estimate of the expected cost ratio."""

    settings = RLOOSettings
    chosen: RLOOSettings

    def __init__(self, *arguments, **keywords):
        """Refuse a group of one."""
        super().__init__(*arguments, **keywords)
        if self.chosen.group < 2:
            raise UserError(f"group is {self.chosen.group}: a baseline of the other samples needs at least 2")

    @property
    def samples(self) -> int:
        """Rankings sampled in a step."""
        return super().samples * self.chosen.group

    def loss(self, scores: Tensor, worth: Tensor) -> tuple[Tensor, Told]:
        """Minus the advantage-weighted log-probability of sampled rankings, per slot."""
        with torch.no_grad():
            order = sample_rankings(scores, self.chosen.group)
            reward = -rank_cost_ratio(order, worth)
            advantage = leave_one_out(reward)
            # every head has its own agent: its advantages are standardised over its own contexts and samples
            advantage = advantage / (advantage.std((0, 1), keepdim=True) + 1e-8)
        stages = Stages.of(scores.expand(order.shape), order)
        loss = -(advantage * stages.log_prob.mean(-1)).mean()
        return loss, {"reward": reward.mean(), "entropy": stages.entropy.detach().mean()}
