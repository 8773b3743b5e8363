"""From what a user asks of a cache to the settings that its layers share; what cannot be served is refused here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kv_gym.budgets import Allocation, parse_allocation, parse_budget, protection_for
from kv_gym.errors import UserError
from kv_gym.live.config import Eviction
from kv_gym.live.panel import watched
from kv_gym.live.rope_shift import turn_for
from kv_gym.live.tiers import Tier, parse_tier
from kv_gym.live.tiers.watched import Watched
from kv_gym.live.trigger import Trigger
from kv_gym.models.attention import full_layers, refuse_unserved
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.models.hidden_states import refuse_unheard
from kv_gym.policies import Policy, StatefulPolicy, make_policy


def settings_of(
    model,
    policy: str | Path | Policy,
    budget: str | int | float,
    allocation: str | Allocation,
    trigger: str,
    sinks: int | None,
    recent: int | None,
    evicted: str | Tier,
    positions: str | None = None,
) -> Eviction:
    """The settings of a new cache; arguments and errors are those of :class:`~kv_gym.live.EvictingCache`."""
    refuse_unserved(model)
    chosen, rule, tier = make_policy(policy), parse_allocation(allocation), parse_tier(evicted)
    for each in watched(chosen):
        _refuse_unfit(each, model)
        if each is chosen:
            rule.refuse_unfit(each)
    config = model.config.get_text_config()
    tier.refuse_unfit(config)
    eviction = Eviction(
        chosen,
        parse_budget(budget),
        *protection_for(chosen, sinks, recent),
        Trigger.parse(trigger),
        rule,
        watched(chosen),
        len(full_layers(config)),
        tier,
        turn_for(model, chosen.positions if positions is None else positions),
    )
    _refuse_unscored(eviction)
    return eviction


def changed(
    eviction: Eviction,
    model,
    policy: str | Path | Policy | None,
    budget: str | int | float | None,
    sinks: int | None,
    recent: int | None,
    allocation: str | Allocation | None,
    evicted: str | Tier | None,
    positions: str | None,
) -> Eviction:
    """The settings of a fork; arguments and errors are those of :meth:`~kv_gym.live.EvictingCache.fork`."""
    kept, turn = eviction.queries, eviction.turn
    if policy is not None:
        eviction = _with_policy(eviction, model, make_policy(policy))
        positions = eviction.policy.positions if positions is None else positions
    eviction = replace(
        eviction,
        budget=eviction.budget if budget is None else parse_budget(budget),
        sinks=eviction.sinks if sinks is None else sinks,
        recent=eviction.recent if recent is None else recent,
        allocation=eviction.allocation if allocation is None else parse_allocation(allocation),
        evicted=eviction.evicted if evicted is None else eviction.evicted.instead(parse_tier(evicted)),
    )
    if policy is not None or allocation is not None:
        eviction.allocation.refuse_unfit(eviction.policy)
        if eviction.queries > kept:
            raise UserError(
                f"the cache kept the last {kept} queries, and policy {eviction.policy.name!r} with allocation "
                f"{eviction.allocation.name!r} needs {eviction.queries}, which it did not keep: make it with that "
                "policy and allocation, or with a Panel that has the policy as a member"
            )
    if positions is not None or turn is not None:
        wanted = positions or ("original" if turn is None else "cache")
        eviction = replace(eviction, turn=turn_for(model, wanted))
    _refuse_unscored(eviction)
    protection_for(eviction.policy, eviction.sinks, eviction.recent)  # refuses negative ones
    eviction.evicted.refuse_unfit(model.config.get_text_config())
    return eviction


def _with_policy(eviction: Eviction, model, policy: Policy) -> Eviction:
    if policy not in eviction.watched:
        _refuse_unfit(policy, model)
    missing = (isinstance(policy, StatefulPolicy) or policy.needs_hidden) and policy not in eviction.watched
    if missing or policy.needs_queries > eviction.queries:
        raise UserError(
            f"the cache did not keep what policy {policy.name!r} needs: make it with that policy, or with a Panel "
            "that has it as a member"
        )
    sinks, recent = protection_for(policy, None, None)
    return replace(eviction, policy=policy, sinks=sinks, recent=recent, watched=(policy,))


def _refuse_unscored(eviction: Eviction) -> None:
    """Pairs that come back from the host have lost the scores that were made of their hidden states."""
    if eviction.needs_hidden and isinstance(eviction.evicted, Watched) and eviction.evicted.offload:
        raise UserError(
            f"policy {eviction.policy.name!r} scores tokens by hidden states, which pairs that come back from the host "
            "do not bring along: leave offload out, or choose another policy"
        )


def _refuse_unfit(policy: Policy, model) -> None:
    if policy.needs_future:
        raise UserError(
            f"policy {policy.name!r} is an oracle: it sees the future, which live decoding does not have; "
            "evaluate it on traces"
        )
    if policy.needs_hidden and not policy.static:
        raise UserError(
            f"policy {policy.name!r} needs hidden states and is not static: a live cache shows it those of a token "
            "once, when it arrives, and keeps none, so expected a policy whose score of a token never changes"
        )
    if policy.needs_hidden:
        refuse_unheard(model)
    fingerprint = getattr(policy, "fingerprint", None)
    if fingerprint is not None:
        fingerprint.refuse_other(Fingerprint.of(model), f"policy {policy.name!r}", type(model).__name__)
