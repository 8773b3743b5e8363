"""Policies over another policy: they change its scores, and need what it needs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.models.context_repetition import ContextRepetition
from kv_gym.policies.base import Policy, StatefulPolicy
from kv_gym.policies.registry import make_policy

# of a trained policy: which model it belongs to, lengths it was trained on, how, and the bytes of its weights
_OF_TRAINED_BASE = ("absolute", "accept_fingerprint", "fingerprint", "lengths", "nbytes", "training")


@dataclass(frozen=True)
class PolicyWrapper(StatefulPolicy):
    """A policy that scores by the scores of another one, its base.

    It is shown the queries, hidden states and future that its base needs, protects what its base protects, and wants
    the rotary positions that its base wants. Over a trained base it belongs to the same model and has its training
    lengths and bytes. The state is the base's own: over a base without memory it is empty, and recordings hold it
    under the base's name (:attr:`~kv_gym.policies.Policy.statistics`). A subclass that reads queries itself asks for
    ``max(its own, super().needs_queries)``. Scores compare across heads where both the subclass and the base say so.

    Attributes:
        over: the base, by anything that :func:`~kv_gym.make_policy` takes; kept as the policy object it names.
    """

    over: str | Policy = "snapkv"

    def __post_init__(self) -> None:
        base = make_policy(self.over)
        inherited = {
            "over": base,  # two that name the same base are equal
            "needs_hidden": self.needs_hidden or base.needs_hidden,
            "needs_future": self.needs_future or base.needs_future,
            "needs_output": self.needs_output or base.needs_output,
            "prompt_only": self.prompt_only or base.prompt_only,
            "comparable": self.comparable and base.comparable,
            "positions": base.positions if self.positions == "original" else self.positions,
        }
        for name, value in inherited.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    def __getattr__(self, name: str) -> Any:
        """What a trained base has and other policies have not."""
        if name in _OF_TRAINED_BASE:
            return getattr(self.base, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def base(self) -> Policy:
        """The policy whose scores these are made of."""
        return cast(Policy, self.over)

    @property
    def statistics(self) -> str:
        return self.base.statistics

    @property
    def needs_queries(self) -> int:
        return self.base.needs_queries

    @property
    def protection(self) -> tuple[int, int]:
        return self.base.protection

    @property
    def repetition(self) -> ContextRepetition | None:
        return self.base.repetition

    def with_tokenizer(self, tokenizer: Any) -> Policy:
        base = self.base.with_tokenizer(tokenizer)
        return self if base is self.base else replace(self, over=base)

    def initial_state(self, view: CacheView) -> dict[str, Tensor]:
        return self.base.initial_state(view) if isinstance(self.base, StatefulPolicy) else {}

    def observe(self, view: CacheView, attention: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.base.observe(view, attention, state) if isinstance(self.base, StatefulPolicy) else dict(state)

    def observe_again(
        self, view: CacheView, attention: Tensor, state: Mapping[str, Tensor], hidden: Tensor | None = None
    ) -> dict[str, Tensor]:
        base = self.base
        return base.observe_again(view, attention, state, hidden) if isinstance(base, StatefulPolicy) else dict(state)

    def base_scores(self, view: CacheView) -> Tensor:
        """The base's scores made non-negative, `[batch, kv_heads, tokens]` float32, zero where not valid.

        A head with a negative score, as of a base that is no attention, gets the softmax of its scores instead.
        """
        scores = self.base.score(view).float()
        negative = (view.valid & (scores < 0)).any(-1, keepdim=True)
        # at least one slot of a head is finite, or every slot is padding and masked again
        softened = scores.masked_fill(~view.valid, float("-inf")).softmax(-1)
        return torch.where(negative, softened, scores).masked_fill(~view.valid, 0.0)


def __getattr__(name: str) -> Any:
    if name == "Over":
        warnings.warn("Over is called PolicyWrapper now", DeprecationWarning, stacklevel=2)
        return PolicyWrapper
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
