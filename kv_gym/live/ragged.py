"""Slots of one layer when heads hold different numbers of tokens: each head is one run of a flat buffer."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from kv_gym.live.slots import LEAST_SLACK, EqualSlots


class RaggedSlots:
    """The same as :class:`EqualSlots` for heads of different lengths, from none to all tokens.

    A buffer is `[total, ...]`; the head (row, kv head) fills ``lengths[row, head]`` of the ``capacities[row, head]``
    entries from ``starts[row, head]`` on. These three are int64 tensors on the CPU, so attention never asks a device
    how long its heads are. Slots lie in any order.
    """

    def __init__(self, buffers: Mapping[str, Tensor], lengths: Tensor, capacities: Tensor):
        self.buffers = dict(buffers)
        self.lengths, self.capacities = lengths, capacities
        self.starts = _starts(capacities)

    @classmethod
    def of(cls, slots: EqualSlots, kept: Tensor) -> RaggedSlots:
        """The slots `kept [batch, kv_heads, length]` bool of equal ones, in memory of just their size."""
        lengths = kept.sum(2).cpu()
        index = kept.flatten().nonzero()[:, 0]
        flat = {name: slots[name].flatten(0, 2)[index] for name in slots.buffers}
        return cls(flat, lengths, lengths.clone())

    @property
    def longest(self) -> int:
        """Slots of the head that holds most."""
        return int(self.lengths.max())

    @property
    def mean(self) -> int:
        """Slots of a head on average, rounded down."""
        return int(self.lengths.sum()) // self.lengths.numel()

    def counts(self) -> Tensor:
        """Slots of every head, `[batch, kv_heads]` int64 on the CPU."""
        return self.lengths

    def append(self, new: Mapping[str, Tensor], slack: int, fresh: Tensor | None = None) -> None:
        """Add slots `[batch, kv_heads, new, ...]` to the end of every head.

        Args:
            new: one tensor for each buffer.
            slack: room that a full head is given beside its length, at least 16, and 16 more.
            fresh: `[batch, new]` or `[batch, kv_heads, new]` bool on the CPU, which of them are real; None means all.
        """
        m = next(iter(new.values())).shape[2]
        counts: Tensor | int = m
        if fresh is not None:
            fresh = (fresh[:, None] if fresh.dim() == 2 else fresh).expand(*self.lengths.shape, m)
            counts = fresh.sum(2)
        if int((self.capacities - self.lengths - counts).min()) < 0 or self._frozen():
            self._lay_out(self.lengths + torch.as_tensor(counts).clamp(min=_room(slack)))
        ends = self.starts + self.lengths
        if fresh is None:  # a decoding step comes here: few operations
            index, picked = (ends if m == 1 else ends[..., None] + torch.arange(m)).flatten(), None
        else:
            index, picked = runs(ends, fresh.sum(2)), fresh.flatten().nonzero()[:, 0]
        for name, tensor in new.items():
            rows = tensor.flatten(0, 2)
            rows = rows if picked is None else rows[picked.to(rows.device)]
            self.buffers[name].index_copy_(0, index.to(rows.device), rows)
        self.lengths = self.lengths + counts

    def add(self, name: str, tensor: Tensor) -> None:
        """Hold another tensor, given as `[batch, kv_heads, longest, ...]`."""
        self.buffers[name] = tensor.new_zeros(len(self._any()), *tensor.shape[3:])
        self.write(name, tensor)

    def write(self, name: str, tensor: Tensor) -> None:
        """Replace a buffer's filled part by the real slots of `tensor [batch, kv_heads, longest, ...]`."""
        offsets = torch.arange(self.lengths.numel()).view_as(self.lengths) * tensor.shape[2]
        source = runs(offsets, self.lengths).to(tensor.device)
        rows = tensor.flatten(0, 2)[source].to(self.buffers[name].dtype)
        if self._frozen():
            self._lay_out(self.capacities)
        self.buffers[name].index_copy_(0, runs(self.starts, self.lengths).to(tensor.device), rows)

    def padded(self, names: Collection[str] | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Buffers as `[batch, kv_heads, longest, ...]`, and which slots are real `[batch, kv_heads, longest]`.

        A copy of what is asked for: for evictions, not for every token.

        Args:
            names: which buffers; None means every one.
        """
        places = torch.arange(max(1, self.longest))
        real = places < self.lengths[..., None]
        index = (self.starts[..., None] + places).masked_fill(~real, 0)
        device = self._any().device
        index, real = index.to(device), real.to(device)
        chosen = self.buffers if names is None else names
        out = {name: self._gathered(self.buffers[name], index) for name in chosen}
        if "positions" in out:
            out["positions"].masked_fill_(~real, -1)
        return out, real

    def keep(self, kept: Tensor, slack: int, exact: bool = False) -> None:
        """Keep the slots `kept [batch, kv_heads, longest]` bool.

        Where no memory is to be freed, the survivors among each head's last slots move over its victims.

        Args:
            kept: which slots stay.
            slack: room beside a head's length that it may keep.
            exact: free all that is not needed.
        """
        kept = kept.cpu()
        lengths = kept.sum(2)
        allowed = lengths.sum() + lengths.numel() * _room(slack)
        if exact or self.capacities.sum() > allowed or self._frozen():
            places = torch.arange(kept.shape[2])
            index = (self.starts[..., None] + places)[kept]
            self._pick(index, lengths)
            return
        places = torch.arange(kept.shape[2])
        live = places < self.lengths[..., None]
        early = places < lengths[..., None]
        # as many of one as of the other in every head, both in the order of heads
        holes = (self.starts[..., None] + places)[live & early & ~kept]
        movers = (self.starts[..., None] + places)[kept & ~early]
        for buffer in self.buffers.values():
            buffer.index_copy_(0, holes.to(buffer.device), buffer[movers.to(buffer.device)])
        self.lengths = lengths

    def drop_newest(self, count: int) -> None:
        """Forget the last `count` slots of every head, which came in that order since anything was evicted."""
        self.lengths = self.lengths - count

    def select_rows(self, rows: Tensor) -> None:
        """Keep the rows `rows [new batch]` int64 of the batch, in that order; a row may come more than once."""
        rows = rows.cpu()
        self._pick(runs(self.starts[rows], self.lengths[rows]), self.lengths[rows])

    def clone(self, names: Mapping[str, str]) -> RaggedSlots:
        """An independent copy of the buffers `names`, under the names that they map to, without slack."""
        buffers = {new: self.buffers[old] for old, new in names.items()}
        copy = RaggedSlots(buffers, self.lengths, self.capacities)
        copy._pick(runs(self.starts, self.lengths), self.lengths.clone())
        return copy

    def own(self) -> None:
        """Nothing to do: every buffer is its own memory."""

    def _any(self) -> Tensor:
        return next(iter(self.buffers.values()))

    def _gathered(self, buffer: Tensor, index: Tensor) -> Tensor:
        if not len(buffer):  # no head holds anything
            return buffer.new_zeros(*index.shape, *buffer.shape[1:])
        return buffer[index]

    def _pick(self, index: Tensor, lengths: Tensor) -> None:
        self.buffers = {name: buffer[index.to(buffer.device)] for name, buffer in self.buffers.items()}
        self.lengths, self.capacities, self.starts = lengths, lengths.clone(), _starts(lengths)

    def _lay_out(self, capacities: Tensor) -> None:
        starts, total = _starts(capacities), int(capacities.sum())
        old, new = runs(self.starts, self.lengths), runs(starts, self.lengths)
        for name, buffer in self.buffers.items():
            roomy = buffer.new_zeros(total, *buffer.shape[1:])  # zeros: what is padded is read, though never used
            roomy.index_copy_(0, new.to(buffer.device), buffer.index_select(0, old.to(buffer.device)))
            self.buffers[name] = roomy
        self.capacities, self.starts = capacities, starts

    def _frozen(self) -> bool:
        # buffers made under torch.inference_mode() may not be written to outside it
        return self._any().is_inference() and not torch.is_inference_mode_enabled()


def _room(slack: int) -> int:
    """Slots that a head is given beside its length: some more than needed, for heads that gain from eviction."""
    return max(LEAST_SLACK, slack) + LEAST_SLACK


def _starts(capacities: Tensor) -> Tensor:
    flat = capacities.flatten()
    return (flat.cumsum(0) - flat).view_as(capacities)


def runs(starts: Tensor, counts: Tensor) -> Tensor:
    """The indices start, start + 1, ... of every run, one after the other: `[sum of counts]` int64."""
    flat = counts.flatten()
    before = flat.cumsum(0) - flat
    return torch.repeat_interleave(starts.flatten() - before, flat) + torch.arange(int(flat.sum()))
