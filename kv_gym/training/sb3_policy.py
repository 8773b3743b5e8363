"""Stable-Baselines3 on KVEvict-v0: a policy whose action is a ranking of slots, and a small rollout buffer.

Stock policies draw every slot's score from a Gaussian of its own, and their networks see the slots as one long vector.
Here the actor is the :class:`~kv_gym.policies.scorer.GroupedScorer` that an exported policy carries, one small network
per KV head that scores each slot by itself, and the distribution is Plackett-Luce over the slots that are to be ranked.

Use: ``PPO(RankingPolicy, KVEvictVecEnv(16, traces), gamma=0.0)``; with ``KVEvictVecEnv(..., index=True)`` and
``rollout_buffer_class=DecisionBuffer`` a rollout stores which decisions were seen instead of their keys and values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import MultiInputActorCriticPolicy
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples
from stable_baselines3.common.utils import obs_as_tensor
from torch import Tensor
from torch.distributions import Distribution as TorchDistribution
from torch.distributions import register_kl

from kv_gym.budgets import Budget, slots_per_head
from kv_gym.errors import UserError
from kv_gym.policies.scorer import GroupedScorer, Scorer
from kv_gym.policies.scoring.inputs import slot_inputs
from kv_gym.traces import TraceSet, open_traces
from kv_gym.training.plackett_luce import PADDING_SCORE, RankingStages, sample_rankings

CRITIC_WIDTH = 16


class PrefixDistribution(Distribution):
    """Plackett-Luce over slots `[batch, N]`; only the first draws of a ranking count as the action.

    Actions are ranks scaled to [-1, 1], the best slot at 1: a bounded action space clips scores into ties, ranks never.

    Args:
        stages: the most draws that any row may have.
        per_stage: keep one log-probability per draw.
    """

    def __init__(self, stages: int, per_stage: bool):
        super().__init__()
        self._stages, self._per_stage = stages, per_stage

    def proba_distribution_net(self, *_: Any, **__: Any) -> torch.nn.Module:
        """No parameters but the scores."""
        return torch.nn.Identity()

    def proba_distribution(self, scores: Tensor, draws: Tensor) -> PrefixDistribution:  # type: ignore[override]
        """Set scores `[batch, N]` (`PADDING_SCORE` at slots that are not ranked) and the draws `[batch]` that count."""
        self.scores = scores
        self.action_mask = torch.arange(self._stages, device=scores.device) < draws[:, None]
        self.distribution: Any = _RankingPrefix(scores, self.action_mask)
        return self

    def log_prob(self, actions: Tensor) -> Tensor:
        """Of the drawn prefix, `[batch]`; or `[batch, stages]`, zero behind the last draw, if kept per stage."""
        log_prob = self._ranking_stages(actions).log_prob.masked_fill(~self.action_mask, 0.0)
        return log_prob if self._per_stage else log_prob.sum(-1)

    def entropy(self) -> Tensor:
        """Mean entropy of a draw along the most likely ranking, `[batch]` nats: the sum has no closed form."""
        return self.entropy_along(self.mode())

    def entropy_along(self, actions: Tensor) -> Tensor:
        """Mean entropy of a draw along rankings, `[batch]` nats; along sampled ones it is unbiased for the prefix."""
        entropy = self._ranking_stages(actions).entropy.masked_fill(~self.action_mask, 0.0)
        return entropy.sum(-1) / self.action_mask.sum(-1).clamp(min=1)

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

    def _ranking_stages(self, actions: Tensor) -> RankingStages:
        return RankingStages.of(self.scores, actions.argsort(-1, descending=True), self._stages)


class _RankingPrefix(TorchDistribution):
    """What Stable-Baselines3 takes the divergence of, for algorithms with a trust region such as TRPO."""

    def __init__(self, scores: Tensor, action_mask: Tensor):
        super().__init__(scores.shape[:1], scores.shape[1:], validate_args=False)
        self.scores, self.action_mask = scores, action_mask


@register_kl(_RankingPrefix, _RankingPrefix)
def _prefix_divergence(p: _RankingPrefix, q: _RankingPrefix) -> Tensor:
    """Kullback-Leibler divergence `[batch]`, exact for each draw along a ranking that is sampled from p: unbiased."""
    order, stages = sample_rankings(p.scores.detach(), 1)[0], p.action_mask.shape[-1]
    divergence = RankingStages.of(p.scores, order, stages).divergence(RankingStages.of(q.scores, order, stages))
    return divergence.masked_fill(~p.action_mask, 0.0).sum(-1)


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
                :class:`DecisionBuffer` with as many `stages`.
            **keywords: of every SB3 policy.
        """
        if arguments and not isinstance(arguments[0], spaces.Dict):
            raise UserError(
                "RankingPolicy reads the entries key, value, position, mask and head of an observation and was given "
                f"{type(arguments[0]).__name__}: make the environment without flat=True or a wrapper that flattens"
            )
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
        ranked = slots.mask & (slots.position >= sinks) & (slots.position < slots.seen - recent)
        scores = self._by_head(self.scorer, slots.inputs, slots.head).masked_fill(~ranked, PADDING_SCORE)
        room = slots_per_head(self.prefix, slots.seen[:, 0]) * (self.scorer.heads if self.joint else 1)
        draws = torch.minimum((room - (slots.mask & ~ranked).sum(-1)).clamp(min=1), ranked.sum(-1))
        return self.action_dist.proba_distribution(scores, draws)

    def _values(self, slots: _Slots) -> Tensor:
        rows = len(slots.mask), self.scorer.heads if self.joint else 1, -1
        weight = slots.mask.view(*rows, 1).float()
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


