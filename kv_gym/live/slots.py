"""Where one layer's keys and values lie: slots, of which every (row, KV head) holds some.

Two layouts behind one interface, :class:`Slots`. :class:`EqualSlots` is one block of memory per tensor and serves
while every head holds the same number of tokens; :class:`RaggedSlots` is a flat buffer with one run per head.
Operations that can end the equality return the slots to use from then on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from kv_gym.devices import HostCopy, to_device

MIN_SLACK = 16


class Slots(ABC):
    """Keys, values, positions and whatever else belongs to cached tokens, in named buffers of one layout.

    The order of the slots of a head is free; the newest tokens are the last ones until something is evicted. Buffers
    may have room (slack) for tokens to come.

    Attributes:
        buffers: the tensors with their slack, in the layout's own shape.
    """

    buffers: dict[str, Tensor]

    @property
    @abstractmethod
    def bounds(self) -> Tensor:
        """At least as many as the slots of every head, `[batch, kv_heads]` int64 on the CPU; exact on a CPU."""

    @property
    def longest(self) -> int:
        """Slots of the head that holds most; on an accelerator a bound of that."""
        return int(self.bounds.max())

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self._any().device

    def _any(self) -> Tensor:
        return next(iter(self.buffers.values()))

    @property
    @abstractmethod
    def mean(self) -> int:
        """Slots of a head on average, rounded down."""

    @abstractmethod
    def counts(self) -> Tensor:
        """Slots of every head, `[batch, kv_heads]` int64 on the device of the buffers."""

    @abstractmethod
    def append(
        self,
        new: Mapping[str, Tensor],
        slack: int,
        token_mask: Tensor | None = None,
        most: Tensor | None = None,
        limit: int | None = None,
    ) -> Slots:
        """Add tokens behind those of every head.

        Args:
            new: one tensor `[batch, kv_heads, new, ...]` for each buffer; what comes later may be left out where
                there is a gap.
            slack: by how many slots a full buffer grows at least.
            token_mask: `[batch, new]` or `[batch, kv_heads, new]` bool, which of them to store; None means all.
            most: `[batch, kv_heads]` int64 on the CPU, how many of them at most; None where `token_mask` is on the CPU.
            limit: no head holds more than so many afterwards; None: not known.

        Returns:
            The slots to use from here on: these, or ragged ones.
        """

    @abstractmethod
    def write_newest(self, name: str, tensor: Tensor) -> None:
        """Replace a buffer's entries of the token that was appended last to every head, `[batch, kv_heads, 1]`."""

    @abstractmethod
    def waits_to_keep(self, slack: int, trim: bool = False) -> bool:
        """Whether :meth:`keep` has to know the new lengths on the host, for which an accelerator is waited for."""

    @abstractmethod
    def keep(self, kept: Tensor, slack: int, trim: bool = False, lengths: Tensor | None = None) -> Slots:
        """Keep the slots `kept [batch, kv_heads, longest]` bool and free the rest.

        Args:
            kept: which slots stay.
            slack: room beside a head's length that it may keep.
            trim: free all slack.
            lengths: ``kept.sum(2)`` on the CPU, where it is known there already, or on an accelerator at least as much.

        Returns:
            The slots to use from here on: these, or ragged ones.
        """

    @abstractmethod
    def padded(self, names: Collection[str] | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Buffers as `[batch, kv_heads, longest, ...]`, and which slots are real, `[batch, kv_heads, longest]` bool.

        Padding has position -1.

        Args:
            names: which buffers; None means every one.
        """

    @abstractmethod
    def add(self, name: str, tensor: Tensor) -> None:
        """Store another tensor `[batch, kv_heads, longest, ...]`; there must be no slack, as in a new copy."""

    @abstractmethod
    def write(self, name: str, tensor: Tensor) -> None:
        """Replace a buffer's filled part by the real slots of `tensor [batch, kv_heads, longest, ...]`."""

    @abstractmethod
    def data(self, name: str) -> Tensor:
        """A buffer in the layout's own shape, for operations that treat every slot alike."""

    @abstractmethod
    def with_data(self, data: Mapping[str, Tensor]) -> Slots:
        """The same slots with other tensors, shaped as :meth:`data` gives them."""

    @abstractmethod
    def per_slot(self, heads: Tensor) -> Tensor:
        """A tensor `[batch, kv_heads, ...]` repeated or broadcast for every slot, to combine with :meth:`data`."""

    @abstractmethod
    def drop_newest(self, count: int) -> None:
        """Remove the last `count` slots of every head, the newest tokens since nothing was evicted after them."""

    @abstractmethod
    def select_rows(self, rows: Tensor) -> None:
        """Keep the rows `rows [new batch]` int64 of the batch, in that order; a row may come more than once."""

    @abstractmethod
    def clone(self, names: Mapping[str, str] | None = None) -> Slots:
        """An independent copy without slack.

        Args:
            names: which buffers, and what each is called in the copy; None means all, as they are called.
        """

    @abstractmethod
    def moved(self, device: torch.device) -> Slots:
        """The same slots on another device."""

    @abstractmethod
    def to_ragged(self, like: Mapping[str, Tensor] | None = None) -> RaggedSlots:
        """The same slots with heads that may differ in length.

        Args:
            like: tensors `[batch, kv_heads, ...]` that empty slots are made for.
        """

    def own_memory(self) -> None:  # noqa: B027
        """Copy buffers that share their memory with other tensors, such as a slice of a fused projection."""


class EqualSlots(Slots):
    """Slots of heads that hold equally many: buffers `[batch, kv_heads, capacity, ...]`.

    A new token is written in place; a few evicted slots are overwritten by the last ones. Until the first growth, and
    after a large eviction, there is no slack.

    Attributes:
        length: slots of every head.
        borrowed: the buffers are as the model made them; it may still use them, so they must not be written to.
    """

    def __init__(self, buffers: Mapping[str, Tensor] | None = None, length: int = 0, borrowed: bool = False):
        self.buffers = dict(buffers or {})
        self.length, self.borrowed = length, borrowed
        # `[batch, kv_heads, 1]`, an evicted slot of every head that the next token may be written to; until then the
        # last survivor lies behind the filled part. Whoever reads or changes slots calls `close_gap` first.
        self._gap: Tensor | None = None
        self._newest: Tensor | None = None  # the slots that the last token was written to, where that was a gap

    def __getitem__(self, name: str) -> Tensor:
        """The filled part of a buffer, `[batch, kv_heads, length, ...]`; a view."""
        self.close_gap()
        return self.buffers[name].narrow(2, 0, self.length)

    @property
    def bounds(self) -> Tensor:
        return torch.full(self._heads(), self.length)

    @property
    def longest(self) -> int:
        return self.length

    @property
    def mean(self) -> int:
        return self.length

    def counts(self) -> Tensor:
        return torch.full(self._heads(), self.length, device=self.device)

    def append(
        self,
        new: Mapping[str, Tensor],
        slack: int,
        token_mask: Tensor | None = None,
        most: Tensor | None = None,
        limit: int | None = None,
    ) -> Slots:
        if token_mask is not None:
            return self.to_ragged(new).append(new, slack, token_mask, most, limit)
        m = next(iter(new.values())).shape[2]
        if self._gap is not None and m == 1:
            self._fill_gap(new)
            return self
        self.close_gap()
        self._newest = None
        start = self.length
        self.length += m
        if start == 0:  # the first ones are held as they come, without a copy
            self.buffers, self.borrowed = dict(new), True
            return self
        capacity = max(self.length, start + max(MIN_SLACK, slack))
        for name, tensor in new.items():
            buffer = self.buffers[name]
            if buffer.shape[2] < self.length or _is_frozen(buffer):
                grown = buffer.new_empty(*buffer.shape[:2], capacity, *buffer.shape[3:])
                grown[:, :, :start] = buffer[:, :, :start]
                self.buffers[name] = grown
            self.buffers[name][:, :, start : self.length] = tensor
        self.borrowed = False  # borrowed buffers have no room, so all of them have grown
        return self

    def _fill_gap(self, new: Mapping[str, Tensor]) -> None:
        """Write one token per head where the last evicted one lay."""
        assert self._gap is not None
        self._newest, self._gap = self._gap, None
        self.length += 1
        self._write_one(self._newest, new)

    def _write_one(self, index: Tensor, new: Mapping[str, Tensor]) -> None:
        """Write tensors `[batch, kv_heads, 1, ...]` into the slots `index [batch, kv_heads, 1]`."""
        indices: dict[tuple[int, ...], Tensor] = {}
        for name, tensor in new.items():
            buffer, width = self._writable(name), tensor.shape[3:]
            if width not in indices:
                indices[width] = _expand_index(index, tensor) if width else index
            buffer.scatter_(2, indices[width], tensor)

    def write_newest(self, name: str, tensor: Tensor) -> None:
        if self._newest is None:
            self._writable(name)[:, :, self.length - 1 : self.length] = tensor
        else:
            self._write_one(self._newest, {name: tensor})

    def waits_to_keep(self, slack: int, trim: bool = False) -> bool:
        return self.device.type != "cpu"

    def keep(self, kept: Tensor, slack: int, trim: bool = False, lengths: Tensor | None = None) -> Slots:
        flat = {name: self[name].flatten(0, 2) for name in self.buffers}
        return RaggedSlots(flat, self.bounds, self.bounds).keep(kept, slack, True, lengths)

    def keep_top(self, priorities: Tensor, count: int, slack: int, trim: bool = False) -> None:
        """Keep the `count` slots of highest priority in every head.

        A few victims are overwritten in place by the survivors among the last slots, so the bytes moved grow with the
        victims and not with the cache. Otherwise survivors go to new buffers of just their size.

        Args:
            priorities: `[batch, kv_heads, length]`, no two of a head alike.
            count: below `length`.
            slack: how many slots a buffer may stay too large.
            trim: free all slack.
        """
        victims = self.length - count
        if trim or victims > count // 2 or not self.can_overwrite(count, slack):
            index = priorities.topk(count, sorted=False).indices.sort().values
            self._map(lambda tensor: take(tensor, index))
            self.length = count
        else:
            self.overwrite(priorities.topk(victims, largest=False, sorted=False).indices)

    def can_overwrite(self, count: int, slack: int) -> bool:
        """Whether `count` slots may stay in these buffers: they are ours, and not more than `slack` too large."""
        return not self.borrowed and self._any().shape[2] <= count + max(MIN_SLACK, slack)

    @property
    def has_gap(self) -> bool:
        """Whether the next token will be written where an evicted one lay, and needs no room."""
        return self._gap is not None

    def leave_gap(self, victims: Tensor) -> None:
        """Remove the slots `victims [batch, kv_heads, 1]`, for the next token to be written there: nothing moves."""
        self.close_gap()
        self.length, self._gap, self._newest = self.length - 1, victims, None

    def close_gap(self) -> None:
        """Move the last survivor of every head into the gap that :meth:`leave_gap` left, if there is one."""
        if self._gap is not None:
            victims, self._gap = self._gap, None
            self.length += 1
            self.overwrite(victims)

    def overwrite(self, victims: Tensor) -> None:
        """Remove the slots `victims [batch, kv_heads, v]`: survivors among the last v slots move into their place."""
        self.close_gap()
        self.length, self._newest = self.length - victims.shape[2], None
        source, target = _moves(victims, self.length)
        for name in self.buffers:
            buffer = self._writable(name)
            buffer.scatter_(2, _expand_index(target, buffer), take(buffer, source))

    def padded(self, names: Collection[str] | None = None) -> tuple[dict[str, Tensor], Tensor]:
        filled = {name: self[name] for name in (self.buffers if names is None else names)}
        return filled, torch.ones(*self._heads(), self.length, dtype=torch.bool, device=self.device)

    def add(self, name: str, tensor: Tensor) -> None:
        self.buffers[name] = tensor

    def write(self, name: str, tensor: Tensor) -> None:
        if self.borrowed:
            self.buffers[name] = self.buffers[name].clone()
        self._writable(name)
        self[name].copy_(tensor)

    def data(self, name: str) -> Tensor:
        return self[name]

    def with_data(self, data: Mapping[str, Tensor]) -> Slots:
        return EqualSlots(data, self.length)

    def per_slot(self, heads: Tensor) -> Tensor:
        return heads[:, :, None]

    def drop_newest(self, count: int) -> None:
        self.close_gap()
        if self.borrowed:  # from now on there is room, and new tokens would be written into it
            self._map(torch.clone)
        self.length, self._newest = self.length - count, None

    def select_rows(self, rows: Tensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, to_device(rows, tensor.device)))

    def clone(self, names: Mapping[str, str] | None = None) -> Slots:
        names = {name: name for name in self.buffers} if names is None else names
        return EqualSlots({new: self[old].clone() for old, new in names.items()}, self.length)

    def moved(self, device: torch.device) -> Slots:
        self.close_gap()
        return EqualSlots(
            {name: buffer.to(device) for name, buffer in self.buffers.items()}, self.length, self.borrowed
        )

    def to_ragged(self, like: Mapping[str, Tensor] | None = None) -> RaggedSlots:
        if self.length:
            flat = {name: self[name].flatten(0, 2).clone() for name in self.buffers}
            return RaggedSlots(flat, self.bounds, self.bounds)
        assert like is not None
        nothing = torch.zeros(next(iter(like.values())).shape[:2], dtype=torch.int64)
        empty = {name: tensor.new_empty(0, *tensor.shape[3:]) for name, tensor in like.items()}
        return RaggedSlots(empty, nothing, nothing)

    def own_memory(self) -> None:
        for name, buffer in self.buffers.items():
            if buffer.untyped_storage().nbytes() != buffer.numel() * buffer.element_size():
                self.buffers[name] = buffer.clone(memory_format=torch.contiguous_format)

    def _heads(self) -> torch.Size:
        return self._any().shape[:2]

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every buffer by `change` of its filled part."""
        self.buffers, self.borrowed = {name: change(self[name]) for name in self.buffers}, False
        self._newest = None

    def _writable(self, name: str) -> Tensor:
        """A buffer that may be written to."""
        buffer = self.buffers[name]
        if _is_frozen(buffer):
            buffer = self.buffers[name] = buffer.clone()
        return buffer


class RaggedSlots(Slots):
    """Slots of heads of different lengths, from none to all tokens.

    A buffer is `[total, ...]`; the head (row, KV head) fills ``lengths[row, head]`` of the ``capacities[row, head]``
    entries from ``starts[row, head]`` on, and what lies in the others is never used.

    Sizes follow from what the host knows, capacities and bounds; how long heads really are is known to the device
    alone, so nothing here waits for an accelerator but an eviction that must know how much memory to free. After
    other evictions the lengths travel to the host by themselves, and tighten the bounds once they are there.

    Args:
        buffers: tensors `[total, ...]` on one device.
        lengths: `[batch, kv_heads]` int64, on any device.
        capacities: `[batch, kv_heads]` int64 on the CPU.
        bounds: `[batch, kv_heads]` int64 on the CPU, none below its length; None where `lengths` are on the CPU.

    Attributes:
        lengths: on the device of the buffers.
        capacities, starts: on the CPU.
        starts_on_device: `starts` on the device of the buffers.
        reach: no head gets longer than this before the slots are laid out anew.
    """

    def __init__(
        self, buffers: Mapping[str, Tensor], lengths: Tensor, capacities: Tensor, bounds: Tensor | None = None
    ):
        self.buffers = dict(buffers)
        self._bounds = lengths if bounds is None else bounds
        self._exact = bounds is None  # the bounds are the lengths
        self.lengths = to_device(lengths, self.device)
        self._set_capacities(capacities)
        self._stay: tuple[int, int] | None = None  # room that every head needs and `reach`, see `reserve`
        self._since_known = 0  # tokens that came since the lengths from which `_bounds` were counted on
        self._copy: HostCopy | None = None  # lengths after an eviction
        self._since_copy: Tensor | int = 0  # tokens that came since

    @property
    def bounds(self) -> Tensor:
        return self.lengths if self.device.type == "cpu" else self._bounds

    @property
    def mean(self) -> int:
        return int(self.bounds.sum()) // self.bounds.numel()

    @property
    def common_length(self) -> int | None:
        """Slots of every head, where the host knows that all hold as many; else None."""
        known, first = self._exact or self.device.type == "cpu", int(self.bounds.view(-1)[0])
        return first if known and bool((self.bounds == first).all()) else None

    @property
    def reach(self) -> int:
        return int(self.capacities.max()) if self._stay is None else self._stay[1]

    def counts(self) -> Tensor:
        return self.lengths

    def append(
        self,
        new: Mapping[str, Tensor],
        slack: int,
        token_mask: Tensor | None = None,
        most: Tensor | None = None,
        limit: int | None = None,
    ) -> Slots:
        m = next(iter(new.values())).shape[2]
        if token_mask is None:  # a decoding step comes here: few operations
            self._make_room(m, slack)
            ends = self.starts_on_device + self.lengths
            index = (ends if m == 1 else ends[..., None] + torch.arange(m, device=self.device)).flatten()
            for name, tensor in new.items():
                self.buffers[name].index_copy_(0, index, tensor.flatten(0, 2))
            self.lengths = self.lengths + m
            return self
        self._exact = self._exact and most is None
        token_mask = (token_mask[:, None] if token_mask.dim() == 2 else token_mask).expand(*self.lengths.shape, m)
        self._make_room(token_mask.sum(2).cpu() if most is None else most, slack, limit)
        token_mask = to_device(token_mask, self.device)
        counts = token_mask.sum(2)
        # every entry of the buffers asks which new token it takes, if any: sizes then do not depend on the mask
        heads, offsets = self._entries()
        offsets -= self.lengths.flatten()[heads]
        takes = (offsets >= 0) & (offsets < counts.flatten()[heads])
        order = token_mask.byte().argsort(dim=-1, descending=True, stable=True).flatten()
        index = heads * m + order[heads * m + offsets.clamp_(0, m - 1)]
        for name, tensor in new.items():
            self.buffers[name] = _chosen(takes, tensor.flatten(0, 2)[index], self.buffers[name])
        self.lengths = self.lengths + counts
        return self

    def _make_room(self, counts: Tensor | int, slack: int, limit: int | None = None) -> None:
        """Take `counts` more tokens into the bounds; where a head has no room for them, lay out anew."""
        full = _is_frozen(self._any())
        if not full and self._lacks_room(counts, limit):
            self._read_copy()
            full = self._lacks_room(counts, limit)
        if full:
            self._lay_out(_limited(self.bounds + torch.as_tensor(counts).clamp(min=_room(slack)), limit))
        self._count(counts)
        self._bounds = _limited(self._bounds, limit)

    def reserve(self, count: int, spare: int | None = None) -> None:
        """Make room for `count` more tokens in every head, so that buffers stay where they are until then.

        Args:
            count: tokens.
            spare: more room in every head on average, for heads that gain from an eviction. Buffers, lengths and starts
                then stay in their memory at evictions too, as long as they leave `count` of room in every head and
                no head gets longer than `reach`. None: they do not.
        """
        self._stay = None
        self._read_copy()
        if _is_frozen(self._any()) or self._lacks_room(count, None):
            self._lay_out(self.bounds + count + (spare or 0))
        if spare is not None:
            self._stay = count, int(self.capacities.max()) + spare

    def has_room(self) -> bool:
        """Whether one more token fits into every head."""
        return not self._lacks_room(1, None)

    def note_replayed(self, count: int) -> None:
        """Every head got so many more slots, or below zero lost them, and `lengths` says so, without this object."""
        self._count(count)

    def _lacks_room(self, counts: Tensor | int, limit: int | None) -> bool:
        return bool((self.capacities.clamp(max=self.reach) < _limited(self.bounds + counts, limit)).any())

    def _count(self, counts: Tensor | int) -> None:
        """Count tokens that came."""
        self._bounds, self._since_copy = self._bounds + counts, self._since_copy + counts
        self._since_known += counts if isinstance(counts, int) else int(counts.max())

    def _read_copy(self) -> None:
        """Tighten the bounds if the lengths after an earlier eviction have reached the host."""
        if self._copy is not None and self._copy.has_arrived():
            self._bounds, self._copy = self._copy.tensor + self._since_copy, None
            self._since_known = int(torch.as_tensor(self._since_copy).max())

    def waits_to_keep(self, slack: int, trim: bool = False) -> bool:
        self._read_copy()
        return self.device.type != "cpu" and (trim or self._stay is not None or self._since_known > 2 * _room(slack))

    def keep(self, kept: Tensor, slack: int, trim: bool = False, lengths: Tensor | None = None) -> Slots:
        counts = kept.sum(2)
        if lengths is not None:
            exact = self._exact
        elif exact := self.device.type == "cpu" or self.waits_to_keep(slack, trim):
            lengths = HostCopy.read(counts)
        bounds = self.bounds if lengths is None else lengths
        order = kept.byte().argsort(dim=-1, descending=True, stable=True)
        shared = None if trim else self._shared_out(bounds)
        if shared is not None:
            self._lay_out(shared, order=order, in_place=True)
            self.lengths.copy_(counts)
        else:
            too_large = trim or bool(self.capacities.sum() > bounds.sum() + bounds.numel() * _room(slack))
            self._lay_out(bounds if too_large else self.capacities, order=order)
            self.lengths = counts
        self._bounds, self._exact = bounds, exact
        if lengths is not None:
            self._since_known, self._copy = 0, None
        elif self._copy is None:
            self._copy, self._since_copy = HostCopy(counts), 0
        return self

    def can_overwrite(self, count: int, slack: int) -> bool:
        """Whether heads are known to be alike, and may be cut to `count` slots with some of them moved and no more."""
        length = self.common_length
        if length is None or length - count > count // 2 or _is_frozen(self._any()):
            return False
        room = max(MIN_SLACK, slack) if self._stay is None else 4 * (self._stay[0] + MIN_SLACK)
        return len(self._any()) <= (count + room) * self.bounds.numel()

    def overwrite(self, victims: Tensor) -> None:
        """Remove the slots `victims [batch, kv_heads, v]` of heads that are known to be alike; nothing is allocated.

        Survivors among the last v slots of a head move into their place.
        """
        length, v = self.common_length, victims.shape[2]
        assert length is not None
        first = self.starts_on_device[..., None]
        source, target = ((first + slots).flatten() for slots in _moves(victims, length - v))
        for buffer in self.buffers.values():
            buffer.index_copy_(0, target, buffer[source])
        if self._stay is None:
            self.lengths = self.lengths - v
        else:
            self.lengths.sub_(v)
        self._count(-v)

    def can_remove(self) -> bool:
        """Whether single slots of any head may be removed in place, see :meth:`remove`."""
        return self.device.type == "cpu" and not _is_frozen(self._any())

    def remove(self, entries: Tensor) -> None:
        """Remove single slots in place; nothing is allocated. On a CPU, which knows how many every head loses.

        Survivors at the end of a head move into the places of slots before them.

        Args:
            entries: `[n]` int64, where they lie in the flat buffers, ascending.
        """
        starts = self.starts.flatten()
        heads = torch.searchsorted(starts, entries, right=True) - 1
        gone = heads.bincount(minlength=len(starts))
        ends = starts + self.lengths.flatten() - gone  # of the heads when the slots have gone
        tails = torch.arange(len(entries)) + (ends - (gone.cumsum(0) - gone)).repeat_interleave(gone)
        source, target = tails[~torch.isin(tails, entries)], entries[entries < ends[heads]]
        for buffer in self.buffers.values():
            buffer.index_copy_(0, target, buffer[source])
        gone = gone.view_as(self.lengths)
        if self._stay is None:
            self.lengths = self.lengths - gone
        else:
            self.lengths.sub_(gone)
        self._count(-gone)

    def padded(self, names: Collection[str] | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """A copy of what is asked for, or a view where all heads are alike: for evictions, not for every token."""
        length, capacity = self.common_length, int(self.capacities.view(-1)[0])
        if length and bool((self.capacities == capacity).all()):
            shape = *self.lengths.shape, capacity
            views = {
                name: self.buffers[name].unflatten(0, shape)[:, :, :length]
                for name in (self.buffers if names is None else names)
            }
            return views, torch.ones(*self.lengths.shape, length, dtype=torch.bool, device=self.device)
        offsets = torch.arange(max(1, self.longest), device=self.device)
        real = offsets < self.lengths[..., None]
        index = (self.starts_on_device[..., None] + offsets).masked_fill(~real, 0)
        out = {}
        for name in self.buffers if names is None else names:
            buffer = self.buffers[name]
            out[name] = buffer[index] if len(buffer) else buffer.new_zeros(*index.shape, *buffer.shape[1:])
        if "positions" in out:
            out["positions"].masked_fill_(~real, -1)
        return out, real

    def write_newest(self, name: str, tensor: Tensor) -> None:
        index = (self.starts_on_device + self.lengths - 1).flatten()
        self.buffers[name].index_copy_(0, index, tensor.flatten())

    def add(self, name: str, tensor: Tensor) -> None:
        self.buffers[name] = tensor.new_zeros(len(self._any()), *tensor.shape[3:])
        self.write(name, tensor)

    def write(self, name: str, tensor: Tensor) -> None:
        heads, offsets = self._entries()
        width = tensor.shape[2]
        new = tensor.flatten(0, 2)[heads * width + offsets.clamp(max=width - 1)]
        self.buffers[name] = _chosen(offsets < self.lengths.flatten()[heads], new, self.buffers[name])

    def data(self, name: str) -> Tensor:
        return self.buffers[name]

    def with_data(self, data: Mapping[str, Tensor]) -> Slots:
        return RaggedSlots(data, self.lengths, self.capacities, self.bounds)

    def per_slot(self, heads: Tensor) -> Tensor:
        return heads.flatten(0, 1)[self._entries()[0]]

    def drop_newest(self, count: int) -> None:
        self.lengths = self.lengths - count
        self._count(-count)

    def select_rows(self, rows: Tensor) -> None:
        on_host, on_device = rows.cpu(), to_device(rows, self.device)
        self._bounds = self.bounds[on_host]
        self._lay_out(self._bounds, starts=self.starts_on_device[on_device])
        self.lengths, self._copy, self._since_copy = self.lengths[on_device], None, 0

    def clone(self, names: Mapping[str, str] | None = None) -> Slots:
        names = {name: name for name in self.buffers} if names is None else names
        buffers = {new: self.buffers[old] for old, new in names.items()}
        copy = RaggedSlots(buffers, self.lengths, self.capacities, self.bounds)
        copy._exact = self._exact
        copy._lay_out(self.bounds)
        return copy

    def moved(self, device: torch.device) -> Slots:
        buffers = {name: buffer.to(device) for name, buffer in self.buffers.items()}
        return RaggedSlots(buffers, self.lengths, self.capacities, self.bounds.cpu())

    def to_ragged(self, like: Mapping[str, Tensor] | None = None) -> RaggedSlots:
        return self

    def filled(self) -> Tensor:
        """Indices of the real slots in the flat buffers, head after head, int64; an accelerator is waited for."""
        heads, offsets = self._entries()
        return (offsets < self.lengths.flatten()[heads]).nonzero()[:, 0]

    def _entries(self) -> tuple[Tensor, Tensor]:
        """Whose every entry of the buffers is, row after row, and which of its head's, from 0: `[total]` int64 each."""
        capacities = to_device(self.capacities.flatten(), self.device)
        total = int(self.capacities.sum())
        heads = torch.arange(len(capacities), device=self.device).repeat_interleave(capacities, output_size=total)
        return heads, torch.arange(total, device=self.device) - self.starts_on_device.flatten()[heads]

    def _set_capacities(self, capacities: Tensor) -> None:
        self.capacities, self.starts = capacities, _starts(capacities)
        self.starts_on_device = to_device(self.starts, self.device)

    def _shared_out(self, bounds: Tensor) -> Tensor | None:
        """Capacities that divide the same buffers among heads of `bounds` slots; None where they need not or cannot.

        They cannot where a head would lack the room that was reserved, and need not where they are far too large.
        """
        if self._stay is None or _is_frozen(self._any()):
            return None
        room, reach = self._stay
        heads, free = bounds.numel(), len(self._any()) - int(bounds.sum())
        if not heads * room <= free <= 4 * heads * (room + MIN_SLACK) or int(bounds.max()) + room > reach:
            return None
        capacities = bounds + free // heads
        capacities.view(-1)[0] += free % heads
        return capacities

    def _lay_out(
        self,
        capacities: Tensor,
        starts: Tensor | None = None,
        order: Tensor | None = None,
        in_place: bool = False,
    ) -> None:
        """Copy all slots to new buffers.

        Args:
            capacities: of the new ones, on the CPU.
            starts: where the slots of each head begin in the buffers so far; None means as they do.
            order: `[batch, kv_heads, n]`, which of its slots a head takes first, second, ...; None means as they lie.
            in_place: the capacities' sum is the same, and the new buffers are copied back into the old ones.
        """
        starts, old = self.starts_on_device if starts is None else starts, dict(self.buffers)
        memory = self.starts_on_device
        self._set_capacities(capacities)
        heads, offsets = self._entries()
        if order is not None:
            width = order.shape[2]
            offsets = order.flatten()[heads * width + offsets.clamp_(max=width - 1)]
        index = starts.flatten()[heads] + offsets
        for name, buffer in old.items():
            if len(buffer):  # what follows a head's last slot is never used, so it may be any finite number
                self.buffers[name] = buffer[index.clamp(max=len(buffer) - 1)]
            else:
                self.buffers[name] = buffer.new_zeros(len(index), *buffer.shape[1:])
        if in_place:
            for name, buffer in old.items():
                self.buffers[name] = buffer.copy_(self.buffers[name])
            self.starts_on_device = memory.copy_(self.starts_on_device)
        else:
            self._stay = None


