"""The settings of an evicting cache: parsed and validated once, shared by all of its layers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from kv_gym.budgets import (
    UNSEEN,
    Allocation,
    Budget,
    ScoredLayer,
    parse_allocation,
    parse_budget,
    protection_for,
    slots_after,
)
from kv_gym.cache_view import CacheView, protected_tokens
from kv_gym.errors import UserError
from kv_gym.live.guard import Guard
from kv_gym.live.rope_shift import RopeShift, refuse_other_rotation
from kv_gym.live.selection import SelectAll, Selection, parse_selection
from kv_gym.live.tiers import Drop, LowPrecision, Merge, MergeValues, RecordingTier, Tier, parse_tier
from kv_gym.models.attention import full_layers, refuse_unsupported
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.models.hidden_states import full_attention_modules
from kv_gym.models.wrapped_model import transformers_model
from kv_gym.policies import Policy, StatefulPolicy, make_policy

POSITIONS = ("original", "cache")
_TRIGGER = re.compile(r"(every|block|lagged):([1-9][0-9]{0,8})")


@dataclass(frozen=True)
class Trigger:
    """When a cache evicts: at the end of the first forward, then whenever `every` new tokens came since.

    Attributes:
        every: new tokens between evictions; None evicts once.
        within_forward: evicts inside a forward too, after each `every` tokens, and not at the end of the first one: a
            long prompt is read block by block, and the cache never holds more than the budget and a block.
        lag: the newest tokens that an eviction leaves alone, until later queries have seen them.
    """

    every: int | None = None
    within_forward: bool = False
    lag: int = 0

    @classmethod
    def parse(cls, text: str) -> Trigger:
        """Read ``prefill``, ``every:<tokens>``, ``block:<tokens>`` or ``lagged:<tokens>``.

        Raises:
            UserError: anything else.
        """
        if isinstance(text, str) and text == "prefill":
            return cls()
        match = _TRIGGER.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise UserError(
                f"trigger {text!r} is unknown; expected 'prefill', 'every:<tokens>', 'block:<tokens>' or "
                "'lagged:<tokens>', such as 'every:64'"
            )
        kind, tokens = match[1], int(match[2])
        return cls(tokens, within_forward=kind == "block", lag=tokens if kind == "lagged" else 0)

    @property
    def name(self) -> str:
        """What :meth:`parse` reads."""
        if self.every is None:
            return "prefill"
        return f"{'block' if self.within_forward else 'lagged' if self.lag else 'every'}:{self.every}"

    def fires(self, seen: int, evicted_at: int | None) -> bool:
        """Whether to evict now, after `seen` tokens, when the last eviction was after `evicted_at` (None: never)."""
        if not seen:  # a row of which only padding came: its first forward is yet to come
            return False
        if self.within_forward or evicted_at is not None:
            return self.every is not None and seen - (evicted_at or 0) >= self.every
        return True


@dataclass(frozen=True)
class PolicyGroup(Policy):
    """Several policies for which one prefill keeps all that they need; it scores nothing itself.

        group = PolicyGroup((make_policy("h2o"), make_policy("snapkv")))
        cache = EvictingCache(model, policy=group, budget=1.0)
        model(context, past_key_values=cache)
        fork = cache.fork(policy=make_policy("h2o"), budget=0.25)
        fork.compress()

    Attributes:
        members: the policies; their queries and state are kept side by side.
    """

    members: tuple[Policy, ...]

    @property
    def name(self) -> str:
        """``policy_group``."""
        return "policy_group"

    @property
    def needs_queries(self) -> int:
        """As many as the member that wants most."""
        return max((member.needs_queries for member in self.members), default=0)

    def score(self, view: CacheView) -> Tensor:
        """Refuse: a fork has to choose a member first."""
        names = ", ".join(member.name for member in self.members)
        raise UserError(
            f"a policy group does not score: fork the cache with one of its policies ({names}), then compress"
        )


@dataclass(frozen=True)
class CacheConfig:
    """The settings of an :class:`~kv_gym.live.EvictingCache`, resolved and valid for its model.

    Attributes:
        model: the transformers decoder, without a wrapper that it may have had.
        policy: scores the slots.
        budget: slots per KV head, or share of the tokens seen when the trigger fires.
        sinks, recent: first and last tokens that always stay.
        allocation: who gets the slots.
        trigger: when to evict.
        evicted: what becomes of evicted pairs.
        guard: what is measured at every forward, or None.
        offload: whether evicted pairs are copied to the host.
        positions: rotary positions of kept keys, one of `POSITIONS`.
        select: which of the slots a query reads.
        delay: the newest tokens that are not judged yet.
        probe: token ids that the model reads before every cut, and whose queries policies see instead of the newest
            tokens'; empty: there are none.
        checked: policies that are known to fit the model, and need not be checked again.

    Raises:
        UserError: settings that do not fit the model or one another.
    """

    model: Any = field(repr=False, compare=False)
    policy: Policy
    budget: Budget
    sinks: int
    recent: int
    allocation: Allocation = field(default_factory=lambda: parse_allocation("uniform"))
    trigger: Trigger = Trigger()
    evicted: Tier = field(default_factory=Drop)
    guard: Guard | None = None
    offload: bool = False
    positions: str = "original"
    select: Selection = field(default_factory=SelectAll)
    delay: int = 0
    probe: tuple[int, ...] = ()
    checked: tuple[Policy, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def parse(cls, model, **settings: Any) -> CacheConfig:
        """Settings as users give them: those of :class:`~kv_gym.live.EvictingCache`, by name.

        None stands for the default, which for protection and positions is the policy's own.
        """
        model = transformers_model(model)
        refuse_unsupported(model)
        for name in ("policy", "budget"):
            if settings.get(name) is None:
                raise UserError(f"{name} is None; expected one, such as policy='h2o' and budget=0.25")
        return cls(model, **_parsed(settings))

    def fork(self, **changes: Any) -> CacheConfig:
        """These settings with changes, validated as new ones are.

        Args:
            **changes: as for :meth:`parse`. None leaves a setting as it is, but another policy brings its own
                protection and positions.

        Raises:
            UserError: settings that do not fit, or that need what a cache with these settings did not keep.
        """
        checked = {id(known): known for known in (*self.checked, *self.tracked_policies)}
        changed = replace(self, checked=tuple(checked.values()), **_parsed(changes))
        self._refuse_what_was_not_kept(changed)
        return changed

    def __post_init__(self) -> None:
        if self.guard is not None and not isinstance(self.guard, Guard):
            raise UserError(f"guard is {self.guard!r}; expected a kv_gym.live.Guard")
        for policy in self.tracked_policies:
            if not any(policy is known for known in self.checked):
                _refuse_unfit(policy, self.model)
        if not isinstance(self.policy, PolicyGroup):
            self.allocation.refuse_unfit(self.policy)
        protection_for(self.policy, self.sinks, self.recent)  # refuses negative ones
        self._refuse_unfit_delay()
        self.layer_tier.refuse_unfit(self.model.config.get_text_config())
        self.evicted.refuse_other_model(self.model)
        self._refuse_unfit_recording()
        self._refuse_unfit_selection()
        self._refuse_unfit_probe()
        if self.positions not in POSITIONS:
            raise UserError(f"positions={self.positions!r} is unknown; expected 'original' or 'cache'")
        if self.rope_shift is not None and not isinstance(self.layer_tier, Drop):
            raise UserError(
                f"positions='cache' moves kept tokens together, and with evicted={self.evicted.name!r}, a guard or "
                "offload=True evicted ones still have a place between them: choose one of the two"
            )

    def _refuse_unfit_recording(self) -> None:
        guard = self.guard
        if self.offload and isinstance(self.evicted, Merge | MergeValues):
            raise UserError(
                f"evicted={self.evicted.name!r} changes survivors, so a copy of evicted pairs would not bring the "
                "context back: choose drop or bits with offload=True"
            )
        if self.offload and self.needs_hidden:
            raise UserError(
                f"policy {self.policy.name!r} scores tokens by hidden states, which pairs that come back from the host "
                "do not bring along: leave offload out, or choose another policy"
            )
        if guard is None:
            return
        if guard.then == "restore" and not self.offload:
            raise UserError("a guard can restore only what was kept: give offload=True to the cache")
        if guard.signal == "tier" and not isinstance(self.evicted, LowPrecision):
            raise UserError(
                f"signal 'tier' is of pairs kept in low precision, and evicted={self.evicted.name!r} keeps none"
            )
        for layer in guard.layers or ():
            if not 0 <= layer < self.num_layers:
                raise UserError(
                    f"the guard averages layer {layer}, and {self.num_layers} layers evict: count them from 0"
                )

    def _refuse_unfit_delay(self) -> None:
        if type(self.delay) is not int or not 0 <= self.delay < 2**31:
            raise UserError(f"delay is {self.delay!r}; expected a number of tokens from 0")
        if isinstance(self.budget, int) and protected_tokens(self.budget, self.sinks, self.delay)[1] < self.delay:
            raise UserError(
                f"delay={self.delay} leaves the newest {self.delay} tokens alone, beside {self.sinks} first ones, and "
                f"half of a budget at most is protected: expected a budget of at least {2 * (self.delay + self.sinks)} "
                f"slots instead of {self.budget}"
            )

    def _refuse_unfit_selection(self) -> None:
        if self.reads_all:
            return
        select = f"select={self.select.name!r}"
        observing = [policy.name for _, policy in self.stateful_policies if policy.repetition is None]
        if observing:
            raise UserError(
                f"policy {observing[0]!r} needs the attention of every query to all slots, and with {select} a query "
                "reads some of them: choose a policy without statistics, such as snapkv or keydiff, or select='all'"
            )
        if self.guard is not None or self.offload or not isinstance(self.evicted, Drop | Merge | MergeValues):
            raise UserError(
                f"{select} chooses among full-precision slots alone, so it goes with evicted='drop' or 'merge', and "
                "with neither a guard nor offload=True: leave these out"
            )
        if self.positions != "original":
            raise UserError(
                f"{select} keeps bounds of the keys, and positions='cache' moves keys at every step: choose one of "
                "the two"
            )

    def _refuse_unfit_probe(self) -> None:
        vocabulary = self.model.config.get_text_config().vocab_size
        if not isinstance(self.probe, tuple):
            raise UserError(f"the probe is {self.probe!r}; expected a list of token ids")
        wrong = [token for token in self.probe if type(token) is not int or not 0 <= token < vocabulary]
        if wrong:
            raise UserError(
                f"a probe holds {wrong[0]!r}; expected token ids from 0 and below {vocabulary}, made with the model's "
                "tokenizer"
            )
        if self.probe and self.needs_second_reading:
            raise UserError(
                f"policy {self.policy.name!r} has the context repeated before a cut, and a probe is another text to "
                "read there: choose a policy without a second reading, or leave the probe out"
            )
        if self.probe and self.allocation.cascades:
            raise UserError(
                f"allocation {self.allocation.name!r} cuts layers while later ones are read, and a probe is read when "
                "all have been: choose another allocation, or leave the probe out"
            )

    def _refuse_what_was_not_kept(self, changed: CacheConfig) -> None:
        policy, kept = changed.policy, self.tracked_policies
        group = "or with a PolicyGroup that has the policy as a member"
        stateful = isinstance(policy, StatefulPolicy) or policy.needs_hidden
        lacks_queries = policy.needs_queries > self.num_queries and not self.probe
        if (stateful and policy not in kept) or lacks_queries:
            raise UserError(
                f"the cache did not keep what policy {policy.name!r} needs: make it with that policy, {group}"
            )
        if changed.num_queries > self.num_queries and not self.probe:
            raise UserError(
                f"the cache kept the last {self.num_queries} queries, and policy {policy.name!r} with allocation "
                f"{changed.allocation.name!r} needs {changed.num_queries}, which it did not keep: make it with that "
                f"policy and allocation, {group}"
            )

    # what follows from the settings

    @cached_property
    def num_layers(self) -> int:
        """How many layers evict."""
        return len(full_layers(self.model.config.get_text_config()))

    @cached_property
    def layer_tier(self) -> Tier:
        """What layers do with evicted pairs: `evicted`, with a recorder where there is a guard or a host copy."""
        recorded = self.guard is not None or self.offload
        return RecordingTier(self.evicted, self.guard, self.offload) if recorded else self.evicted

    @cached_property
    def rope_shift(self) -> RopeShift | None:
        """Gives kept keys positions inside the cache when they are read; None: they keep their own."""
        return RopeShift(self.model) if self.positions == "cache" else None

    @cached_property
    def tracked_policies(self) -> tuple[Policy, ...]:
        """The policies whose queries and state are kept up to date: `policy`, or the members of a group."""
        return self.policy.members if isinstance(self.policy, PolicyGroup) else (self.policy,)

    @cached_property
    def stateful_policies(self) -> list[tuple[int, StatefulPolicy]]:
        """Tracked policies with memory, each with its index among the tracked ones."""
        return [(i, policy) for i, policy in enumerate(self.tracked_policies) if isinstance(policy, StatefulPolicy)]

    @cached_property
    def num_queries(self) -> int:
        """How many of the last queries must be kept."""
        return max((self.allocation.needs_queries, *(policy.needs_queries for policy in self.tracked_policies)))

    @cached_property
    def needs_hidden(self) -> bool:
        """Whether some tracked policy scores tokens by their hidden states, which are there only as they arrive."""
        return any(policy.needs_hidden for policy in self.tracked_policies)

    @cached_property
    def needs_output(self) -> bool:
        """Whether some tracked policy reads the output projection."""
        return any(policy.needs_output for policy in self.tracked_policies)

    @cached_property
    def needs_second_reading(self) -> bool:
        """Whether some tracked policy has the context read again, so that its tokens must be stored."""
        return any(policy.repetition is not None for policy in self.tracked_policies)

    @cached_property
    def depends_on_queries(self) -> bool:
        """Whether anything but the slots changes when queries come."""
        observing = any(policy.repetition is None for _, policy in self.stateful_policies)
        return bool((self.num_queries and not self.probe) or observing or self.layer_tier.sees_queries)

    @property
    def reads_all(self) -> bool:
        """Whether every query reads every slot."""
        return isinstance(self.select, SelectAll)

    @property
    def keeps_everything(self) -> bool:
        """Whether the budget is all tokens, however many come."""
        return self.budget == 1.0 and isinstance(self.budget, float)

    @cached_property
    def evicts_after_forward(self) -> bool:
        """Whether evictions come at the end of a forward, when all layers have read it."""
        whole = self.allocation.whole_model and not self.allocation.cascades
        return whole or self.policy.repetition is not None or bool(self.probe)

    @property
    def block_size(self) -> int | None:
        """Tokens that a layer takes in at a time, before it evicts; None: all of a forward.

        An eviction that needs all layers comes at the end of a forward, when they have read it; in a cascade, when the
        layer has.
        """
        later = self.evicts_after_forward or self.allocation.cascades
        return self.trigger.every if self.trigger.within_forward and not later else None

    @cached_property
    def scores_on_arrival(self) -> bool:
        """Whether a token's score is computed when it comes, and stored.

        Worth its bytes where evictions are repeated; and the only way for a policy that needs hidden states, whose
        scores stay what they were even where a tier changes keys or values later.
        """
        return self.policy.needs_hidden or (
            self.policy.static
            and self.trigger.every is not None
            and not self.allocation.needs_queries
            and not self.layer_tier.changes_keys
            and self.rope_shift is None
        )

    @cached_property
    def scores_together(self) -> bool:
        """Whether all layers may score the token of a decoding step together, at the end of the forward.

        The same scores as one layer after the other, in a fraction of the operations.
        """
        return (
            self.scores_on_arrival
            and not self.needs_hidden
            and self.trigger.every is not None
            and not self.trigger.within_forward
            and isinstance(self.layer_tier, Drop)
        )

    @cached_property
    def decides_together(self) -> bool:
        """Whether all layers also cut the token of a decoding step together, each by its own slots alone.

        Every layer has attended by then, and neither scores nor cuts need its queries.
        """
        return self.scores_together and self.allocation.equal and not self.evicts_after_forward

    @cached_property
    def stored_scores(self) -> dict[str, Policy]:
        """The policies whose scores are stored when a token comes, by the name of the buffer."""
        members = enumerate(self.tracked_policies) if self.policy not in self.tracked_policies else ()
        alone = {"scores": self.policy} if self.scores_on_arrival else {}
        return alone | {f"{i}/scores": policy for i, policy in members if policy.needs_hidden}

    def slots_after(self, seen: int) -> int:
        """Slots that each KV head may keep on average after `seen` tokens."""
        return slots_after(self.budget, seen)

    def slack(self, length: int) -> int:
        """Slots by which a full buffer grows: what comes until the next eviction; where that is unknown, an eighth."""
        waiting = self.trigger.every or 0
        grows = self.trigger.every is None or isinstance(self.budget, float)
        return max(waiting, length // 8) if grows else waiting

    @property
    def protected_recent(self) -> int:
        """Last tokens that always stay: `recent`, or those that `delay` or the trigger leave alone."""
        return max(self.recent, self.trigger.lag, self.delay)

    def scored_layer(
        self, scores: Tensor, view: CacheView, ordinal: int, seen: Sequence[int], budgets: Sequence[int]
    ) -> ScoredLayer:
        """A layer ready to be cut.

        Args:
            scores: `[batch, kv_heads, tokens]`.
            view: its slots.
            ordinal: which of the evicting layers it is.
            seen: tokens seen, per row.
            budgets: slots per head, per row.
        """
        return ScoredLayer.of(
            scores, self.allocation, view, self.sinks, self.protected_recent, ordinal, self.num_layers, seen, budgets
        )

    def protected_range(self, slots: int, seen: int) -> tuple[int, int]:
        """Positions below the first and from the second number on stay, in a head of `slots` slots after `seen`."""
        sinks, recent = protected_tokens(slots, self.sinks, self.protected_recent)
        return sinks, seen - recent if recent else UNSEEN

    def warn_of_length(self, seen: int) -> None:
        """Warn when a learned policy is asked about a context shorter or longer than those it was trained on."""
        shortest, longest = getattr(self.policy, "lengths", (seen, seen))
        if not shortest <= seen <= longest:
            lengths = shortest if shortest == longest else f"{shortest} to {longest}"
            name = getattr(self.policy, "training", {}).get("agent", self.policy.name)
            warnings.warn(
                # no number that grows: Python shows a sentence once
                f"policy {name!r} was trained on contexts of {lengths} tokens and evicts now after "
                f"{'fewer' if seen < shortest else 'more'}: its choice may be poor",
                stacklevel=2,
            )


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "policy": make_policy,
    "budget": parse_budget,
    "allocation": parse_allocation,
    "trigger": Trigger.parse,
    "evicted": parse_tier,
    "select": parse_selection,
}


def _parsed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Objects for names and texts, without what is None; a policy brings its own protection and positions."""
    given = {name: value for name, value in settings.items() if value is not None}
    parsed = {name: _PARSERS[name](value) if name in _PARSERS else value for name, value in given.items()}
    if "policy" in parsed:
        sinks, recent = parsed["policy"].protection
        parsed = {"sinks": sinks, "recent": recent, "positions": parsed["policy"].positions} | parsed
    return parsed


def _refuse_unfit(policy: Policy, model) -> None:
    if policy.needs_future:
        raise UserError(
            f"policy {policy.name!r} is an oracle: it sees the future, which live decoding does not have; "
            "evaluate it on traces"
        )
    if policy.needs_hidden and not (policy.static or policy.scores_on_arrival):
        raise UserError(
            f"policy {policy.name!r} needs hidden states and is not static: a live cache shows it those of a token "
            "once, when it arrives, and keeps none, so expected a policy whose score of a token never changes"
        )
    if policy.needs_hidden:
        full_attention_modules(model)
    fingerprint = getattr(policy, "fingerprint", None)
    if fingerprint is not None:
        accept = getattr(policy, "accept_fingerprint", False)
        fingerprint.refuse_other(Fingerprint.of(model), f"policy {policy.name!r}", type(model).__name__, accept)
    if (frequencies := getattr(policy, "frequencies", None)) is not None:
        refuse_other_rotation(model, frequencies, policy.name)
