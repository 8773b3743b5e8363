"""What a tier is: it decides what becomes of the pairs that an eviction takes out of the full-precision slots.

The simplest tier drops them. No paper.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kv_gym.devices import to_device
from kv_gym.errors import UserError
from kv_gym.live.slots import EqualSlots, Slots, take
from kv_gym.policies.base import Paper


@dataclass(frozen=True)
class EvictedPairs:
    """One layer right before an eviction: all its slots, and which of them stay.

    Attributes:
        keys, values: `[batch, kv_heads, n, d]`, a view that the eviction will overwrite.
        positions: `[batch, kv_heads, n]` int64.
        valid, kept: `[batch, kv_heads, n]` bool: real slots, and those of them that stay.
        most_evicted: `[batch, kv_heads]` int64 on the CPU, how many slots each head loses at most; exact on a CPU.
        seen: tokens seen by the row that has seen most.
        equal: every head loses equally many, and holds equally many.
        slack: slots by which buffers grow.
        trim: keep no room for pairs to come.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    valid: Tensor
    kept: Tensor
    most_evicted: Tensor
    seen: int
    equal: bool
    slack: int
    trim: bool = False

    @property
    def most(self) -> int:
        """How many slots the head loses at most that loses most; at least 1."""
        return int(self.most_evicted.max())

    @property
    def evicted(self) -> Tensor:
        """`[batch, kv_heads, n]` bool, the slots that are evicted."""
        return self.valid & ~self.kept

    def indices(self) -> Tensor:
        """Indices `[batch, kv_heads, most]` of the evicted slots, in order; where a head has fewer, others follow."""
        return self.evicted.byte().argsort(dim=2, descending=True, stable=True)[:, :, : self.most]

    def select(self, *tensors: Tensor) -> list[Tensor]:
        """The evicted slots of tensors `[batch, kv_heads, n, ...]`: `[batch, kv_heads, most, ...]` each."""
        indices = self.indices()
        return [take(tensor, indices) for tensor in tensors]

    def append_to(self, stored: Slots | None, new: dict[str, Tensor], limit: int | None = None) -> Slots:
        """Store what a tier made of the evicted pairs, `[batch, kv_heads, most, ...]` each.

        Args:
            stored: what was stored before, or None.
            new: one tensor for each buffer.
            limit: no head holds more than so many afterwards; None: not known.

        Returns:
            The slots to use from here on.
        """
        slots = EqualSlots() if stored is None else stored
        slack = max(self.slack, 0 if stored is None else stored.mean // 8)  # what is evicted only ever grows
        real = None
        if not self.equal:
            real = torch.arange(self.most, device=self.kept.device) < self.evicted.sum(2)[..., None]
        slots = slots.append(new, slack, real, self.most_evicted, min(self.seen, limit or self.seen))
        return slots.clone() if self.trim else slots


@dataclass(frozen=True)
class PackedPairs:
    """Evicted pairs in low precision, as a kernel reads them in place.

    Attributes:
        slots: buffers ``keys_codes`` and ``values_codes`` `[..., d * bits / 8]` uint8, ``keys_grid`` and
            ``values_grid`` `[..., groups, 2]` float16, as :func:`~kv_gym.live.tiers.quantiser.quantise` makes them.
        bits: per number.
        balance: `[batch, kv_heads, d]`, what keys were multiplied by before they were rounded; None: nothing.
    """

    slots: Slots
    bits: int
    balance: Tensor | None = None


class LayerTier:
    """What one layer does with its evicted pairs, and stores of them; a subclass overrides what it needs.

    Class attributes:
        drops: nothing is done with evicted pairs, so nobody needs to say which are evicted.
        row_tensors: names of attributes, tensors `[batch, ...]` or None, that are stored beside `stored`.
        held_as: how it holds evicted pairs, for errors.

    Attributes:
        stored: pairs that later queries see beside the full-precision slots, in the tier's own form; None: none yet.
    """

    drops: ClassVar[bool] = False
    row_tensors: ClassVar[tuple[str, ...]] = ()
    held_as: ClassVar[str] = "in low precision"
    stored: Slots | None = None

    @property
    def absorbs(self) -> bool:
        """Whether a state of evicted pairs takes part in attention from now on: see :meth:`absorbed`."""
        return False

    def observe(self, query: Tensor, token_mask: Tensor | None) -> None:
        """See the queries `[batch, query_heads, m, d]` of new tokens; `token_mask [batch, m]` bool: no padding."""

    def measure(
        self, query: Tensor, token_mask: Tensor | None, slots: Slots, scaling: float, evicted_at: Sequence[int | None]
    ) -> None:
        """See the same queries right after their attention to `slots`, even if they may be taken back.

        Args:
            query: `[batch, query_heads, m, d]`.
            token_mask: `[batch, m]` bool on the CPU, or None.
            slots: the full-precision slots.
            scaling: factor on the products.
            evicted_at: tokens seen at the last eviction of each row, None: never.
        """

    def take(self, pairs: EvictedPairs) -> dict[str, Tensor] | None:
        """Take over pairs before they are evicted.

        Returns:
            Survivors' new ``keys`` and ``values`` (one of them, or both), shaped as those of `pairs`, or None where
            they stay as they are.
        """
        return None

    def visible(self, dtype: torch.dtype) -> Slots | None:
        """Keys and values of `stored` as attention reads them, or None."""
        return None

    def packed(self) -> PackedPairs | None:
        """The same pairs as they are stored; None where there are none, or they can only be read by `visible`."""
        return None

    def absorbed(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """What a state of fixed size adds to attention, where :attr:`absorbs`: to every query it is one more slot.

        Args:
            query: `[batch, query_heads, m, d]`.

        Returns:
            The logit of that slot, `[batch, query_heads, m]`, and its value `[batch, query_heads, m, d]`; float32 or
            wider.
        """
        raise NotImplementedError

    def forget(self) -> None:
        """Drop what is held of evicted pairs: they are back among the full-precision slots."""
        self.stored = None

    def saved_shapes(self, rows: int, dtype: torch.dtype) -> dict[str, tuple[list[int], torch.dtype]]:
        """Shapes and types of the attributes that a file holds, for `rows` rows and keys of `dtype`."""
        return {}

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that is stored, for the count of bytes."""
        if self.stored is not None:
            yield from self.stored.buffers.values()
        yield from (tensor for name in self.row_tensors if (tensor := getattr(self, name)) is not None)

    def host_tensors(self) -> Iterator[Tensor]:
        """What is stored in the host's memory and counted apart."""
        return iter(())

    def select_rows(self, rows: Tensor) -> None:
        """Keep the rows `rows [new batch]` int64 of the batch, in that order."""
        if self.stored is not None:
            self.stored.select_rows(rows)
        for name in self.row_tensors:
            setattr(self, name, select_rows(getattr(self, name), rows))

    def fork(self) -> LayerTier:
        """An independent copy."""
        twin = copy.copy(self)
        twin.stored = None if self.stored is None else self.stored.clone()
        for name in self.row_tensors:
            tensor = getattr(self, name)
            setattr(twin, name, None if tensor is None else tensor.clone())
        return twin


class Tier(ABC):
    """The settings of one way to treat evicted pairs; every layer of a cache begins with its own :class:`LayerTier`.

    Class attributes:
        changes_keys: survivors' keys change, so scores that were computed from them are stale.
        sees_queries: needs the queries of all tokens from the first one on.
    """

    paper: ClassVar[Paper | None] = None
    changes_keys: ClassVar[bool] = False
    sees_queries: bool = False

    @property
    @abstractmethod
    def name(self) -> str:
        """What the command line calls it."""

    @property
    def label(self) -> str:
        """What tables call it: the name, unless that says where something lies and not what it is."""
        return self.name

    @abstractmethod
    def begin(self, ordinal: int = 0) -> LayerTier:
        """What the evicting layer `ordinal`, counted from 0, starts with."""

    def refuse_unfit(self, config) -> None:  # noqa: B027
        """Raise a UserError for a model (its text configuration) whose heads this tier cannot serve."""

    def refuse_other_model(self, model) -> None:  # noqa: B027
        """Raise a UserError for a model that this tier was not trained for."""

    def begin_after(self, previous: LayerTier, ordinal: int, empty: bool, complete: bool) -> LayerTier:
        """What a layer of a fork starts with, where the cache before had another tier.

        Args:
            previous: the layer's tier before.
            ordinal: which of the evicting layers it is, from 0.
            empty: no token was seen yet.
            complete: nothing was evicted yet.

        Raises:
            UserError: the other one holds evicted pairs, or did not see the queries that this one needs.
        """
        if previous.stored is not None or previous.absorbs:
            raise UserError(
                f"the cache holds evicted pairs {previous.held_as}, and a fork cannot treat them otherwise: fork it "
                "before the first eviction"
            )
        if self.sees_queries and not empty:
            raise UserError(
                f"evicted={self.name!r} needs the queries of the whole context, which the cache did not see: make "
                "it with that setting"
            )
        return self.begin(ordinal)


@dataclass(frozen=True)
class Drop(Tier):
    """Evicted pairs are gone."""

    name = "drop"

    def begin(self, ordinal: int = 0) -> LayerTier:
        return DroppingLayer()


class DroppingLayer(LayerTier):
    """Does nothing."""

    drops = True


def select_rows(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    """The rows `rows [new batch]` of a tensor `[batch, ...]` that may not be there yet."""
    return None if tensor is None else tensor.index_select(0, to_device(rows, tensor.device))
