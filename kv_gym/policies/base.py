"""What every policy is: frozen settings and one function from a cache view to scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.models.context_repetition import ContextRepetition


@dataclass(frozen=True, eq=False)  # its dataclasses compare settings; one with weights equals itself alone
class Policy(ABC):
    """Scores slots. Budgets, protection, triggers and ties belong to the machinery around it.

    Class attributes:
        sinks, recent: how many first and last tokens are always kept unless the caller says otherwise.
        needs_future: an oracle; it can be replayed, never run live.
        needs_hidden: it reads what the layer's attention receives of each token. A live cache has that only while the
            token arrives and keeps none of it, so such a policy must be `static` too.
        needs_output: it reads the slices of the layer's output projection.
        comparable: scores of different heads and layers may be compared as they are.
        static: a slot's score depends on its layer, its head and its own key, value, position and hidden state
            alone, not on other slots nor on what was seen since: a token may be scored once, when it arrives.
        prompt_only: its source scores a prompt once, at its end; a trigger that fires while decoding asks for more.
        positions: what rotary positions kept keys have in a live cache, unless the caller says otherwise:
            ``original``, or ``cache``, their place among those that are left.

    A policy that needs the last m queries overrides :attr:`needs_queries`.
    """

    sinks: ClassVar[int] = 0
    recent: ClassVar[int] = 0
    needs_future: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False
    needs_output: ClassVar[bool] = False
    comparable: ClassVar[bool] = False
    static: ClassVar[bool] = False
    prompt_only: ClassVar[bool] = False
    positions: ClassVar[str] = "original"

    @property
    def name(self) -> str:
        """The registry's name: the name of the file that the policy lives in."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def statistics(self) -> str:
        """The name under which recordings hold the policy's state; "" for a policy without memory."""
        return ""

    @property
    def needs_queries(self) -> int:
        """How many of the last queries the policy wants to see."""
        return 0

    @property
    def repetition(self) -> ContextRepetition | None:
        """How the context must be read again before it is scored; None: it need not be.

        Such a policy has its state from :meth:`StatefulPolicy.observe_again` alone. Recordings hold it, and a live
        cache reads its own content again right before a cut, at the end of a forward.
        """
        return None

    @property
    def protection(self) -> tuple[int, int]:
        """First and last tokens that the machinery always keeps, unless the caller says otherwise."""
        return self.sinks, self.recent

    @abstractmethod
    def score(self, view: CacheView) -> Tensor:
        """Scores `[batch, kv_heads, tokens]`, higher = keep; values at invalid slots do not matter."""


class StatefulPolicy(Policy):
    """A policy with memory: tensors `[batch, kv_heads, tokens, ...]` that the machinery keeps beside the slots.

    Class attributes:
        observed_with: names of the settings that the state depends on; `statistics` tells their values apart.
    """

    observed_with: ClassVar[tuple[str, ...]] = ()

    @property
    def statistics(self) -> str:
        """The policy's name, with the settings of `observed_with` that are not the defaults: ``lra(top=8)``."""
        defaults = {f.name: f.default for f in fields(self) if f.name in self.observed_with}
        own = [f"{name}={value}" for name in defaults if (value := getattr(self, name)) != defaults[name]]
        return f"{self.name}({','.join(own)})" if own else self.name

    @abstractmethod
    def initial_state(self, view: CacheView) -> dict[str, Tensor]:
        """State of the slots of `view` before any query was observed."""

    @abstractmethod
    def observe(self, view: CacheView, attention: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state after a block of at most 128 new queries.

        Args:
            view: the slots that are cached, with the new tokens among them.
            attention: `[batch, query_heads, new, tokens]` float32, what the new queries attended to.
            state: the state before.
        """

    def observe_again(
        self, view: CacheView, attention: Tensor, state: Mapping[str, Tensor], hidden: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The state after a block of at most 128 queries of a :attr:`~Policy.repetition`.

        Args:
            view: the slots that are cached; with `output` where the repetition is `projected`.
            attention: `[batch, query_heads, m, tokens]` float32, what the repetition's queries paid to the slots that
                they are asked about, zero elsewhere and for padding.
            state: the state before.
            hidden: `[batch, m, D]`, the layer's input at these queries, where the repetition is `projected`.
        """
        return dict(state)


def load_settings(kind: type[Policy], settings: Mapping[str, Any]) -> Policy:
    """A new policy of class `kind`; an unknown setting is an error that lists the known ones."""
    known = [f.name for f in fields(kind) if f.init]
    for key in settings:
        if key not in known:
            listed = ", ".join(known) if known else "none"
            raise UserError(f"policy {kind.__name__} has no setting {key!r}; its settings: {listed}")
    return kind(**settings)
