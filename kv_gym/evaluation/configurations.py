"""Configurations: the ways to hold a cache that are compared, and the cache that one prefill serves them all with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from kv_gym.budgets import Allocation, Budget, Uniform, fitting
from kv_gym.errors import UserError
from kv_gym.evaluation.rows import FULL
from kv_gym.live import EvictingCache, PolicyGroup
from kv_gym.live.episodic_cache import EpisodeSettings
from kv_gym.live.selection import SelectAll, Selection
from kv_gym.live.tiers import Drop, Tier
from kv_gym.policies import Policy, make_policy

EQUAL, DROP, READ_ALL = Uniform(), Drop(), SelectAll()


@dataclass(frozen=True)
class Configuration:
    """One way to hold a cache: what a row of results stands for.

    Attributes:
        name: what rows call the policy, such as ``keydiff``, ``joint`` or ``full_cache``.
        policy: scores the slots.
        budget: slots per KV head, or a share; what a share is of, the task says (:mod:`kv_gym.evaluation.tasks`).
        allocation: who gets the slots.
        evicted: what becomes of evicted pairs.
        sinks, recent: first and last tokens that always stay; None means the policy's own.
        seed: of a learned policy, which training run; None for others.
        select: which of the held slots the questions' queries read.
        episodes: how the context is divided into episodes, each with a cache of that budget; None: it is not.
    """

    name: str
    policy: Policy
    budget: Budget = 1.0
    allocation: Allocation = EQUAL
    evicted: Tier = DROP
    sinks: int | None = None
    recent: int | None = None
    seed: int | None = None
    select: Selection = READ_ALL
    episodes: EpisodeSettings | None = None

    def fields(self) -> dict[str, Any]:
        """What it says of itself in a row (:class:`kv_gym.evaluation.rows.Row`)."""
        return {
            "policy": self.name, "seed": self.seed, "budget": self.budget, "allocation": self.allocation.name,
            "evicted": self.evicted.label, "sinks": self.sinks, "recent": self.recent,
            "policy_bytes": getattr(self.policy, "nbytes", int)(), "select": self.select.name,
            "accept_fingerprint": bool(getattr(self.policy, "accept_fingerprint", False)),
            "episodes": "none" if self.episodes is None else self.episodes.name,
        }  # fmt: skip


def full_cache() -> Configuration:
    """The configuration that evicts nothing: recency at budget 1.0, which holds keys, values and positions alone."""
    return Configuration(FULL, make_policy("recency"))


def configurations_of(
    policies: Mapping[str, Policy],
    budgets: Iterable[Budget],
    allocations: Iterable[Allocation] = (EQUAL,),
    evicted: Iterable[Tier] = (DROP,),
    sinks: int | None = None,
    recent: int | None = None,
    select: Iterable[Selection] = (READ_ALL,),
    episodes: Iterable[EpisodeSettings | None] = (None,),
) -> list[Configuration]:
    """Every policy (by the name that rows carry) at every budget, allocation that fits, tier, selection and episodes.

    Raises:
        UserError: no allocation can use a policy's scores.
    """
    budgets, allocations, evicted = list(budgets), list(allocations), list(evicted)
    select, episodes = list(select), list(episodes)
    return [
        Configuration(name, policy, budget, rule, tier, sinks, recent, select=read, episodes=parts)
        for name, policy in policies.items()
        for budget, rule, tier, read, parts in product(
            budgets, fitting(policy, allocations)[0], evicted, select, episodes
        )
    ]


def cache_for(model, configurations: Sequence[Configuration]) -> EvictingCache:
    """An empty cache that evicts nothing and keeps all that any configuration needs: read the context once, then fork.

    Args:
        model: a transformers decoder that :class:`~kv_gym.live.EvictingCache` serves.
        configurations: whoever will fork it with :func:`fork_for`.

    Raises:
        UserError: an oracle, a policy of another model, an allocation that cannot use a policy's scores, or episodes.
    """
    for configuration in configurations:
        if configuration.episodes is not None:
            raise UserError(
                f"episodes={configuration.episodes.name!r} divide a context that is read whole and asked about then, "
                "and this task compresses or asks within it: choose another, such as dialogue:512:topics=4"
            )
        configuration.allocation.refuse_unfit(configuration.policy)
    policies = {id(configuration.policy): configuration.policy for configuration in configurations}
    group = PolicyGroup(tuple(policies.values()))
    rule, tier = _most_curious(configurations)
    return EvictingCache(model, policy=group, budget=1.0, allocation=rule, evicted=tier)


def _most_curious(configurations: Sequence[Configuration]) -> tuple[Allocation, Tier]:
    """At budget 1.0 nothing is cut: allocation and tier only say which queries to keep."""
    rule = max(
        (EQUAL, *(configuration.allocation for configuration in configurations)), key=lambda rule: rule.needs_queries
    )
    return rule, max(
        (DROP, *(configuration.evicted for configuration in configurations)), key=lambda tier: tier.sees_queries
    )


def fork_all(cache: EvictingCache, same: Sequence[Configuration]) -> EvictingCache:
    """The same context for configurations of one policy; fork it again with :func:`fork_for`. Nothing is evicted."""
    return cache.fork(same[0].policy, 1.0, None, None, *_most_curious(same))


def fork_for(cache: EvictingCache, configuration: Configuration, budget: Budget | None = None) -> EvictingCache:
    """The same context held by a configuration; nothing is evicted before ``compress()``.

    Args:
        cache: made by :func:`cache_for` with this configuration among others.
        configuration: whose policy, allocation, tier and protection to take.
        budget: instead of the configuration's own.
    """
    return cache.fork(
        configuration.policy,
        configuration.budget if budget is None else budget,
        configuration.sinks,
        configuration.recent,
        configuration.allocation,
        configuration.evicted,
        select=configuration.select,
    )
