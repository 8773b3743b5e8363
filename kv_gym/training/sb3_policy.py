"""A Stable-Baselines3 policy for KVEvict-v0 whose action is a ranking, not a vector of numbers.

Stock policies draw every slot's score from a Gaussian of its own, and their networks see the slots as one long vector.
Here the actor is the :class:`~kv_gym.policies.scorer.GroupedScorer` that an exported policy carries, one small network
per KV head that scores each slot by itself, and the distribution is Plackett-Luce over the slots that are to be ranked.

Use: ``PPO(RankingPolicy, KVEvictVecEnv(16, traces), gamma=0.0)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import MultiInputActorCriticPolicy
from torch import Tensor

from kv_gym.budgets.budget import Budget, slots_per_head
from kv_gym.policies.scorer import GroupedScorer
from kv_gym.policies.scoring.inputs import slot_inputs
from kv_gym.training.plackett_luce import ABSENT, Stages, sample_rankings

CRITIC_WIDTH = 16


class PrefixDistribution(Distribution):
    """Plackett-Luce over slots `[batch, N]`; only the first draws of a ranking count as the action.

    Actions are ranks scaled to [-1, 1], the best slot at 1: a bounded action space clips scores into ties, ranks never.
    """

    def __init__(self, stages: int, per_stage: bool):
        """`stages` is the most draws that any row may have; `per_stage` keeps their log-probabilities apart."""
        super().__init__()
        self._stages, self._per_stage = stages, per_stage

    def proba_distribution_net(self, *_: Any, **__: Any) -> torch.nn.Module:
        """No parameters beside the scores."""
        return torch.nn.Identity()

    def proba_distribution(self, scores: Tensor, draws: Tensor) -> PrefixDistribution:  # type: ignore[override]
        """Set scores `[batch, N]` (`ABSENT` where there is nothing to rank) and the draws `[batch]` that count."""
        self.scores = scores
        self.counted = torch.arange(self._stages, device=scores.device) < draws[:, None]
        return self

    def log_prob(self, actions: Tensor) -> Tensor:
        """Of the drawn prefix, `[batch]`; or `[batch, stages]`, zero behind the last draw, if kept per stage."""
        log_prob = self._of(actions).log_prob.masked_fill(~self.counted, 0.0)
        return log_prob if self._per_stage else log_prob.sum(-1)

    def entropy(self) -> Tensor:
        """Mean entropy of a draw along the most likely ranking, `[batch]` nats: the sum has no closed form."""
        return self.entropy_along(self.mode())

    def entropy_along(self, actions: Tensor) -> Tensor:
        """Mean entropy of a draw along rankings, `[batch]` nats; along sampled ones it is unbiased for the prefix."""
        entropy = self._of(actions).entropy.masked_fill(~self.counted, 0.0)
        return entropy.sum(-1) / self.counted.sum(-1).clamp(min=1)

    def sample(self) -> Tensor:
        """A ranking drawn by Gumbel-sort."""
        return _as_action(sample_rankings(self.scores.detach(), 1)[0])

    def mode(self) -> Tensor:
        """The most likely ranking."""
        return _as_action(self.scores.detach().argsort(dim=-1, descending=True, stable=True))

    def actions_from_params(self, scores: Tensor, draws: Tensor, deterministic: bool = False) -> Tensor:  # type: ignore[override]
        """Actions for scores."""
        return self.proba_distribution(scores, draws).get_actions(deterministic)

    def log_prob_from_params(self, scores: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Sampled actions and their log-probability."""
        actions = self.actions_from_params(scores, draws)
        return actions, self.log_prob(actions)

    def _of(self, actions: Tensor) -> Stages:
        return Stages.of(self.scores, actions.argsort(-1, descending=True), self._stages)


