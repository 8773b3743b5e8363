"""The agent `grpo`: group-relative policy optimisation of sampled rankings, stage by stage.

Paper: GRPO, arXiv 2402.03300 (DeepSeekMath), section 4.1. For a state s (one head of one context; the group key) and
the group of K rankings that the sampling policy draws of it:

    A[k, t] = (G[k, t] - mean_k G[k, t]) / (max_t std_k G[k, t] + eps)
    loss = - mean_{k, t} [ min(r A, clip(r, 1 - c, 1 + c) A) - kl KL_t + entropy H_t ],   r[k, t] = p_t / p_old_t

where stage t draws the slot of rank t. Only the first m stages are the action, m the largest budget in the reward:
of a whole ranking of thousands of slots the ratio explodes. G[k, t] is the reward of the budgets above t, the ones
that the draw at t has a say in: G[k, t] = sum_{b > t} weight_b kept_b / best.
Differs from the paper in: a "token" is a stage of a Plackett-Luce ranking, which has its own return instead of the
whole sample's, in units of one spread for all stages (a spread for each of them lost a point of held-out utility in a
trial with two seeds); the divergence from the reference policy and the entropy are exact (the paper estimates the
former).
Budgets are log-uniform up to half of the slots, without the protected ones, as in KVEvict-v0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kv_gym.envs.rewards import budget_weights, rank_weights
from kv_gym.errors import UserError
from kv_gym.traces.sequence import Sequence
from kv_gym.training.learner import ContextLearner, Learner, Told
from kv_gym.training.plackett_luce import Stages, sample_rankings
from kv_gym.training.settings import Settings


@dataclass(frozen=True)
class GRPOSettings(Settings):
    """Settings of `grpo`, beside those of every agent.

    Attributes:
        group: rankings sampled of each state.
        epochs: optimiser steps on each batch of samples.
        clip: how far a stage's ratio counts from 1.
        kl: weight of the divergence from the reference policy.
        refresh: steps after which the policy becomes its own reference; until the first it is the one at the start.
        entropy: weight of the stages' entropy.
        ranking: ``head`` (each KV head ranks its own slots) or ``joint`` (one ranking over all slots of the model).
    """

    group: int = 8
    epochs: int = 2
    clip: float = 0.2
    kl: float = 0.01
    refresh: int = 200
    entropy: float = 0.0
    ranking: str = "head"


def returns_to_go(order: Tensor, worth: Tensor, weights: Tensor) -> Tensor:
    """What the budgets above each stage keep, as a share of what the best ranking would have at all budgets.

    Args:
        order: slot indices `[group, ..., n]`, best first.
        worth: `[..., n]`; a slot may have negative worth.
        weights: `[..., n]`, what it is worth to be ranked t-th: the summed weight of the budgets above t.

    Returns:
        `[group, ..., n]`; the first stage's is the reward. Zeros where nothing can be gained.
    """
    ranked = worth.expand(order.shape).gather(-1, order)
    # the weight of the budget t + 1 alone: what is lost by going one rank down
    alone = weights - torch.cat((weights[..., 1:], torch.zeros_like(weights[..., :1])), -1)
    earned = (alone * ranked.cumsum(-1)).flip(-1).cumsum(-1).flip(-1)
    best = (worth.sort(-1, descending=True).values * weights).sum(-1, keepdim=True).abs()
    return torch.where(best > 0, earned / best.clamp(min=1e-30), torch.zeros_like(earned))


def group_advantage(returns: Tensor) -> Tensor:
    """Returns `[group, ..., m]` less the group's mean, in units of the group's spread; equal returns give zeros.

    The spread is the largest standard deviation of any stage: late draws, with little at stake, weigh little.
    """
    spread = returns.std(0, correction=0).amax(-1, keepdim=True)
    return (returns - returns.mean(0)) / (spread + 1e-6)


@dataclass(frozen=True)
class Group:
    """Sampled rankings of a batch of states, and what the loss needs of the policy that drew them.

    Attributes:
        order: slot indices `[group, ..., n]`, best first.
        advantage: `[group, ..., m]`.
        acted: `[..., m]` bool, the stages that are part of the action.
        log_prob: `[group, ..., m]` of the sampling policy.
        reference: stages of the same rankings under the reference policy.
        reward: mean over group and states.
    """

    order: Tensor
    advantage: Tensor
    acted: Tensor
    log_prob: Tensor
    reference: Stages
    reward: Tensor

    @classmethod
    @torch.no_grad()
    def sample(cls, scores: Tensor, reference: Tensor, worth: Tensor, weights: Tensor, size: int) -> Group:
        """Draw `size` rankings of every state.

        Args:
            scores, reference: `[..., n]` of the sampling and the reference policy.
            worth, weights: as in :func:`returns_to_go`; weights are positive exactly where a stage is acted.
            size: of the group.
        """
        order = sample_rankings(scores, size)
        length = max(1, int((weights > 0).sum(-1).max()))  # nothing may be acted anywhere: a step that learns nothing
        returns = returns_to_go(order, worth, weights)
        old = Stages.of(scores.expand(order.shape), order, length)
        acted = (weights > 0)[..., :length].expand(*order.shape[1:-1], length)
        return cls(
            order, group_advantage(returns[..., :length]), acted, old.log_prob,
            Stages.of(reference.expand(order.shape), order, length), returns[..., 0].mean(),
        )  # fmt: skip

    def loss(self, scores: Tensor, chosen: GRPOSettings) -> tuple[Tensor, Told]:
        """The clipped surrogate under new scores `[..., n]`, and what there is to tell."""
        stages = Stages.of(scores.expand(self.order.shape), self.order, self.advantage.shape[-1])
        ratio = (stages.log_prob - self.log_prob).exp()
        gain = torch.minimum(ratio * self.advantage, ratio.clamp(1 - chosen.clip, 1 + chosen.clip) * self.advantage)
        divergence, entropy = stages.divergence(self.reference), stages.entropy
        count = (self.acted.sum() * len(self.order)).clamp(min=1)

        def mean(values: Tensor) -> Tensor:
            return torch.where(self.acted, values, torch.zeros_like(values)).sum() / count

        loss = -mean(gain - chosen.kl * divergence + chosen.entropy * entropy)
        with torch.no_grad():
            clipped = mean(((ratio - 1).abs() > chosen.clip).float())
        told: Told = {
            "reward": self.reward, "kl": mean(divergence).detach(), "entropy": mean(entropy).detach(),
            "clip_share": clipped,
        }  # fmt: skip
        return loss, told


class GroupLearner(Learner):
    """What `grpo` and the agents built on it share: settings that make sense, and the reference policy."""

    settings = GRPOSettings
    chosen: GRPOSettings

    def __init__(self, *arguments, **keywords):
        """Refuse a group of one."""
        super().__init__(*arguments, **keywords)
        if self.chosen.group < 2:
            raise UserError(f"group is {self.chosen.group}: rankings are compared with one another, so give at least 2")
        if self.chosen.ranking not in ("head", "joint"):
            raise UserError(f"ranking is {self.chosen.ranking!r}; expected 'head' or 'joint'")
        self.calibrated = self.chosen.ranking == "joint"

    def refer(self, step: int) -> None:
        """Take the policy as the reference at the first step, and again when it is time to."""
        if step % self.chosen.refresh == 0:
            self.reference = copy.deepcopy(self.network).requires_grad_(False)

    def optimise(self, group: Group, score: Callable[[], Tensor]) -> Told:
        """The optimiser steps on one batch of samples; `score` gives the states' scores anew."""
        for _ in range(self.chosen.epochs):
            loss, told = group.loss(score(), self.chosen)
            norm = self.descend(loss)
        return {"loss": loss.detach(), **told, "gradient_norm": norm}

    def state(self) -> dict[str, Any]:
        """The reference policy too."""
        return super().state() | {"reference": self.reference.state_dict() if hasattr(self, "reference") else None}

    def load(self, state: dict[str, Any]) -> None:
        """The reference policy too."""
        super().load(state)
        if state["reference"] is not None:
            self.reference = copy.deepcopy(self.network).requires_grad_(False)
            self.reference.load_state_dict(state["reference"])


