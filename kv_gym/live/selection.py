"""Selection at query time: a query reads some of the slots that are held, and nothing is deleted.

Slots of a head are grouped as they lie, and the minimum and maximum of every channel of a group's keys bound what a
query can find in it. A query reads the first group, the best of the others, and the newest group, which it is itself
in. That saves the bytes that a decoding step reads, not those that the cache holds.

=================  ==========================================================================================
``all``            every query reads every slot
``mpcache:0.2``    MPCache: half of the groups of 32, then a fifth of the groups of 16, by a mean of the two bounds
``mpcache:0.2:paired``  the same, and every second layer reads the tokens that the layer before it chose
``quest:0.2``      Quest: a fifth of the groups of 16, by the largest product that a key within the bounds could have
``random:0.2``     a fifth of the groups of 16, at random: what choosing is compared with
=================  ==========================================================================================

Settings may follow the share: ``mpcache:0.2:group=8:wide=1:alpha=0.8`` has groups of 8, looks into all wide groups, and
weighs the maximum by 0.8. Small groups have tight bounds, and more of them to read: as many bytes as one slot for each.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kv_gym.devices import to_device
from kv_gym.errors import UserError
from kv_gym.live.slots import EqualSlots, Slots, take
from kv_gym.policies.base import Paper


class Selection(ABC):
    """Which slots a query reads.

    Class attributes:
        paper: its source.
        paired: whether the layers 3, 5, ... read the tokens that the layer before chose (counted from 0).
    """

    paper: ClassVar[Paper | None] = None
    paired: bool = False

    @property
    @abstractmethod
    def name(self) -> str:
        """What :func:`parse_selection` reads."""


@dataclass(frozen=True)
class SelectAll(Selection):
    """Every query reads every slot."""

    name = "all"


@dataclass(frozen=True)
class GroupSelection(Selection):
    """A query reads the groups of slots in which it may find most.

    Attributes:
        share: of the groups, the share that is read beside the first and the newest one.
        paired: see the base class.
        group: slots of a group; two groups are a wide group.
        wide: of the wide groups, the share that is searched for groups.

    Raises:
        UserError: a share outside (0, 1], or a group of no slot.
    """

    share: float = 0.2
    paired: bool = False
    group: int = 16
    wide: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.share <= 1 and 0 < self.wide <= 1):
            raise UserError(
                f"a selection reads a share of {self.share:g} of the groups in {self.wide:g} of the wide groups; "
                "expected shares in (0, 1]"
            )
        if self.group < 1:
            raise UserError(f"a selection has groups of {self.group} slots; expected 1 or more")

    @property
    @abstractmethod
    def kind(self) -> str:
        """What its name begins with."""

    @property
    def name(self) -> str:
        """What :func:`parse_selection` reads."""
        changed = [
            f"{each.name}={getattr(self, each.name):g}"
            for each in fields(self)
            if each.name not in ("share", "paired") and getattr(self, each.name) != each.default
        ]
        return ":".join([self.kind, f"{self.share:g}", *changed, *["paired"] * self.paired])

    @abstractmethod
    def bound(self, query: Tensor, low: Tensor, high: Tensor, ordinal: int) -> Tensor:
        """How much each query may find in each group, `[batch, kv_heads, group_size, m, groups]`; higher is read.

        Args:
            query: `[batch, kv_heads, group_size, m, d]`, by the query heads that share a KV head.
            low, high: `[batch, kv_heads, groups, d]`, minimum and maximum of every channel over the group's keys.
            ordinal: which of the evicting layers it is.
        """

    def groups_read(self, visible: int) -> int:
        """How many groups a query reads that sees `visible` slots."""
        groups, wide = -(-visible // self.group), -(-visible // (2 * self.group))
        searched = min(_best(max(self.wide, self.share), wide), wide - 1)
        others = groups - 1 - 2 * (wide - 1)  # complete groups of the newest wide one, which is always searched
        return min(_best(self.share, groups), 2 * searched + others) + 1

    def chosen_groups(self, query: Tensor, low: Tensor, high: Tensor, visible: Tensor, ordinal: int) -> Tensor:
        """Which groups each query reads, `[batch, kv_heads, m, groups]` bool.

        Args:
            query: `[batch, query_heads, m, d]`.
            low, high: `[batch, kv_heads, groups, d]`; those of a query's newest group are not looked at.
            visible: `[batch, kv_heads, m]` int64, slots that each query sees, from 1.
            ordinal: which of the evicting layers it is.
        """
        _, heads, groups, _ = low.shape
        grouped = query.unflatten(1, (heads, -1)).to(low.dtype)
        newest = (visible - 1)[..., None] // self.group
        index = torch.arange(groups, device=low.device)
        searched = index < newest
        if self.wide < 1:
            low_of_wide, high_of_wide = (_pairs(low).amin(3), _pairs(high).amax(3))
            wide = torch.arange(low_of_wide.shape[2], device=low.device)
            bound = self.bound(grouped, low_of_wide, high_of_wide, ordinal).amax(2)
            opened = _first_and_best(bound, wide < newest // 2, max(self.wide, self.share), newest // 2 + 1)
            opened |= wide == newest // 2
            searched = searched & opened.repeat_interleave(2, 3)[..., :groups]
        bound = self.bound(grouped, low, high, ordinal).amax(2)
        return _first_and_best(bound, searched, self.share, newest + 1) | (index == newest)


@dataclass(frozen=True)
class MPCacheSelection(GroupSelection):
    """MPCache's search: half of the wide groups, then a share of the groups, by a mean of a group's bounds.

    A group's bound is the product of the query with ``alpha * high + (1 - alpha) * low``. It is linear in the query,
    which multi-party computation needs, and it cannot tell groups apart along channels of opposite signs.

    Differs from the paper in: the first group does not compete with the others; the newest group is always read, also
    where it is complete; query heads that share a KV head read the same slots, by the largest of their bounds; with
    `paired` layers share what is read, and each keeps its own slots (the code shares these too); the forwards after
    the first one are searched token by token, which makes a prompt in parts search its own beginning.

    Attributes:
        alpha: weight of the maximum.
    """

    paper = Paper(
        "MPCache: MPC-Friendly KV Cache Eviction for Efficient Private LLM Inference", "2501.06807",
        venue="NeurIPS 2025",
    )  # fmt: skip
    kind = "mpcache"
    wide: float = 0.5
    alpha: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise UserError(f"mpcache has alpha={self.alpha:g}; expected a weight in [0, 1]")

    def bound(self, query: Tensor, low: Tensor, high: Tensor, ordinal: int) -> Tensor:
        """The product with a mean of the bounds."""
        return query @ (self.alpha * high + (1 - self.alpha) * low)[:, :, None].transpose(-1, -2)


@dataclass(frozen=True)
class QuestSelection(GroupSelection):
    """Quest's bound, the largest product that a key within the group's bounds could have: no key exceeds it.

    Differs from the paper in: a share of the groups is read (the paper: a fixed number of tokens), in every layer (the
    paper: not in the first two), and the first and the newest group always are.
    """

    paper = Paper(
        "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", "2406.10774", "section 3", "ICML 2024"
    )
    kind = "quest"

    def bound(self, query: Tensor, low: Tensor, high: Tensor, ordinal: int) -> Tensor:
        """The largest product with a key within the bounds."""
        up, down = (each[:, :, None].transpose(-1, -2) for each in (high, low))
        return query.clamp(min=0) @ up + query.clamp(max=0) @ down


@dataclass(frozen=True)
class RandomSelection(GroupSelection):
    """Groups at random, the same in every run: by the layer, and the number of groups and queries."""

    kind = "random"

    def bound(self, query: Tensor, low: Tensor, high: Tensor, ordinal: int) -> Tensor:
        """Random numbers."""
        shape = *query.shape[:2], 1, query.shape[3], low.shape[2]
        generator = torch.Generator().manual_seed(1_000_003 * ordinal + 1_009 * shape[4] + shape[3])
        return to_device(torch.rand(shape, generator=generator), query.device)


_KINDS: dict[str, type[GroupSelection]] = {
    kind.kind: kind
    for kind in (MPCacheSelection, QuestSelection, RandomSelection)  # type: ignore[misc]
}
SELECTIONS = ("all", *_KINDS)
_NAME = re.compile(r"(\w+):(\d*\.?\d+)((?::\w+=\d*\.?\d+)*)(:paired)?")


def parse_selection(select: str | Selection) -> Selection:
    """A selection by name: ``all``, ``mpcache:SHARE``, ``quest:SHARE`` or ``random:SHARE``.

    Settings of the selection may follow, then ``paired``: ``mpcache:0.2:group=8:wide=1:alpha=0.8:paired``.

    Raises:
        UserError: an unknown name or setting, or a number out of range.
    """
    if isinstance(select, Selection):
        return select
    if isinstance(select, str) and select == "all":
        return SelectAll()
    match = _NAME.fullmatch(select) if isinstance(select, str) else None
    if match is None or match[1] not in _KINDS:
        shares = ", ".join(f"'{kind}:SHARE'" for kind in _KINDS)
        raise UserError(f"select={select!r} is unknown; expected 'all', {shares}, such as 'mpcache:0.2'")
    kind, settings = _KINDS[match[1]], dict(setting.split("=") for setting in match[3].split(":")[1:])
    known: dict[str, Any] = {
        each.name: type(each.default) for each in fields(kind) if each.name not in ("share", "paired")
    }
    for name, value in settings.items():
        if name not in known or (known[name] is int and not value.isdecimal()):
            raise UserError(
                f"select={select!r} has {name}={value}; expected settings of {match[1]}: "
                + ", ".join(f"{each}={'8' if number is int else '0.5'}" for each, number in known.items())
            )
    numbers: dict[str, Any] = {name: known[name](value) for name, value in settings.items()}
    return kind(float(match[2]), bool(match[4]), **numbers)


class LayerSelection:
    """The bounds of one layer's groups, and the attention that reads what they select.

    Bounds are kept while tokens come, and made anew when :meth:`forget` was called.

    Args:
        settings: what is read.
        ordinal: which of the evicting layers it is.

    Attributes:
        low, high: `[batch, kv_heads, groups, d]`, bounds of the groups' keys; None: to be made.
        read: `[batch, kv_heads]` int64, slots that a query of the last forward read at most; None: no such forward.
        partner: the layer before, where its choice is read.
    """

    def __init__(self, settings: Selection, ordinal: int):
        self.settings, self.ordinal = settings, ordinal
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.read: Tensor | None = None
        self.partner: LayerSelection | None = None
        self._selected: Tensor | None = None  # [batch, kv_heads, m, tokens seen], for the layer that reads the same

    def forget(self) -> None:
        """The slots changed otherwise than by new ones behind the others."""
        self.low = self.high = None

    def tensors(self) -> Iterator[Tensor]:
        """What is stored, for the count of bytes."""
        yield from (tensor for tensor in (self.low, self.high) if tensor is not None)

    @torch.no_grad()
    def attend(
        self,
        query: Tensor,
        slots: Slots,
        scaling: float,
        seen: int,
        token_mask: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """Causal attention of the newest tokens over the slots that each of them selects.

        Args:
            query: `[batch, query_heads, m, d]`.
            slots: with the new tokens behind the others of every head.
            scaling: factor on the products.
            seen: no position is as large.
            token_mask: `[batch, m]` bool on the CPU, which queries are tokens and not padding; None means all.
            dropout: on the weights, when the model trains.

        Returns:
            `[batch, m, query_heads, d]`; zero where a query is padding.
        """
        settings = self.settings
        assert isinstance(settings, GroupSelection)  # where all is read, attention is the model's own
        filled, real = slots.padded(("keys", "values", "positions"))
        counts, m = slots.counts(), query.shape[2]
        self._update(filled["keys"], counts, m, settings.group)
        assert self.low is not None and self.high is not None
        partner, self.partner = self.partner, None
        if m == 1 and token_mask is None and isinstance(slots, EqualSlots) and not settings.paired:
            visible = counts[..., None]
            chosen = settings.chosen_groups(query, self.low, self.high, visible, self.ordinal)[:, :, 0]
            return self._attend_to_few(settings, query, filled, chosen, slots.length, scaling, dropout)
        tokens = torch.ones(len(query), m, dtype=torch.bool) if token_mask is None else token_mask
        later = to_device(tokens.sum(1, keepdim=True) - tokens.cumsum(1), query.device)
        visible = (counts[..., None] - later[:, None]).clamp(min=1)
        places = torch.arange(real.shape[2], device=real.device)
        positions = filled["positions"].masked_fill(~real, seen)[:, :, None].expand(-1, -1, m, -1)
        if partner is not None and partner._selected is not None:
            mask = partner._selected.gather(3, positions) | (places == visible[..., None] - 1)
            partner._selected = None
        else:
            chosen = settings.chosen_groups(query, self.low, self.high, visible, self.ordinal)
            mask = chosen.repeat_interleave(settings.group, 3)[..., : real.shape[2]]
        mask = mask & (places < visible[..., None])
        self.read = mask.sum(3).amax(2)
        if settings.paired:
            self._selected = mask.new_zeros(*mask.shape[:3], seen + 1).scatter_(3, positions, mask)
            self._selected[..., seen] = False  # where padding went
        out = _attend(query, filled["keys"], filled["values"], mask, scaling, dropout)
        return out if token_mask is None else out * to_device(token_mask, out.device)[..., None, None]

    def _update(self, keys: Tensor, counts: Tensor, m: int, size: int) -> None:
        """Bring the bounds of groups of `size` up to date; `m` of the keys `[batch, kv_heads, longest, d]` are new."""
        groups = -(-keys.shape[2] // size)
        if self.low is None or self.high is None or m > size or groups < self.low.shape[2]:
            padded = F.pad(keys, (0, 0, 0, groups * size - keys.shape[2]))
            grouped = padded.unflatten(2, (groups, size))  # an incomplete group is never searched
            self.low, self.high = grouped.amin(3), grouped.amax(3)
            return
        if groups > self.low.shape[2]:
            self.low, self.high = (F.pad(each, (0, 0, 0, 1)) for each in (self.low, self.high))
        # as many new tokens as a group has complete at most one group of every head
        last = (counts // size - 1).clamp(min=0)[..., None]
        index = last * size + torch.arange(size, device=keys.device)
        complete = take(keys, index.clamp(max=keys.shape[2] - 1))  # where no group is complete, none is searched
        for bounds, found in ((self.low, complete.amin(2, True)), (self.high, complete.amax(2, True))):
            bounds.scatter_(2, last[..., None].expand_as(found), found)

    def _attend_to_few(
        self,
        settings: GroupSelection,
        query: Tensor,
        filled: dict[str, Tensor],
        chosen: Tensor,
        length: int,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        """A decoding step that reads only the groups `chosen [batch, kv_heads, groups]`, as many of every head."""
        groups, size = settings.groups_read(length), settings.group
        index = chosen.byte().argsort(dim=2, descending=True, stable=True)[:, :, :groups]  # the newest is the last
        slots = (index[..., None] * size + torch.arange(size, device=index.device)).flatten(2)
        slots = slots[:, :, : groups * size - (-length % size)]
        self.read = torch.full_like(slots[:, :, 0], slots.shape[2])
        keys, values = (take(filled[name], slots) for name in ("keys", "values"))
        return _attend(query, keys, values, None, scaling, dropout)


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float, dropout: float) -> Tensor:
    """`[batch, m, query_heads, d]`; `mask [batch, kv_heads, m, n]` bool says what is read."""
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    mask = None if mask is None else mask.repeat_interleave(group, 1)
    out = F.scaled_dot_product_attention(query, keys, values, mask, dropout, scale=scaling)
    return out.transpose(1, 2).contiguous()


def _pairs(bounds: Tensor) -> Tensor:
    """Groups `[batch, kv_heads, groups, d]` two by two: `[batch, kv_heads, wide groups, 2, d]`.

    A group without a second one belongs to the newest wide group, which is always searched.
    """
    return F.pad(bounds, (0, 0, 0, bounds.shape[2] % 2)).unflatten(2, (-1, 2))


def _best(share: float, groups: int) -> int:
    """How many of `groups` a share is, from 1; and one more, the first group, which is always read."""
    return max(1, math.floor(share * groups + 1e-9)) + 1


def _first_and_best(bound: Tensor, candidates: Tensor, share: float, groups: Tensor) -> Tensor:
    """The first group and, of the other candidates, a share of all groups, by the largest bounds.

    Args:
        bound: `[batch, kv_heads, m, groups]`.
        candidates: the same shape, bool.
        share: of the groups.
        groups: `[batch, kv_heads, m, 1]` int64, how many there are for each query.
    """
    ranked = bound.masked_fill(~candidates, -math.inf)
    ranked = torch.cat((torch.full_like(ranked[..., :1], math.inf), ranked[..., 1:]), -1)
    rank = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    wanted = (share * groups.double() + 1e-9).floor().clamp(min=1) + 1
    return candidates & (rank < wanted)
