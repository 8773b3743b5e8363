"""What every policy is: frozen settings and one function from a cache view to scores."""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import numpy as np
from torch import Tensor

from kv_gym.cache_view import CacheView, Future
from kv_gym.errors import UserError
from kv_gym.files import is_of_type
from kv_gym.models.context_repetition import ContextRepetition


@dataclass(frozen=True)
class Paper:
    """The paper that a method follows.

    Attributes:
        title: as published.
        arxiv: its arXiv id, such as ``2404.14469``; "" where it is not on arXiv.
        section: where in the paper the method stands, such as ``section 4``.
        venue: conference or journal, and year.
        url: where to read it, if not on arXiv.
    """

    title: str
    arxiv: str = ""
    section: str = ""
    venue: str = ""
    url: str = ""

    @property
    def link(self) -> str:
        """The paper in Markdown: its title with a link, and venue and section where they are known."""
        url = f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else self.url
        title = f"[{self.title}]({url})" if url else self.title
        return ", ".join(filter(None, (f"{title} ({self.venue})" if self.venue else title, self.section)))


@dataclass(frozen=True, eq=False)  # its dataclasses compare settings; one with weights equals itself alone
class Policy(ABC):
    """Scores slots. Budgets, protection, triggers and ties belong to the machinery around it.

    Attributes:
        paper: the paper that the method follows, or None. A policy of this package states it in any case: that is how
            the registry tells its files from others.
        sinks: how many first tokens are always kept, unless the caller gives a number.
        recent: how many last tokens are always kept, unless the caller gives a number.
        needs_future: an oracle; it can be replayed, never run live.
        needs_hidden: it reads what the layer's attention receives of each token. A live cache has that only while the
            token arrives and keeps none of it, so such a policy must be `static` or `scores_on_arrival` too.
        needs_output: it reads the slices of the layer's output projection.
        comparable: scores of different heads and layers may be compared as they are.
        static: a slot's score depends on its layer, its head and its own key, value, position and hidden state
            alone, not on other slots nor on what was seen since: a token may be scored once, when it arrives.
        scores_on_arrival: a token is scored once, when it arrives, among the tokens of the same forward (of the same
            block, where a trigger evicts within a forward), and never again: a prompt that is read in one forward is
            seen as a whole.
        prompt_only: its source scores a prompt once, at its end; triggers that fire while decoding go beyond it.
        positions: rotary positions of kept keys in a live cache, unless the caller chooses: ``original``, or
            ``cache``, their place among the kept tokens.

    A policy that needs the last m queries overrides :attr:`needs_queries`, or is a :class:`WindowPolicy`.
    """

    paper: ClassVar[Paper | None] = None
    sinks: ClassVar[int] = 0
    recent: ClassVar[int] = 0
    needs_future: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False
    needs_output: ClassVar[bool] = False
    comparable: ClassVar[bool] = False
    static: ClassVar[bool] = False
    scores_on_arrival: ClassVar[bool] = False
    prompt_only: ClassVar[bool] = False
    positions: ClassVar[str] = "original"

    def _require(self, holds: bool, expected: str) -> None:
        """Refuse settings that make no sense, naming all of them."""
        if not holds:
            given = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.init)
            raise UserError(f"{self.name} got {given}; expected {expected}")

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
        """How many of the last queries the policy reads."""
        return 0

    @property
    def repetition(self) -> ContextRepetition | None:
        """How the context is read again before it is scored; None where it is not.

        Such a policy has its state from :meth:`StatefulPolicy.observe_again` alone. Recordings hold it, and a live
        cache reads its own content again right before a cut, at the end of a forward.
        """
        return None

    @property
    def protection(self) -> tuple[int, int]:
        """Counts of first and last tokens that are always kept, unless the caller gives others."""
        return self.sinks, self.recent

    def with_tokenizer(self, tokenizer: Any) -> Policy:
        """The policy to use where the model's tokenizer is known: itself, unless some setting is a text's tokens.

        Args:
            tokenizer: a transformers tokenizer.
        """
        return self

    @abstractmethod
    def score(self, view: CacheView) -> Tensor:
        """Scores `[batch, kv_heads, tokens]`, higher = keep; values at invalid slots do not matter."""

    def score_layers(self, views: Sequence[CacheView]) -> list[Tensor]:
        """Scores of several layers, as :meth:`score` gives them for each; a policy that can batch them overrides it.

        Args:
            views: of one shape, in the order of the layers.
        """
        return [self.score(view) for view in views]


class WindowPolicy(Policy):
    """A policy that reads the attention of the last `window` queries, and protects their tokens.

    Attributes:
        window: how many queries; a setting of the subclass.
    """

    window: int

    @property
    def needs_queries(self) -> int:
        return self.window

    @property
    def protection(self) -> tuple[int, int]:
        return 0, self.window

    def _require_window(self, kernel: int) -> None:
        """Refuse a window or a kernel that neighbours cannot be pooled with."""
        self._require(self.window >= 1 and kernel >= 1 and kernel % 2 == 1, "window and kernel above 0, kernel odd")


class StatefulPolicy(Policy):
    """A policy with memory: tensors `[batch, kv_heads, tokens, ...]` that the machinery keeps with the slots.

    Attributes:
        observed_with: names of the settings that the state depends on; `statistics` tells their values apart.
    """

    observed_with: ClassVar[tuple[str, ...]] = ()

    @property
    def statistics(self) -> str:
        """The policy's name, with the settings of `observed_with` that are not the defaults: ``lra(top=8)``."""
        defaults = {f.name: f.default for f in fields(self) if f.name in self.observed_with}
        changed = [f"{name}={value}" for name in defaults if (value := getattr(self, name)) != defaults[name]]
        return f"{self.name}({','.join(changed)})" if changed else self.name

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
            attention: `[batch, query_heads, m, tokens]` float32, attention of the repetition's queries to the slots
                that their chunk repeats, zero elsewhere and for padding.
            state: the state before.
            hidden: `[batch, m, D]`, the layer's input at these queries, where the repetition is `projected`.
        """
        return dict(state)


def recorded_future(policy: Policy, view: CacheView) -> Future:
    """The future that an oracle is shown.

    Raises:
        UserError: none is recorded.
    """
    if view.future is None:
        raise UserError(f"policy {policy.name!r} sees the future and none is recorded here: evaluate it on traces")
    return view.future


def load_settings(kind: type[Policy], settings: Mapping[str, Any]) -> Policy:
    """A new policy of class `kind`.

    Raises:
        UserError: an unknown setting, and the known ones; or a value of another type than the setting's.
    """
    known = [f.name for f in fields(kind) if f.init]
    for key in settings:
        if key not in known:
            raise UserError(
                f"policy {kind.__name__} has no setting {key!r}; its settings: {', '.join(known) or 'none'}"
            )
    hints = get_type_hints(kind) if settings else {}
    values = {key: value.item() if isinstance(value, np.generic) else value for key, value in settings.items()}
    for key, value in values.items():
        if isinstance(value, Path):  # a policy's folder, in place of its name
            continue
        if not is_of_type(value, hints[key]):
            expected = getattr(hints[key], "__name__", str(hints[key]))
            raise UserError(f"policy {kind.__name__} got {key}={reprlib.repr(value)}; expected {expected}")
    return kind(**values)