class GRPO(GroupLearner, ContextLearner):
    """GRPO on decisions at the end of contexts."""

    def prepare(self, sequences: list[Sequence]) -> None:
        """Leave protected slots out: there is nothing to decide about them."""
        super().prepare(sequences)
        self.contexts = [context.open(*self.chosen.protect) for context in self.contexts]

    @property
    def samples(self) -> int:
        """Rankings sampled in a step; a joint ranking counts once for each of its heads."""
        return super().samples * self.chosen.group

    def step(self, step: int) -> Told:
        """Sample a group of rankings of each drawn state and learn from it."""
        self.begin(step)
        self.refer(step)
        inputs, worth = self.draw()
        heads = self.network.heads if self.calibrated else 1
        by_budget, _, _ = budget_weights("log", worth.shape[-1], 0, 0)
        weights = torch.from_numpy(rank_weights(by_budget, 0, heads)).float()

        def states(of_heads: Tensor) -> Tensor:
            return of_heads.flatten(1) if self.calibrated else of_heads

        with torch.no_grad():
            scores, reference = self.score(inputs, worth), self.score(inputs, worth, self.reference)
        group = Group.sample(states(scores), states(reference), states(worth), weights, self.chosen.group)
        return self.optimise(group, lambda: states(self.score(inputs, worth)))
