"""One layer of an evicting cache, as transformers and the attention function see it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kv_gym.errors import UserError
from kv_gym.live.config import Eviction
from kv_gym.live.layer_state import Contents
from kv_gym.live.pieces import Piece, pieces
from kv_gym.live.ragged import RaggedSlots
from kv_gym.live.ragged_attention import attend_heads, causal_mask
from kv_gym.live.slots import EqualSlots
from kv_gym.models.attention import AttentionCall, hand_over
from kv_gym.models.hidden_states import received


class EvictingLayer(CacheLayerMixin):
    """Keys and values of one full-attention layer, of which every KV head keeps its own tokens.

    All stored slots are older than the tokens of the forward under way; their order is free. Padding is never stored.

    Attributes:
        contents: what is held, and how it is cut.
        seen: tokens that came so far in every row, evicted ones and padding included.
        fresh: `[batch, m]` bool on the CPU, which tokens of the coming forward are no padding; None means all.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, index: int, place: int, eviction: Eviction):
        # not CacheLayerMixin's: keys and values are properties here
        self.contents = Contents(index, place, eviction)
        self._forget()

    def reset(self) -> None:
        """Forget everything."""
        held = self.contents
        self.contents = Contents(held.index, held.place, held.eviction)
        self._forget()

    def _forget(self) -> None:
        self.seen = 0
        self.fresh: Tensor | None = None
        self._new: tuple[Tensor, Tensor, Tensor | None] | None = None
        self.is_initialized = False

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """`[batch, kv_heads, longest, d]`, or None before the first forward."""
        return self.contents.slots.padded(("keys",))[0]["keys"] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """`[batch, kv_heads, longest, d]`, or None before the first forward."""
        return self.contents.slots.padded(("values",))[0]["values"] if self.is_initialized else None

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that the layer holds."""
        return self.contents.tensors()

    # what the model calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Nothing is allocated before the first keys come."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Take the new tokens; where every head holds as many, return all that this forward may see.

        Raises:
            UserError: the batch is another than the stored one.
        """
        keys, values = key_states.detach(), value_states.detach()
        batch, held = len(keys), len(self.contents.rows)
        if held and batch != held:
            raise UserError(
                f"the cache holds a batch of {held} and was given one of {batch}: "
                "call batch_repeat_interleave or batch_select_indices first, or make a new cache"
            )
        self.lazy_initialization(keys)
        self.seen += keys.shape[2]
        hidden = received(self.contents.index) if self.contents.eviction.needs_hidden else None
        parts = self._pieces(keys)
        if len(parts) == 1 and isinstance(parts[0], slice) and isinstance(self.contents.slots, EqualSlots):
            self.contents.append(keys, values, None, hidden)
            visible = self.contents.visible()
            assert isinstance(visible, EqualSlots)
            seen = visible["keys"], visible["values"]
        else:
            # attention takes them in piece by piece, or head by head: what is returned here is not what it reads
            seen, self._new = (keys, values), (keys, values, hidden)
        hand_over(self)
        return seen

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Attend, observe the queries and evict when it is time; for every piece of the forward in turn."""
        self.contents.scaling = call.scaling
        self.contents.adopt_output(call.module, call.query.shape[1], call.query.shape[3])
        if self._new is None:
            result = self._equal(call)
            self._afterwards(call.query, None)
        else:
            new, self._new = self._new, None
            result = self._in_pieces(call, *new), None
        if call.query.shape[2] == self.seen:
            self.contents.slots.own()
        self.fresh = None
        return result

    def _equal(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        m, n = call.query.shape[2], call.key.shape[2]
        # transformers' mask is not used: it is one for all layers, and it may be skipped where its `is_causal` would
        # align the wrong corner; sdpa is causal by itself where nothing is stored
        by_itself = m == n and call.implementation == "sdpa"
        return replace(call, mask=None if by_itself else causal_mask(m, n, call.query)).run()

    def _in_pieces(self, call: AttentionCall, keys: Tensor, values: Tensor, hidden: Tensor | None) -> Tensor:
        outputs, padded = [], self.fresh is not None
        for piece in self._pieces(keys):
            if isinstance(piece, slice):
                query, fresh = call.query[:, :, piece], None
                own = None if hidden is None else hidden[:, piece]
                self.contents.append(keys[:, :, piece], values[:, :, piece], None, own)
            else:
                query, fresh, padded = call.query, piece, True
                self.contents.append(keys, values, fresh, hidden)
            slots = self.contents.visible()
            if isinstance(slots, RaggedSlots):
                outputs.append(attend_heads(query, slots, call.scaling, fresh, call.rest.get("dropout", 0.0)))
            else:
                outputs.append(self._equal(replace(call, query=query, key=slots["keys"], value=slots["values"]))[0])
                self.contents.slots.own()
            self._afterwards(query, fresh)
        # pieces of padded rows are full-sized, and zero outside of their own queries
        return torch.stack(outputs).sum(0) if padded else torch.cat(outputs, 1)

    @torch.no_grad()
    def _afterwards(self, query: Tensor, fresh: Tensor | None) -> None:
        self.contents.observe(query, fresh)
        due = self.contents.due()
        if any(due) and not self.contents.eviction.at_the_end:
            self.contents.evict(due)

    def _pieces(self, keys: Tensor) -> list[Piece]:
        held = self.contents
        waiting = [seen - (at or 0) for seen, at in zip(held.rows, held.fired, strict=True)] or [0] * len(keys)
        return pieces(held.eviction.piece, waiting, keys.shape[2], self.fresh)

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Keys that the next forward sees, and the offset that puts the newest at their true position."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        held = self.contents.slots.longest
        return held + new, self.seen - held

    def get_seq_length(self) -> int:
        """Tokens seen, from which models count the position of the next one."""
        return self.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length

    # copies and batches

    def fork(self, eviction: Eviction) -> EvictingLayer:
        """An independent copy that evicts by `eviction`; see :meth:`Contents.fork`."""
        twin = EvictingLayer(self.contents.index, self.contents.place, eviction)
        twin.contents, twin.seen = self.contents.fork(eviction), self.seen
        if self.is_initialized:
            twin.lazy_initialization(self.contents.slots.buffers["keys"])
        return twin

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch, `beam_idx [batch]`."""
        self.contents.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices [rows]` of the batch."""
        self.contents.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self.contents.select_rows(torch.arange(len(self.contents.rows)).repeat_interleave(repeats))

    def take_back(self, count: int) -> None:
        """Forget the newest `count` tokens, as many as `contents.retractable` at most."""
        self.contents.take_back(count)
        self.seen -= count

    def activate_past_recording(self) -> None:
        """Drafts come: remember what is needed to take them back."""
        self.contents.recording = True


def copied(layer: Any) -> Any:
    """An independent copy of one of transformers' own layers."""
    twin = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            setattr(twin, name, value.clone())
    return twin
