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
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from kv_gym.devices import to_device
from kv_gym.envs.rewards import budget_weights, rank_weights
from kv_gym.policies.base import Paper
from kv_gym.traces.sequence import Contexts
from kv_gym.training.learner import ContextLearner, Learner, Metrics, Settings
from kv_gym.training.plackett_luce import RankingStages, sample_rankings


class GRPOSettings(Settings):
    """Settings of `grpo`, with those of every agent.

    Attributes:
        group: rankings sampled of each state; they are compared with one another, so at least 2.
        epochs: optimiser steps on each batch of samples.
        clip: how far a stage's ratio counts from 1.
        kl: weight of the divergence from the reference policy.
        refresh: steps after which the policy becomes its own reference; until the first it is the one at the start.
        entropy: weight of the stages' entropy.
        ranking: ``head`` (each KV head ranks its own slots) or ``joint`` (one ranking over all slots of the model).
    """

    group: Annotated[int, Field(ge=2)] = 8
    epochs: PositiveInt = 2
    clip: NonNegativeFloat = 0.2
    kl: NonNegativeFloat = 0.01
    refresh: PositiveInt = 200
    entropy: NonNegativeFloat = 0.0
    ranking: Literal["head", "joint"] = "head"


@dataclass(frozen=True)
class RankingGroup:
    """Sampled rankings of a batch of states, and what the loss needs of the policy that drew them.

    Attributes:
        order: slot indices `[group, ..., n]`, best first.
        advantage: `[group, ..., m]`.
        action_mask: `[..., m]` bool, the stages that are part of the action.
        log_prob: `[group, ..., m]` of the sampling policy.
        reference: stages of the same rankings under the reference policy.
        reward: mean over group and states.
    """

    order: Tensor
    advantage: Tensor
    action_mask: Tensor
    log_prob: Tensor
    reference: RankingStages
    reward: Tensor

    @classmethod
    @torch.no_grad()
    def sample(cls, scores: Tensor, reference: Tensor, utility: Tensor, weights: Tensor, size: int) -> RankingGroup:
        """Draw `size` rankings of every state.

        Args:
            scores, reference: `[..., n]` of the sampling and the reference policy.
            utility, weights: as in :func:`returns_to_go`, `weights` on the CPU; the action is the stages with positive
                weights.
            size: of the group.
        """
        order = sample_rankings(scores, size)
        length = max(1, int((weights > 0).sum(-1).max()))  # 1 where no state has an action: such a step learns nothing
        weights = to_device(weights, scores.device)
        returns = returns_to_go(order, utility, weights)
        old = RankingStages.of(scores.expand(order.shape), order, length)
        action_mask = (weights > 0)[..., :length].expand(*order.shape[1:-1], length)
        return cls(
            order, group_advantage(returns[..., :length]), action_mask, old.log_prob,
            RankingStages.of(reference.expand(order.shape), order, length), returns[..., 0].mean(),
        )  # fmt: skip

    def loss(self, scores: Tensor, settings: GRPOSettings) -> tuple[Tensor, Metrics]:
        """The clipped surrogate under new scores `[..., n]`, and the metrics to log."""
        stages = RankingStages.of(scores.expand(self.order.shape), self.order, self.advantage.shape[-1])
        ratio, clip = (stages.log_prob - self.log_prob).exp(), settings.clip
        gain = torch.minimum(ratio * self.advantage, ratio.clamp(1 - clip, 1 + clip) * self.advantage)
        divergence, entropy = stages.divergence(self.reference), stages.entropy
        count = (self.action_mask.sum() * len(self.order)).clamp(min=1)

        def mean(values: Tensor) -> Tensor:
            return torch.where(self.action_mask, values, torch.zeros_like(values)).sum() / count

        loss = -mean(gain - settings.kl * divergence + settings.entropy * entropy)
        with torch.no_grad():
            clipped = mean(((ratio - 1).abs() > clip).float())
        return loss, {
            "reward": self.reward, "kl": mean(divergence).detach(), "entropy": mean(entropy).detach(),
            "clip_share": clipped,
        }  # fmt: skip