class DecisionBuffer(RolloutBuffer):
    """A rollout buffer for on-policy algorithms of Stable-Baselines3 on ``KVEvictVecEnv(..., index=True)``.

    An observation holds keys and values of all slots: 2,048 steps of 16 environments with 1,024 slots of head dimension
    64 would be 17 GB. With ``index=True`` the environment shows a `decision` id from which it makes the observation
    again, so that the buffer keeps the id and one bit per slot.

    Give it to the algorithm as ``rollout_buffer_class``, and afterwards the environment:
    ``agent.rollout_buffer.slots = env.get_attr("slots")[0]`` (an argument would be saved with the agent, and all traces
    with it).

    Args:
        buffer_size: steps of each environment.
        observation_space, action_space: of the environment, which has to show `decision`.
        *arguments: as in Stable-Baselines3.
        stages: log-probabilities per action; 0 stores one for the whole action.
        **keywords: as in Stable-Baselines3.

    Attributes:
        slots: makes observations from decision ids and masks, :meth:`kv_gym.envs.KVEvictVectorEnv.slots`.
    """

    slots: Callable[..., dict[str, np.ndarray]] | None = None

    def __init__(
        self, buffer_size: int, observation_space: spaces.Dict, action_space: spaces.Box, *arguments: Any,
        stages: int = 0, **keywords: Any,
    ):  # fmt: skip
        if not isinstance(observation_space, spaces.Dict) or "decision" not in observation_space.spaces:
            raise UserError("a DecisionBuffer needs an environment that shows decisions: make it with index=True")
        self._stages, self._size = stages, int(np.prod(action_space.shape))
        # the base class stores the id as the whole observation
        super().__init__(buffer_size, observation_space["decision"], action_space, *arguments, **keywords)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        return sum(array.nbytes for array in vars(self).values() if isinstance(array, np.ndarray))

    def reset(self) -> None:
        """Empty the buffer."""
        super().reset()
        self.cached = np.zeros((self.buffer_size, self.n_envs, -(-self._size // 8)), np.uint8)
        if self._stages:
            self.log_probs = np.zeros((self.buffer_size, self.n_envs, self._stages), np.float32)

    def add(self, obs: dict[str, np.ndarray], *rest: Any) -> None:  # type: ignore[override]
        """Store a step of all environments; the arguments are those of Stable-Baselines3."""
        self.cached[self.pos] = np.packbits(obs["mask"].astype(bool), axis=-1)
        super().add(obs["decision"], *rest)

    def get(self, batch_size: int | None = None) -> Generator[Any, None, None]:
        """Random batches, with observations made from the decision ids."""
        if not self.generator_ready:
            self.cached = self.swap_and_flatten(self.cached)
        yield from super().get(batch_size)

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> DictRolloutBufferSamples:  # type: ignore[override]
        if self.slots is None:
            raise UserError(
                "the buffer was not given its environment: set agent.rollout_buffer.slots = env.get_attr('slots')[0]"
            )
        cached = np.unpackbits(self.cached[batch_inds], axis=-1, count=self._size)
        observations = self.slots(self.observations[batch_inds, 0], cached)
        log_probs, advantages = self.log_probs[batch_inds], self.advantages[batch_inds]

        def flat(array: np.ndarray) -> Tensor:
            return self.to_torch(array.flatten())

        return DictRolloutBufferSamples(
            observations=obs_as_tensor(observations, self.device),  # type: ignore[arg-type]
            actions=self.to_torch(self.actions[batch_inds]),
            old_values=flat(self.values[batch_inds]),
            # [batch, stages] and [batch, 1]: SB3's loss is then clipped stage by stage
            old_log_prob=self.to_torch(log_probs) if self._stages else flat(log_probs),
            advantages=self.to_torch(advantages) if self._stages else flat(advantages),
            returns=flat(self.returns[batch_inds]),
        )


@dataclass(frozen=True)
class _Slots:
    """Observations as networks take them: inputs `[batch, N, f]`, cached `[batch, N]`, positions, `seen [batch, 1]`."""

    inputs: Tensor
    mask: Tensor
    position: Tensor
    seen: Tensor
    head: Tensor

    @classmethod
    def of(cls, obs: Any) -> _Slots:
        position = obs["position"].long()
        _refuse_normalised(obs["position"], obs["mask"], obs["head"])
        # the observation does not tell how much was seen after the newest cached token: ages are counted from it
        seen = position.amax(-1, keepdim=True) + 1
        inputs = slot_inputs(obs["key"], obs["value"], position, seen)
        return cls(inputs, obs["mask"] > 0, position, seen, obs["head"].long())


def _refuse_normalised(position: Tensor, mask: Tensor, head: Tensor) -> None:
    """Raise a UserError where positions are not token numbers, such as after ``VecNormalize``."""
    heads = 1 if head.dim() == 1 else len(head[0].unique())
    # a head caches at most one token of position 0, and none below
    first = ((position < 1) & (mask > 0)).sum(-1)
    if bool((position != position.round()).any() | (first > heads).any()):
        raise UserError(
            "the observation's positions are not token numbers; RankingPolicy expects them as the environment gives "
            "them: normalise keys and values alone, VecNormalize(env, norm_obs_keys=['key', 'value'])"
        )


def heads_of(space: Any) -> int:
    """How many KV heads the traces behind an observation space have."""
    head = space["head"]
    return int(head.n) if head.shape == () else int(head.high.max()) + 1


def stages_of(space: Any, prefix: Budget) -> int:
    """The most draws that a ranking under `prefix` may have in an observation space."""
    heads = 1 if space["head"].shape == () else heads_of(space)
    tokens = torch.tensor([space["mask"].shape[0] // heads])
    return min(int(slots_per_head(prefix, tokens)) * heads, space["mask"].shape[0])


def save_policy(
    agent: BaseAlgorithm,
    folder: str | Path,
    traces: str | Path | TraceSet | Iterable[str | Path | TraceSet] | None = None,
) -> Path:
    """Export an agent of Stable-Baselines3 (PPO, A2C, TRPO, ...) whose policy is a :class:`RankingPolicy`.

    The folder is a policy as ``kv-gym train`` writes it: for `EvictingCache`, ``--policy`` and the Hub.

    Args:
        agent: trained, or what ``PPO.load`` gave.
        folder: to write.
        traces: what it was trained on, for the model's fingerprint and the lengths of contexts; None: the bundled
            sample.

    Raises:
        UserError: another policy, traces of a model with other heads, or a folder of other files.
    """
    policy = agent.policy
    if not isinstance(policy, RankingPolicy):
        raise UserError(
            f"the agent's policy is {type(policy).__name__}, and only a RankingPolicy scores single slots as a live "
            f"cache needs it: make the agent with {type(agent).__name__}(RankingPolicy, env)"
        )
    recorded = open_traces(traces)
    fingerprint, heads = recorded.fingerprint, heads_of(policy.observation_space)
    dim = policy.observation_space["key"].shape[-1]  # type: ignore[index]
    expected = len(fingerprint.layers) * fingerprint.kv_heads, fingerprint.head_dim
    if (heads, dim) != expected:
        raise UserError(
            f"the agent ranks {heads} heads of {dim} dimensions and the traces have {expected[0]} of {expected[1]}: "
            "give the traces that it was trained on"
        )
    tokens = [entry.tokens for entry in recorded.entries]
    training = {"agent": type(agent).__name__, "library": "stable-baselines3", "samples": agent.num_timesteps}
    scorer = copy.deepcopy(policy.scorer).cpu().eval()
    exported = Scorer(
        scorer, fingerprint, (min(tokens), max(tokens)), policy.protect, policy.joint,
        training | {"traces": recorded.hash},
    )  # fmt: skip
    return exported.save_pretrained(folder)


def _as_action(order: Tensor) -> Tensor:
    """Slot indices `[batch, N]`, best first, as ranks from 1 (best) to -1."""
    last = max(order.shape[-1] - 1, 1)
    scaled = 1 - 2 * torch.arange(order.shape[-1], device=order.device) / last
    return torch.empty(order.shape, device=order.device).scatter_(-1, order, scaled.expand(order.shape))
