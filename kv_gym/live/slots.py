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
    def longest(self) -> int:
        """Slots of the head that holds most."""

    @property
    @abstractmethod
    def mean(self) -> int:
        """Slots of a head on average, rounded down."""

    @abstractmethod
    def counts(self) -> Tensor:
        """Slots of every head, `[batch, kv_heads]` int64 on the CPU."""

    @abstractmethod
    def append(self, new: Mapping[str, Tensor], slack: int, token_mask: Tensor | None = None) -> Slots:
        """Add tokens behind those of every head.

        Args:
            new: one tensor `[batch, kv_heads, new, ...]` for each buffer; what comes later may be left out where
                there is a gap.
            slack: by how many slots a full buffer grows at least.
            token_mask: `[batch, new]` or `[batch, kv_heads, new]` bool on the CPU, which of them to store; None means
                all.

        Returns:
            The slots to use from here on: these, or ragged ones.
        """

    @abstractmethod
    def keep(self, kept: Tensor, slack: int, trim: bool = False) -> Slots:
        """Keep the slots `kept [batch, kv_heads, longest]` bool and free the rest.

        Args:
            kept: which slots stay.
            slack: room beside a head's length that it may keep.
            trim: free all slack.

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
    def longest(self) -> int:
        return self.length

    @property
    def mean(self) -> int:
        return self.length

    def counts(self) -> Tensor:
        return torch.full(self._heads(), self.length)

    def append(self, new: Mapping[str, Tensor], slack: int, token_mask: Tensor | None = None) -> Slots:
        if token_mask is not None:
            return self.to_ragged(new).append(new, slack, token_mask)
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
        """Replace a buffer's entries of the token that was appended last, `[batch, kv_heads, 1]`."""
        if self._newest is None:
            self._writable(name)[:, :, self.length - 1 : self.length] = tensor
        else:
            self._write_one(self._newest, {name: tensor})

    def keep(self, kept: Tensor, slack: int, trim: bool = False) -> Slots:
        lengths, index = kept.sum(2).cpu(), kept.flatten().nonzero()[:, 0]
        flat = {name: self[name].flatten(0, 2)[index] for name in self.buffers}
        return RaggedSlots(flat, lengths, lengths.clone())

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
        v = victims.shape[2]
        self.length, self._newest = self.length - v, None
        if v == 1:
            source = torch.full_like(victims, self.length)  # moves onto itself where the last slot is the victim
        else:
            dead = torch.zeros(*victims.shape[:2], self.length + v, dtype=torch.bool, device=victims.device)
            dead.scatter_(2, victims, True)
            # survivors of the tail first, and victims before the tail first: as many of one as of the other; what
            # follows them moves dead slots onto dead slots, which keeps the sizes alike without asking the device
            source = self.length + dead[:, :, self.length :].byte().argsort(dim=2, stable=True)
            victims = victims.gather(2, (victims >= self.length).byte().argsort(dim=2, stable=True))
        for name in self.buffers:
            buffer = self._writable(name)
            buffer.scatter_(2, _expand_index(victims, buffer), take(buffer, source))

    def padded(self, names: Collection[str] | None = None) -> tuple[dict[str, Tensor], Tensor]:
        filled = {name: self[name] for name in (self.buffers if names is None else names)}
        return filled, torch.ones(*self._heads(), self.length, dtype=torch.bool, device=self._any().device)

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
        self._map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def clone(self, names: Mapping[str, str] | None = None) -> Slots:
        names = {name: name for name in self.buffers} if names is None else names
        return EqualSlots({new: self[old].clone() for old, new in names.items()}, self.length)

    def to_ragged(self, like: Mapping[str, Tensor] | None = None) -> RaggedSlots:
        if self.length:
            lengths = self.counts()
            flat = {name: self[name].flatten(0, 2).clone() for name in self.buffers}
            return RaggedSlots(flat, lengths, lengths.clone())
        assert like is not None
        nothing = torch.zeros(next(iter(like.values())).shape[:2], dtype=torch.int64)
        empty = {name: tensor.new_empty(0, *tensor.shape[3:]) for name, tensor in like.items()}
        return RaggedSlots(empty, nothing, nothing.clone())

    def own_memory(self) -> None:
        for name, buffer in self.buffers.items():
            if buffer.untyped_storage().nbytes() != buffer.numel() * buffer.element_size():
                self.buffers[name] = buffer.clone(memory_format=torch.contiguous_format)

    def _any(self) -> Tensor:
        return next(iter(self.buffers.values()))

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
    entries from ``starts[row, head]`` on. These three are int64 tensors on the CPU, so attention never asks a device
    how long its heads are.
    """

    def __init__(self, buffers: Mapping[str, Tensor], lengths: Tensor, capacities: Tensor):
        self.buffers = dict(buffers)
        self.lengths, self.capacities = lengths, capacities
        self.starts = _starts(capacities)

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    @property
    def mean(self) -> int:
        return int(self.lengths.sum()) // self.lengths.numel()

    def counts(self) -> Tensor:
        return self.lengths

    def append(self, new: Mapping[str, Tensor], slack: int, token_mask: Tensor | None = None) -> Slots:
        m = next(iter(new.values())).shape[2]
        counts: Tensor | int = m
        if token_mask is not None:
            token_mask = (token_mask[:, None] if token_mask.dim() == 2 else token_mask).expand(*self.lengths.shape, m)
            counts = token_mask.sum(2)
        if int((self.capacities - self.lengths - counts).min()) < 0 or _is_frozen(self._any()):
            self._lay_out(self.lengths + torch.as_tensor(counts).clamp(min=_room(slack)))
        ends = self.starts + self.lengths
        if token_mask is None:  # a decoding step comes here: few operations
            index, selected = (ends if m == 1 else ends[..., None] + torch.arange(m)).flatten(), None
        else:
            index, selected = runs(ends, token_mask.sum(2)), token_mask.flatten().nonzero()[:, 0]
        for name, tensor in new.items():
            flat = tensor.flatten(0, 2)
            flat = flat if selected is None else flat[selected.to(flat.device)]
            self.buffers[name].index_copy_(0, index.to(flat.device), flat)
        self.lengths = self.lengths + counts
        return self

    def keep(self, kept: Tensor, slack: int, trim: bool = False) -> Slots:
        kept = kept.cpu()
        lengths, offsets = kept.sum(2), torch.arange(kept.shape[2])
        entries = self.starts[..., None] + offsets
        if trim or self.capacities.sum() > lengths.sum() + lengths.numel() * _room(slack) or _is_frozen(self._any()):
            self._take(entries[kept], lengths)
            return self
        # nothing is to be freed: the survivors among each head's last slots move over its victims
        front = offsets < lengths[..., None]
        # as many of one as of the other in every head, both in the order of heads
        holes = entries[(offsets < self.lengths[..., None]) & front & ~kept]
        moved = entries[kept & ~front]
        for buffer in self.buffers.values():
            buffer.index_copy_(0, holes.to(buffer.device), buffer[moved.to(buffer.device)])
        self.lengths = lengths
        return self

    def padded(self, names: Collection[str] | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """A copy of what is asked for: for evictions, not for every token."""
        offsets = torch.arange(max(1, self.longest))
        real = offsets < self.lengths[..., None]
        index = (self.starts[..., None] + offsets).masked_fill(~real, 0)
        device = self._any().device
        index, real = index.to(device), real.to(device)
        out = {}
        for name in self.buffers if names is None else names:
            buffer = self.buffers[name]
            out[name] = buffer[index] if len(buffer) else buffer.new_zeros(*index.shape, *buffer.shape[1:])
        if "positions" in out:
            out["positions"].masked_fill_(~real, -1)
        return out, real

    def add(self, name: str, tensor: Tensor) -> None:
        self.buffers[name] = tensor.new_zeros(len(self._any()), *tensor.shape[3:])
        self.write(name, tensor)

    def write(self, name: str, tensor: Tensor) -> None:
        offsets = torch.arange(self.lengths.numel()).view_as(self.lengths) * tensor.shape[2]
        source = runs(offsets, self.lengths).to(tensor.device)
        flat = tensor.flatten(0, 2)[source].to(self.buffers[name].dtype)
        if _is_frozen(self._any()):
            self._lay_out(self.capacities)
        self.buffers[name].index_copy_(0, self.filled().to(tensor.device), flat)

    def data(self, name: str) -> Tensor:
        return self.buffers[name]

    def with_data(self, data: Mapping[str, Tensor]) -> Slots:
        return RaggedSlots(data, self.lengths, self.capacities)

    def per_slot(self, heads: Tensor) -> Tensor:
        return heads.flatten(0, 1).repeat_interleave(self.capacities.flatten().to(heads.device), 0)

    def drop_newest(self, count: int) -> None:
        self.lengths = self.lengths - count

    def select_rows(self, rows: Tensor) -> None:
        rows = rows.cpu()
        self._take(runs(self.starts[rows], self.lengths[rows]), self.lengths[rows])

    def clone(self, names: Mapping[str, str] | None = None) -> Slots:
        names = {name: name for name in self.buffers} if names is None else names
        copy = RaggedSlots({new: self.buffers[old] for old, new in names.items()}, self.lengths, self.capacities)
        copy._take(self.filled(), self.lengths.clone())
        return copy

    def to_ragged(self, like: Mapping[str, Tensor] | None = None) -> RaggedSlots:
        return self

    def filled(self) -> Tensor:
        """Indices of the real slots in the flat buffers, head after head, int64 on the CPU."""
        return runs(self.starts, self.lengths)

    def _any(self) -> Tensor:
        return next(iter(self.buffers.values()))

    def _take(self, index: Tensor, lengths: Tensor) -> None:
        self.buffers = {name: buffer[index.to(buffer.device)] for name, buffer in self.buffers.items()}
        self.lengths, self.capacities, self.starts = lengths, lengths.clone(), _starts(lengths)

    def _lay_out(self, capacities: Tensor) -> None:
        starts, total = _starts(capacities), int(capacities.sum())
        old, new = self.filled(), runs(starts, self.lengths)
        for name, buffer in self.buffers.items():
            roomy = buffer.new_zeros(total, *buffer.shape[1:])  # zeros: what is padded is read, though never used
            roomy.index_copy_(0, new.to(buffer.device), buffer.index_select(0, old.to(buffer.device)))
            self.buffers[name] = roomy
        self.capacities, self.starts = capacities, starts


def concatenate(first: Slots, last: Slots) -> Slots:
    """Keys and values of two sets of slots, those of `last` behind those of `first` in every head: copies."""
    names = ("keys", "values")
    if isinstance(first, EqualSlots) and isinstance(last, EqualSlots):
        both = {name: torch.cat((first[name], last[name]), 2) for name in names}
        return EqualSlots(both, first.length + last.length)
    front, back = first.to_ragged(), last.to_ragged()
    lengths = front.lengths + back.lengths
    total, starts = int(lengths.sum()), _starts(lengths)
    buffers = {}
    for name in names:
        like = front.buffers[name]
        buffers[name] = like.new_empty(total, *like.shape[1:])
        for part, target in ((front, starts), (back, starts + front.lengths)):
            source = part.buffers[name]
            index = runs(target, part.lengths).to(source.device)
            buffers[name][index] = source[part.filled().to(source.device)]
    return RaggedSlots(buffers, lengths, lengths)


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Slots `index [batch, kv_heads, kept]` of a tensor `[batch, kv_heads, slots, ...]`, as a new tensor."""
    return tensor.gather(2, _expand_index(index, tensor))


def runs(starts: Tensor, counts: Tensor) -> Tensor:
    """The indices start, start + 1, ... of every run, one after the other: `[sum of counts]` int64."""
    flat = counts.flatten()
    before = flat.cumsum(0) - flat
    return torch.repeat_interleave(starts.flatten() - before, flat) + torch.arange(int(flat.sum()))


def _expand_index(index: Tensor, tensor: Tensor) -> Tensor:
    index = index.reshape(*index.shape, *[1] * (tensor.dim() - 3))
    return index.expand(*index.shape[:3], *tensor.shape[3:])


def _room(slack: int) -> int:
    """Slots that a head is given beside its length: some more than needed, for heads that gain from eviction."""
    return max(MIN_SLACK, slack) + MIN_SLACK


def _starts(capacities: Tensor) -> Tensor:
    flat = capacities.flatten()
    return (flat.cumsum(0) - flat).view_as(capacities)


def _is_frozen(buffer: Tensor) -> bool:
    """Whether a buffer may not be written to: it was made under torch.inference_mode(), and this is outside it."""
    return buffer.is_inference() and not torch.is_inference_mode_enabled()