class GroupLearner(Learner):
    """What `grpo` and `foresight` share: the reference policy, and the optimiser steps on a group of rankings."""

    settings_class: ClassVar[type[Settings]] = GRPOSettings
    settings: GRPOSettings

    @classmethod
    def scores_comparable(cls, settings: Settings) -> bool:
        """One ranking of all heads makes their scores comparable."""
        return getattr(settings, "ranking", "head") == "joint"

    def update_reference(self, step: int) -> None:
        """Copy the policy as the reference at step 0 and every `refresh` steps."""
        if step % self.settings.refresh == 0:
            self.reference = copy.deepcopy(self.network).requires_grad_(False)

    def optimise(self, group: RankingGroup, score: Callable[[], Tensor]) -> Metrics:
        """The optimiser steps on one group; `score` computes the states' scores by the network as it is."""
        for _ in range(self.settings.epochs):
            loss, metrics = group.loss(score(), self.settings)
            norm = self.optimizer_step(loss)
        return {"loss": loss.detach(), **metrics, "gradient_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        """With the reference policy."""
        reference = self.reference.state_dict() if hasattr(self, "reference") else None
        return super().state_dict() | {"reference": reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """With the reference policy."""
        super().load_state_dict(state)
        if state["reference"] is not None:
            self.update_reference(0)
            self.reference.load_state_dict(state["reference"])


class GRPO(GroupLearner, ContextLearner):
    """Group-relative policy optimisation of sampled rankings, stage by stage."""

    paper = Paper(
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "2402.03300",
        "section 4.1",
    )

    def prepare(self, sequences: Contexts) -> None:
        """Leave protected slots out: there is nothing to decide about them."""
        super().prepare(sequences)
        self.contexts.protect = self.settings.protect

    @property
    def samples(self) -> int:
        """Rankings sampled in a step; a joint ranking counts once for each of its heads."""
        return super().samples * self.settings.group

    def step(self, step: int) -> Metrics:
        """Sample a group of rankings of each drawn state and learn from it."""
        self.start_step(step)
        self.update_reference(step)
        inputs, utility = self.sample_batch()
        heads = self.network.heads if self.calibrated else 1
        by_budget, _, _ = budget_weights("log", utility.shape[-1], 0, 0)
        weights = torch.from_numpy(rank_weights(by_budget, 0, heads)).float()

        def states(of_heads: Tensor) -> Tensor:
            return of_heads.flatten(1) if self.calibrated else of_heads

        with torch.no_grad():
            scores, reference = states(self.score(inputs)), states(self.score(inputs, self.reference))
        group = RankingGroup.sample(scores, reference, states(utility), weights, self.settings.group)
        return self.optimise(group, lambda: states(self.score(inputs)))


def returns_to_go(order: Tensor, utility: Tensor, weights: Tensor) -> Tensor:
    """What the budgets above each stage keep, as a share of what the best ranking keeps at all budgets.

    Args:
        order: slot indices `[group, ..., n]`, best first.
        utility: `[..., n]`; it may be negative.
        weights: `[..., n]`, what rank t earns per utility: the summed weight of the budgets above t.

    Returns:
        `[group, ..., n]`; the first stage's is the reward. Zeros where nothing can be gained.
    """
    ranked = utility.expand(order.shape).gather(-1, order)
    budget_weight = weights - torch.cat((weights[..., 1:], torch.zeros_like(weights[..., :1])), -1)  # of budget t + 1
    earned = (budget_weight * ranked.cumsum(-1)).flip(-1).cumsum(-1).flip(-1)
    best = (utility.sort(-1, descending=True).values * weights).sum(-1, keepdim=True).abs()
    return torch.where(best > 0, earned / best.clamp(min=1e-30), torch.zeros_like(earned))


def group_advantage(returns: Tensor) -> Tensor:
    """Returns `[group, ..., m]` less the group's mean, in units of the group's spread; equal returns give zeros.

    The spread is the largest standard deviation of any stage: late draws, with little at stake, weigh little.
    """
    spread = returns.std(0, correction=0).amax(-1, keepdim=True)
    return (returns - returns.mean(0)) / (spread + 1e-6)
