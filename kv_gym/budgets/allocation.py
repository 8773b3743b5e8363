"""Allocations: rules that divide the model's total of slots among its KV heads. The simplest is here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from kv_gym.budgets.order import priorities, top_mask
from kv_gym.cache_view import CacheView, protected_tokens
from kv_gym.errors import UserError
from kv_gym.policies.base import Paper, Policy


class RowCounts(NamedTuple):
    """What the host knows of a row of the batch.

    Attributes:
        seen: tokens seen.
        budget: slots per head, an equal share of the total.
        protected: how many slots of every head are protected at most.
    """

    seen: int
    budget: int
    protected: int


@dataclass(frozen=True)
class ScoredLayer:
    """One layer that is about to be cut.

    Attributes:
        view: its slots; ``view.budget`` is an equal share of the total, the same for every head of a row.
        priorities: `[batch, kv_heads, tokens]` int64, see :func:`kv_gym.budgets.priorities`.
        ordinal: which of the model's evicting layers it is, from 0.
        layer_count: how many evicting layers the model has.
        row_counts: per row, so that no rule has to ask an accelerator; empty: nothing is protected, and the others are
            read from the view.
    """

    view: CacheView
    priorities: Tensor
    ordinal: int = 0
    layer_count: int = 1
    row_counts: Sequence[RowCounts] = ()

    def __post_init__(self) -> None:
        if not self.row_counts:
            rows = zip(self.view.seen.tolist(), self.view.budget[:, 0].tolist(), strict=True)
            object.__setattr__(self, "row_counts", [RowCounts(seen, budget, 0) for seen, budget in rows])

    @classmethod
    def of(
        cls, scores: Tensor, allocation: Allocation, view: CacheView, sinks: int, recent: int, ordinal: int = 0,
        layer_count: int = 1, seen: Sequence[int] | None = None, budgets: Sequence[int] | None = None,
    ) -> ScoredLayer:  # fmt: skip
        """A layer from a policy's scores.

        Args:
            scores: `[batch, kv_heads, tokens]`.
            allocation: brings scores into the form in which it compares heads.
            view: the slots; its budget is an equal share of the total.
            sinks: first tokens that always stay.
            recent: last tokens that always stay.
            ordinal: which of the evicting layers it is, from 0.
            layer_count: how many evicting layers the model has.
            seen: the view's, where the host knows it; None: it is read from the view.
            budgets: the row's equal shares, likewise.
        """
        seen = view.seen.tolist() if seen is None else seen
        budgets = view.budget[:, 0].tolist() if budgets is None else budgets
        rows = [
            RowCounts(tokens, slots, sum(protected_tokens(slots, sinks, recent)))
            for tokens, slots in zip(seen, budgets, strict=True)
        ]
        order = priorities(allocation.compared(scores, view), view, view.protected(sinks, recent))
        return cls(view, order, ordinal, layer_count, rows)


class Allocation(ABC):
    """Divides the total among heads; the best slots of each head are then kept.

    A rule that looks at the last m queries overrides :attr:`needs_queries`.

    Attributes:
        equal: every head of a row gets the same number, the budget.
        whole_model: a decision needs every layer, so all layers stay full until the last one is there.
        cascades: although a decision needs every layer, a live cache cuts earlier ones while later ones are read.
        own_totals: a layer may get more or less than an equal share, so one that holds less than that may be cut.
        syntax: what may stand behind the name on the command line, for messages.
        paper: the paper that the rule follows, or None.
    """

    equal: ClassVar[bool] = False
    whole_model: ClassVar[bool] = False
    cascades: ClassVar[bool] = False
    own_totals: ClassVar[bool] = False
    syntax: ClassVar[str] = ""
    paper: ClassVar[Paper | None] = None

    @classmethod
    def parse(cls, setting: str, within: Allocation) -> Allocation | None:
        """The rule that a text names; None where the text does not fit.

        Args:
            setting: what stands behind the rule's name and a colon; "" where nothing does.
            within: the rule for the heads of a layer, for rules that divide among layers.
        """
        return None if setting else cls()

    @property
    @abstractmethod
    def name(self) -> str:
        """What tables and the command line call it."""

    @property
    def needs_queries(self) -> int:
        """How many of the last queries the rule wants to see in the views, whatever the policy needs."""
        return 0

    def refuse_unfit(self, policy: Policy) -> None:  # noqa: B027
        """Raise a UserError for a policy whose scores this rule cannot use."""

    def compared(self, scores: Tensor, view: CacheView) -> Tensor:
        """Scores in the form in which this rule compares heads; the order inside a head stays."""
        return scores

    @abstractmethod
    def slots(self, layers: Sequence[ScoredLayer]) -> list[Tensor]:
        """Slots that each head may keep, `[batch, kv_heads]` int64, for each of `layers`.

        Args:
            layers: all evicting layers of the model where `whole_model`, else any number of them.
        """

    def kept(self, layers: Sequence[ScoredLayer]) -> list[Tensor]:
        """The slots that stay, bool `[batch, kv_heads, tokens]` for each of `layers`: the best of each head."""
        return [top_mask(layer.priorities, slots) for layer, slots in zip(layers, self.slots(layers), strict=True)]


@dataclass(frozen=True)
class Uniform(Allocation):
    """Every KV head of a row gets the same number of slots: the budget."""

    equal = True

    @property
    def name(self) -> str:
        return "uniform"

    def slots(self, layers: Sequence[ScoredLayer]) -> list[Tensor]:
        return [layer.view.budget for layer in layers]


def unfit(policy: Policy, allocation: Allocation) -> str:
    """The sentence with which an allocation refuses a policy's scores, or ""."""
    try:
        allocation.refuse_unfit(policy)
    except UserError as error:
        return str(error)
    return ""


def fitting(policy: Policy, allocations: Iterable[Allocation]) -> tuple[list[Allocation], list[str]]:
    """The allocations that can use a policy's scores, and a sentence on each that cannot.

    Raises:
        UserError: none can.
    """
    refusals = [(allocation, unfit(policy, allocation)) for allocation in allocations]
    usable = [allocation for allocation, refusal in refusals if not refusal]
    sentences = [refusal for _, refusal in refusals if refusal]
    if not usable and sentences:
        raise UserError(sentences[0])
    return usable, sentences
