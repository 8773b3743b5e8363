"""The agent `rloo`: KVP. Each head ranks its own slots, by sampled rankings with a leave-one-out baseline.

Paper: arXiv 2602.10238 (ICML 2026), section 4: rankings from a Plackett-Luce model by Gumbel-sort, the reward
R = - sum over all budgets of the utility that is evicted, divided by that of the ideal order, REINFORCE with the mean
of a group's other samples as baseline, advantages standardised.
Differs from the paper in: slots are drawn from whole contexts (the paper cuts a context at random and ranks what
lies before the cut); all heads train in one batched product with one gradient clip (the paper trains each alone);
the loss is divided by the number of slots, which AdamW does not see. The number of samples is not printed there.

For a state s (one head of one context; the group key) and the group of K rankings o_k drawn of it:

    A_k = R_k - 1 / (K - 1) sum_{j != k} R_j,    loss = - mean_k A_k / std(A) * log p(o_k | s) / n

where the standard deviation is that of the head's advantages over all contexts and samples of the step.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from kv_gym.policies.base import Paper
from kv_gym.training.learner import LossLearner, Metrics, Settings
from kv_gym.training.plackett_luce import RankingStages, sample_rankings


class RLOOSettings(Settings):
    """Settings of `rloo`, with those of every agent.

    Attributes:
        group: rankings sampled of each head of each context; the baseline needs at least 2.
    """

    group: Annotated[int, Field(ge=2)] = 8


class RLOO(LossLearner):
    """Each head ranks its own slots, by sampled rankings with a leave-one-out baseline (KVP)."""

    paper = Paper("Learning to Evict from Key-Value Cache", "2602.10238", "section 4", venue="ICML 2026")
    settings_class = RLOOSettings
    settings: RLOOSettings

    @property
    def samples(self) -> int:
        """Rankings sampled in a step."""
        return super().samples * self.settings.group

    def loss(self, scores: Tensor, utility: Tensor) -> tuple[Tensor, Metrics]:
        """Minus the advantage-weighted log-probability of sampled rankings, per slot."""
        with torch.no_grad():
            order = sample_rankings(scores, self.settings.group)
            reward = -rank_cost_ratio(order, utility)
            advantage = leave_one_out(reward)
            # every head has its own agent: its advantages are standardised over its own contexts and samples
            advantage = advantage / (advantage.std((0, 1), keepdim=True) + 1e-8)
        stages = RankingStages.of(scores.expand(order.shape), order)
        loss = -(advantage * stages.log_prob.mean(-1)).mean()
        return loss, {"reward": reward.mean(), "entropy": stages.entropy.detach().mean()}


def rank_cost_ratio(order: Tensor, utility: Tensor) -> Tensor:
    """KVP's cost of rankings: what all budgets from 1 to n - 1 evict, divided by what the ideal order evicts.

    A slot of rank r (from 0) is evicted by r budgets, so that the sum over budgets is the sum of utility times rank.

    Args:
        order: slot indices `[group, ..., n]`, best first.
        utility: `[..., n]`, non-negative.

    Returns:
        `[group, ...]`, at least 1; 1 where no order costs anything.
    """
    rank = torch.arange(order.shape[-1], dtype=utility.dtype, device=utility.device)
    cost = (utility.expand(order.shape).gather(-1, order) * rank).sum(-1)
    ideal = (utility.sort(-1, descending=True).values * rank).sum(-1)
    return torch.where(ideal > 0, cost / ideal.clamp(min=1e-12), torch.ones_like(cost))


def leave_one_out(reward: Tensor) -> Tensor:
    """Reward minus the mean reward of the group's other samples; the group is the first axis, of at least 2."""
    group = len(reward)
    return (reward - reward.mean(0)) * group / (group - 1)
