"""When a layer evicts, and which of its slots stay: the settings that all layers of one cache share."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.budgets import select, slots_per_head, uniform
from kv_gym.budgets.budget import Budget
from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.policies import Policy


@dataclass(frozen=True)
class Trigger:
    """Fires at the end of the first forward, then whenever `every` new tokens came since it last fired.

    Attributes:
        every: new tokens between firings; None fires once.
    """

    every: int | None = None

    @classmethod
    def parse(cls, text: str) -> Trigger:
        """Read ``prefill`` or ``every:<tokens>``.

        Raises:
            UserError: anything else.
        """
        if text == "prefill":
            return cls()
        match = re.fullmatch(r"every:([1-9]\d*)", text) if isinstance(text, str) else None
        if match is None:
            raise UserError(f"trigger {text!r} is unknown; expected 'prefill' or 'every:<tokens>' such as 'every:64'")
        return cls(int(match[1]))

    def fires(self, seen: int, fired_at: int | None) -> bool:
        """Whether to evict now, after `seen` tokens, when it last fired after `fired_at` (None: never)."""
        if fired_at is None:
            return True
        return self.every is not None and seen - fired_at >= self.every


@dataclass(frozen=True)
class Eviction:
    """What one cache does with all its layers.

    Attributes:
        policy: scores the slots.
        budget: slots per KV head, or share of the tokens seen when the trigger fires.
        sinks, recent: first and last tokens that always stay.
        trigger: when.
        watched: the policies whose queries and state are kept up to date: `policy`, or the members of a panel.
    """

    policy: Policy
    budget: Budget
    sinks: int
    recent: int
    trigger: Trigger
    watched: tuple[Policy, ...]

    @property
    def queries(self) -> int:
        """How many of the last queries must be kept."""
        return max((policy.needs_queries for policy in self.watched), default=0)

    def room(self, seen: int) -> int:
        """Slots that each KV head may keep after `seen` tokens; computed on the CPU, so no device waits."""
        return int(slots_per_head(self.budget, torch.tensor([seen])))

    def budgets(self, seen: Tensor, kv_heads: int) -> Tensor:
        """The budget of each head `[batch, kv_heads]` as policies read it; `seen` is `[batch]`."""
        return uniform(self.budget, seen, kv_heads)

    def warn_of_length(self, seen: int) -> None:
        """Warn when a learned policy is asked about a context shorter or longer than those it was trained on."""
        shortest, longest = getattr(self.policy, "lengths", (seen, seen))
        if not shortest <= seen <= longest:
            warnings.warn(
                f"policy {self.policy.name!r} was trained on contexts of {shortest} to {longest} tokens and evicts "
                f"now after {seen}: its choice may be poor",
                stacklevel=2,
            )

    def keep(self, view: CacheView) -> Tensor:
        """Indices of the slots that stay, `[batch, kv_heads, kept]` int64 ascending; `kept` is alike in all heads."""
        kept = select(self.policy, view, self.sinks, self.recent)
        return kept.nonzero()[:, -1].view(*kept.shape[:2], -1)