class RankingPolicy(MultiInputActorCriticPolicy):
    """Actor: a GroupedScorer. Critic: the same kind of network on the mean slot of each head.

    Attributes:
        scorer: the actor, what :class:`~kv_gym.policies.scorer.Scorer` exports.
    """

    def __init__(
        self,
        *arguments: Any,
        hidden: int = 64,
        prefix: Budget = 0.5,
        sinks: int = 1,
        recent: int = 1,
        per_stage: bool = False,
        **keywords: Any,
    ) -> None:
        """Build for an environment's spaces; the first three arguments are those of every SB3 policy.

        Args:
            *arguments: observation space, action space, learning-rate schedule.
            hidden: width of the actor's layers.
            prefix: the largest budget that the reward looks at, slots per head or share of the context: half of it in
                ranking mode, the environment's `budget` in eviction mode.
            sinks, recent: first and last tokens that the environment protects: they are left out of the ranking.
            per_stage: give one log-probability per draw, so that PPO clips draw by draw; it needs a
                :class:`~kv_gym.training.decision_buffer.DecisionBuffer` with as many `stages`.
            **keywords: of every SB3 policy.
        """
        self.hidden, self.prefix, self.protect, self.per_stage = hidden, prefix, (sinks, recent), per_stage
        super().__init__(*arguments, **keywords)

    @property
    def stages(self) -> int:
        """The most draws that an action may have."""
        return stages_of(self.observation_space, self.prefix)

    def _build(self, lr_schedule: Any) -> None:
        heads, dim = heads_of(self.observation_space), self.observation_space["key"].shape[-1]  # type: ignore[index]
        self.joint = self.observation_space["head"].shape != ()  # type: ignore[index]
        self.scorer = GroupedScorer(heads, dim, self.hidden)
        self.critic = GroupedScorer(heads, dim, CRITIC_WIDTH)
        self.action_dist: Any = PrefixDistribution(self.stages, self.per_stage)
        self.optimizer = self.optimizer_class(self.parameters(), **({"lr": lr_schedule(1)} | self.optimizer_kwargs))

    def standardise(self, inputs: Tensor) -> None:
        """Take mean and scale of every input from a sample `[heads, m, 2 d + 2]` of each head's slots."""
        self.scorer.standardise(inputs)
        self.critic.standardise(inputs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = {"hidden": self.hidden, "prefix": self.prefix, "per_stage": self.per_stage}
        return super()._get_constructor_parameters() | own | {"sinks": self.protect[0], "recent": self.protect[1]}

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Actions, values and log-probabilities of observations."""
        slots = _Slots.of(obs)
        distribution = self._distribution(slots)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, self._values(slots), distribution.log_prob(actions)

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values, log-probabilities and entropy of actions that were taken."""
        slots = _Slots.of(obs)
        distribution = self._distribution(slots)
        return self._values(slots), distribution.log_prob(actions), distribution.entropy_along(actions)

    def get_distribution(self, obs: Any) -> PrefixDistribution:
        """The distribution over rankings of what is cached and not protected."""
        return self._distribution(_Slots.of(obs))

    def predict_values(self, obs: Any) -> Tensor:
        """`[batch, 1]`: what the critic expects of the mean cached slot of each head."""
        return self._values(_Slots.of(obs))

    def _distribution(self, slots: _Slots) -> PrefixDistribution:
        sinks, recent = self.protect
        ranked = slots.there & (slots.position >= sinks) & (slots.position < slots.seen - recent)
        scores = self._by_head(self.scorer, slots.inputs, slots.head).masked_fill(~ranked, ABSENT)
        room = slots_per_head(self.prefix, slots.seen[:, 0]) * (self.scorer.heads if self.joint else 1)
        draws = torch.minimum((room - (slots.there & ~ranked).sum(-1)).clamp(min=1), ranked.sum(-1))
        return self.action_dist.proba_distribution(scores, draws)

    def _values(self, slots: _Slots) -> Tensor:
        rows = len(slots.there), self.scorer.heads if self.joint else 1, -1
        weight = slots.there.view(*rows, 1).float()
        inputs = slots.inputs.view(*rows, slots.inputs.shape[-1])
        pooled = (inputs * weight).sum(2) / weight.sum(2).clamp(min=1)
        return self._by_head(self.critic, pooled, slots.head).mean(-1, keepdim=True)

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        return self.get_distribution(observation).get_actions(deterministic=deterministic)

    def _by_head(self, network: GroupedScorer, inputs: Tensor, head: Tensor) -> Tensor:
        """Outputs `[batch, N]` of inputs `[batch, N, f]`, each row or run of slots by its own head's network."""
        if not self.joint:
            return network(inputs, head.view(-1))
        rows = inputs.view(len(inputs), network.heads, -1, inputs.shape[-1]).transpose(0, 1)
        return network(rows.flatten(1, 2)).view(network.heads, len(inputs), -1).transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class _Slots:
    """Observations as networks take them: inputs `[batch, N, f]`, cached `[batch, N]`, positions, `seen [batch, 1]`."""

    inputs: Tensor
    there: Tensor
    position: Tensor
    seen: Tensor
    head: Tensor

    @classmethod
    def of(cls, obs: Any) -> _Slots:
        position = obs["position"].long()
        # how much was seen after the newest cached token is not shown: ages are counted from it
        seen = position.amax(-1, keepdim=True) + 1
        inputs = slot_inputs(obs["key"], obs["value"], position, seen)
        return cls(inputs, obs["mask"] > 0, position, seen, obs["head"].long())


def heads_of(space: Any) -> int:
    """How many KV heads the traces behind an observation space have."""
    head = space["head"]
    return int(head.n) if head.shape == () else int(head.high.max()) + 1


def stages_of(space: Any, prefix: Budget) -> int:
    """The most draws that a ranking under `prefix` may have in an observation space."""
    heads = 1 if space["head"].shape == () else heads_of(space)
    tokens = torch.tensor([space["mask"].shape[0] // heads])
    return min(int(slots_per_head(prefix, tokens)) * heads, space["mask"].shape[0])


def _as_action(order: Tensor) -> Tensor:
    """Slot indices `[batch, N]`, best first, as ranks from 1 (best) to -1."""
    last = max(order.shape[-1] - 1, 1)
    scaled = 1 - 2 * torch.arange(order.shape[-1], device=order.device) / last
    return torch.empty(order.shape, device=order.device).scatter_(-1, order, scaled.expand(order.shape))
