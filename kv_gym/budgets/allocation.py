"""What an allocation is: a rule that divides the model's total of slots among its KV heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kv_gym.budgets.selection import top
from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.policies.base import Policy


@dataclass(frozen=True)
class Layer:
    """One layer that is about to be cut.

    Attributes:
        view: its slots; ``view.budget`` is an equal share of the total, the same for every head of a row.
        merits: `[batch, kv_heads, tokens]` int64, see :func:`kv_gym.budgets.merit`.
        place: which of the model's evicting layers it is, from 0.
        layers: how many evicting layers the model has.
        guarded: `[batch]` int64, how many slots of every head are protected at most; None means none.
    """

    view: CacheView
    merits: Tensor
    place: int = 0
    layers: int = 1
    guarded: Tensor | None = None


class Allocation(ABC):
    """Divides the total among heads; the best slots of each head are then kept.

    Class attributes:
        equal: every head of a row gets the same number, the budget.
        whole_model: a decision needs every layer, so all layers stay full until the last one is there.
        own_totals: a layer may get more or less than an equal share, so one that holds less than that may be cut.

    A rule that looks at the last m queries overrides :attr:`needs_queries`.
    """

    equal: ClassVar[bool] = False
    whole_model: ClassVar[bool] = False
    own_totals: ClassVar[bool] = False

    @property
    def needs_queries(self) -> int:
        """How many of the last queries the rule wants to see in the views, whatever the policy needs."""
        return 0

    @property
    @abstractmethod
    def name(self) -> str:
        """What tables and the command line call it."""

    def refuse_unfit(self, policy: Policy) -> None:  # noqa: B027
        """Raise a UserError for a policy whose scores this rule cannot use."""

    def compared(self, scores: Tensor, view: CacheView) -> Tensor:
        """Scores in the form in which this rule compares heads; the order inside a head stays."""
        return scores

    @abstractmethod
    def slots(self, layers: Sequence[Layer]) -> list[Tensor]:
        """Slots that each head may keep, `[batch, kv_heads]` int64, for each of `layers`.

        Args:
            layers: all evicting layers of the model where `whole_model`, else any number of them.
        """

    def kept(self, layers: Sequence[Layer]) -> list[Tensor]:
        """The slots that stay, bool `[batch, kv_heads, tokens]` for each of `layers`: the best of each head."""
        return [top(layer.merits, slots) for layer, slots in zip(layers, self.slots(layers), strict=True)]


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
    said = [(rule, unfit(policy, rule)) for rule in allocations]
    rules, sentences = [rule for rule, why in said if not why], [why for _, why in said if why]
    if not rules and sentences:
        raise UserError(sentences[0])
    return rules, sentences