def concatenate(first: Slots, last: Slots) -> Slots:
    """Keys and values of two sets of slots, those of `last` behind those of `first` in every head: copies."""
    names = ("keys", "values")
    if isinstance(first, EqualSlots) and isinstance(last, EqualSlots):
        joined = {name: torch.cat((first[name], last[name]), 2) for name in names}
        return EqualSlots(joined, first.length + last.length)
    front, back = first.to_ragged(), last.to_ragged()
    bounds = front.bounds + back.bounds
    starts, total = to_device(_starts(bounds), front.device), int(bounds.sum())
    targets = []
    for part, target in ((front, starts), (back, starts + front.lengths)):
        heads, offsets = part._entries()
        real = offsets < part.lengths.flatten()[heads]
        # what is not real goes to one more entry at the end
        targets.append(torch.where(real, target.flatten()[heads] + offsets, total))
    buffers = {}
    for name in names:
        like = front.buffers[name]
        both = like.new_zeros(total + 1, *like.shape[1:])
        for part, index in zip((front, back), targets, strict=True):
            both.index_copy_(0, index, part.buffers[name])
        buffers[name] = both[:total]
    return RaggedSlots(buffers, front.lengths + back.lengths, bounds, bounds)


def _moves(victims: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """Which slots move where, so that heads of `left` more slots than `victims [batch, kv_heads, v]` lose these.

    Survivors among the last v slots take the places of victims before them.

    Returns:
        The slots to read and those to write, `[batch, kv_heads, v]` each; no slot is written twice.
    """
    v = victims.shape[2]
    if v == 1:
        return torch.full_like(victims, left), victims  # moves onto itself where the last slot is the victim
    dead = torch.zeros(*victims.shape[:2], left + v, dtype=torch.bool, device=victims.device)
    dead.scatter_(2, victims, True)
    # survivors of the tail first, and victims before the tail first: as many of one as of the other; what
    # follows them moves dead slots onto dead slots, which keeps the sizes alike without asking the device
    source = left + dead[:, :, left:].byte().argsort(dim=2, stable=True)
    return source, victims.gather(2, (victims >= left).byte().argsort(dim=2, stable=True))


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Slots `index [batch, kv_heads, kept]` of a tensor `[batch, kv_heads, slots, ...]`, as a new tensor."""
    return tensor.gather(2, _expand_index(index, tensor))


def _expand_index(index: Tensor, tensor: Tensor) -> Tensor:
    index = index.reshape(*index.shape, *[1] * (tensor.dim() - 3))
    return index.expand(*index.shape[:3], *tensor.shape[3:])


def _room(slack: int) -> int:
    """Slots that a head is given beside its length: some more than needed, for heads that gain from eviction."""
    return max(MIN_SLACK, slack) + MIN_SLACK


def _starts(capacities: Tensor) -> Tensor:
    flat = capacities.flatten()
    return (flat.cumsum(0) - flat).view_as(capacities)


def _limited(bounds: Tensor, limit: int | None) -> Tensor:
    return bounds if limit is None else bounds.clamp(max=limit)


def _chosen(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` where `mask [total]`, else `old`, in the type of `old`."""
    return torch.where(mask.view(-1, *[1] * (old.dim() - 1)), new.to(old.dtype), old)


def _is_frozen(buffer: Tensor) -> bool:
    """Whether a buffer may not be written to: it was made under torch.inference_mode(), and this is outside it."""
    return buffer.is_inference() and not torch.is_inference_mode_enabled()
