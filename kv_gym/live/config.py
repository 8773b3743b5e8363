"""What one cache does with all its layers: policy, budget, allocation, protection and trigger."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import Tensor

from kv_gym.budgets import UNSEEN, Allocation, Layer, judged
from kv_gym.budgets.budget import Budget, slots_after
from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.live.rope_shift import Turn
from kv_gym.live.tiers import Drop, Tier
from kv_gym.live.trigger import Trigger
from kv_gym.policies import Policy, StatefulPolicy

DROP = Drop()
UNLIMITED = 2**40  # the budget of a row that is not to be cut now


@dataclass(frozen=True)
class Eviction:
    """The settings that all layers of one cache share.

    Attributes:
        policy: scores the slots.
        budget: slots per KV head, or share of the tokens seen when the trigger fires.
        sinks, recent: first and last tokens that always stay.
        trigger: when.
        allocation: who gets the slots.
        watched: the policies whose queries and state are kept up to date: `policy`, or the members of a panel.
        layers: how many layers evict.
        evicted: what becomes of evicted pairs.
        turn: gives kept keys positions inside the cache when they are read; None: they keep their own.
    """

    policy: Policy
    budget: Budget
    sinks: int
    recent: int
    trigger: Trigger
    allocation: Allocation
    watched: tuple[Policy, ...]
    layers: int
    evicted: Tier = DROP
    turn: Turn | None = None

    def __post_init__(self) -> None:
        if self.turn is not None and not isinstance(self.evicted, Drop):
            raise UserError(
                f"positions='cache' moves kept tokens together, and with evicted={self.evicted.name!r}, a guard or "
                "offload=True evicted ones still have a place between them: choose one of the two"
            )

    @property
    def queries(self) -> int:
        """How many of the last queries must be kept."""
        return max((self.allocation.needs_queries, *(policy.needs_queries for policy in self.watched)))

    @property
    def stateful(self) -> list[tuple[int, StatefulPolicy]]:
        """Watched policies with memory, each with its place among the watched."""
        return [(place, each) for place, each in enumerate(self.watched) if isinstance(each, StatefulPolicy)]

    @property
    def keeps_all(self) -> bool:
        """Whether the budget is all tokens, however many come."""
        return self.budget == 1.0 and isinstance(self.budget, float)

    @property
    def remembers(self) -> bool:
        """Whether anything but the slots changes when queries come."""
        observing = any(policy.repetition is None for _, policy in self.stateful)
        return bool(self.queries or observing or self.evicted.sees_queries)

    @property
    def rereads(self) -> bool:
        """Whether some watched policy has the context read again, so that its tokens must be remembered."""
        return any(policy.repetition is not None for policy in self.watched)

    @property
    def at_the_end(self) -> bool:
        """Whether cuts come at the end of a forward, when all layers have read it."""
        return self.allocation.whole_model or self.policy.repetition is not None

    @property
    def piece(self) -> int | None:
        """Tokens that a layer takes in at a time, before it evicts; None: all of a forward.

        A cut that needs all layers comes at the end of a forward, when they have read it.
        """
        return self.trigger.every if self.trigger.inside and not self.at_the_end else None

    def slack(self, length: int) -> int:
        """Slots by which a full buffer grows: what comes until the next firing, or an eighth where that is unknown."""
        waiting = self.trigger.every or 0
        grows = self.trigger.every is None or isinstance(self.budget, float)
        return max(waiting, length // 8) if grows else waiting

    def room(self, seen: int) -> int:
        """Slots that each KV head may keep on average after `seen` tokens."""
        return slots_after(self.budget, seen)

    @property
    def needs_hidden(self) -> bool:
        """Whether some watched policy scores tokens by their hidden states, which are there only as they arrive."""
        return any(policy.needs_hidden for policy in self.watched)

    @property
    def scores_once(self) -> bool:
        """Whether a token's score is computed when it comes and stored.

        Worth its bytes where cuts are repeated; and the only way for a policy that needs hidden states, whose scores
        stay what they were even where a tier changes keys or values later.
        """
        return self.policy.needs_hidden or (
            self.policy.static
            and self.trigger.every is not None
            and not self.allocation.needs_queries
            and not self.evicted.changes_keys
            and self.turn is None
        )

    @property
    def scored(self) -> dict[str, Policy]:
        """The policies whose scores are stored when a token comes, by the name of the buffer."""
        members = enumerate(self.watched) if self.policy not in self.watched else ()
        own = {"scores": self.policy} if self.scores_once else {}
        return own | {f"{place}/scores": each for place, each in members if each.needs_hidden}

    def judge(self, scores: Tensor, view: CacheView, place: int) -> Layer:
        """A layer ready to be cut; `place` is which of the evicting layers it is."""
        recent = max(self.recent, self.trigger.spared)
        return judged(scores, self.allocation, view, self.sinks, recent, place, self.layers)

    def guarded(self, room: int, seen: int) -> tuple[int, int]:
        """Positions below the first and from the second number on stay, in a head of `room` slots after `seen`."""
        sinks = min(self.sinks, room // 2)
        recent = min(max(self.recent, self.trigger.spared), room // 2 - sinks)
        return sinks, seen - recent if recent else UNSEEN

    def warn_of_length(self, seen: int) -> None:
        """Warn when a learned policy is asked about a context shorter or longer than those it was trained on."""
        shortest, longest = getattr(self.policy, "lengths", (seen, seen))
        if not shortest <= seen <= longest:
            lengths = shortest if shortest == longest else f"{shortest} to {longest}"
            name = getattr(self.policy, "training", {}).get("agent", self.policy.name)
            warnings.warn(
                f"policy {name!r} was trained on contexts of {lengths} tokens and evicts "
                f"now after {seen}: its choice may be poor",
                stacklevel=2,
            )
