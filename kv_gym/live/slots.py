"""Slots of one layer when every head holds as many: one block of memory per tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

LEAST_SLACK = 16


class EqualSlots:
    """Keys, values, positions and whatever else belongs to cached tokens: buffers `[batch, kv_heads, capacity, ...]`.

    A new token is written in place. A full buffer grows by `slack` slots; a few evicted slots are overwritten by the
    last ones, so slots lie in any order. Until the first growth, and after a large eviction, there is no slack.
    """

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.length = 0
        self._foreign = False  # as they came from the model, which may still want them as they are

    def __getitem__(self, name: str) -> Tensor:
        """The filled part of a buffer, `[batch, kv_heads, length, ...]`; a view."""
        return self.buffers[name][:, :, : self.length]

    @property
    def longest(self) -> int:
        """Slots of the head that holds most."""
        return self.length

    @property
    def mean(self) -> int:
        """Slots of a head on average."""
        return self.length

    def counts(self) -> Tensor:
        """Slots of every head, `[batch, kv_heads]` int64."""
        return torch.full(self["positions"].shape[:2], self.length)

    def append(self, new: Mapping[str, Tensor], slack: int) -> None:
        """Add slots `[batch, kv_heads, new, ...]`; the first ones are held as they come, without a copy.

        Args:
            new: one tensor for each buffer.
            slack: by how many slots a full buffer grows at least.
        """
        start = self.length
        self.length += next(iter(new.values())).shape[2]
        if start == 0:
            self.buffers, self._foreign = dict(new), True
            return
        capacity = max(self.length, start + max(LEAST_SLACK, slack))
        for name, tensor in new.items():
            if not self._writable(self.buffers[name]):
                self.buffers[name] = self._grown(self.buffers[name], start, capacity)
            self.buffers[name][:, :, start : self.length] = tensor
        self._foreign = False  # they had no room for more, so all of them have grown

    @property
    def foreign(self) -> bool:
        """Whether the buffers are still as they came from the model."""
        return self._foreign

    def restore(self, buffers: Mapping[str, Tensor], length: int, foreign: bool) -> None:
        """Take over buffers with room behind their first `length` slots, as another object had them."""
        self.buffers, self.length, self._foreign = dict(buffers), length, foreign

    def write(self, name: str, tensor: Tensor) -> None:
        """Replace the filled part of a buffer."""
        if self._foreign or (self.buffers[name].is_inference() and not torch.is_inference_mode_enabled()):
            self.buffers[name] = self.buffers[name].clone()
        self[name].copy_(tensor)

    def add(self, name: str, tensor: Tensor) -> None:
        """Hold another tensor `[batch, kv_heads, length, ...]`; there must be no slack, as in a fresh copy."""
        self.buffers[name] = tensor

    def padded(self, names: Collection[str] | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Filled buffers `[batch, kv_heads, length, ...]`, and which slots are real: all.

        Args:
            names: which buffers; None means every one.
        """
        filled = {name: self[name] for name in (self.buffers if names is None else names)}
        return filled, torch.ones_like(self["positions"], dtype=torch.bool)

    def keep_top(self, merits: Tensor, count: int, slack: int, exact: bool = False) -> None:
        """Keep the `count` slots of highest merit in every head.

        Few victims are overwritten in place, by the survivors among the last slots: bytes moved grow with the
        victims, not with the cache. Otherwise survivors go to new buffers of just their size.

        Args:
            merits: `[batch, kv_heads, length]`, no two of a head alike.
            count: below `length`.
            slack: how many slots a buffer may stay too large.
            exact: free all that is not needed.
        """
        victims = self.length - count
        if exact or victims > count // 2 or not self.may_overwrite(count, slack):
            self._take(merits.topk(count, sorted=False).indices.sort().values)
        else:
            self.overwrite(merits.topk(victims, largest=False, sorted=False).indices)

    def _take(self, index: Tensor) -> None:
        self.map(lambda tensor: take(tensor, index))
        self.length = index.shape[2]

    def may_overwrite(self, count: int, slack: int) -> bool:
        """Whether `count` slots may stay where they are: the buffers are ours, and not more than `slack` too large."""
        capacity = next(iter(self.buffers.values())).shape[2]
        return not self._foreign and capacity <= count + max(LEAST_SLACK, slack)

    def overwrite(self, victims: Tensor) -> None:
        """Move what survives among the last slots over the victims `[batch, kv_heads, v]`; v slots fall away."""
        v = victims.shape[2]
        self.length -= v
        if v == 1:
            source = torch.full_like(victims, self.length)  # moves onto itself where the last slot is the victim
        else:
            dead = torch.zeros(*victims.shape[:2], self.length + v, dtype=torch.bool, device=victims.device)
            dead.scatter_(2, victims, True)
            # survivors of the tail first, and victims before the tail first: as many of one as of the other; what
            # follows them moves dead slots onto dead slots, which keeps the sizes alike without asking the device
            source = self.length + dead[:, :, self.length :].byte().argsort(dim=2, stable=True)
            victims = victims.gather(2, (victims >= self.length).byte().argsort(dim=2, stable=True))
        for name, buffer in self.buffers.items():
            if buffer.is_inference() and not torch.is_inference_mode_enabled():
                buffer = self.buffers[name] = buffer.clone()
            put(buffer, victims, take(buffer, source))

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every buffer by `change` of its filled part."""
        self.buffers, self._foreign = {name: change(self[name]) for name in self.buffers}, False

    def drop_newest(self, count: int) -> None:
        """Forget the last `count` slots of every head, which came in that order since anything was evicted."""
        if self._foreign:  # from now on there is room, and new tokens would be written into it
            self.map(torch.clone)
        self.length -= count

    def select_rows(self, rows: Tensor) -> None:
        """Keep the rows `rows [new batch]` int64 of the batch, in that order; a row may come more than once."""
        self.map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def clone(self, names: Mapping[str, str]) -> EqualSlots:
        """An independent copy of the buffers `names`, under the names that they map to, without slack."""
        copy = EqualSlots()
        copy.buffers, copy.length = {new: self[old].clone() for old, new in names.items()}, self.length
        return copy

    def own(self) -> None:
        """Copy what shares its memory with other tensors, such as a slice of a fused projection."""
        for name, buffer in self.buffers.items():
            if buffer.untyped_storage().nbytes() != buffer.numel() * buffer.element_size():
                self.buffers[name] = buffer.clone(memory_format=torch.contiguous_format)

    def _writable(self, buffer: Tensor) -> bool:
        # a buffer made under torch.inference_mode() may not be written to outside it
        return buffer.shape[2] >= self.length and (not buffer.is_inference() or torch.is_inference_mode_enabled())

    def _grown(self, buffer: Tensor, filled: int, capacity: int) -> Tensor:
        grown = buffer.new_empty(*buffer.shape[:2], capacity, *buffer.shape[3:])
        grown[:, :, :filled] = buffer[:, :, :filled]
        return grown


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Slots `index [batch, kv_heads, kept]` of a tensor `[batch, kv_heads, slots, ...]`, as a new tensor."""
    return tensor.gather(2, _spread(index, tensor))


def put(tensor: Tensor, index: Tensor, moved: Tensor) -> None:
    """Write `moved [batch, kv_heads, k, ...]` into slots `index [batch, kv_heads, k]` of a tensor, in place."""
    tensor.scatter_(2, _spread(index, tensor), moved)


def _spread(index: Tensor, tensor: Tensor) -> Tensor:
    index = index.reshape(*index.shape, *[1] * (tensor.dim() - 3))
    return index.expand(*index.shape[:3], *tensor.shape[3:])
