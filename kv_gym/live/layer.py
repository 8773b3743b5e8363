"""One layer of an evicting cache, as transformers and the attention function see it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from transformers.cache_utils import CacheLayerMixin

from kv_gym.errors import UserError
from kv_gym.live.cascade import Cascade
from kv_gym.live.config import CacheConfig
from kv_gym.live.layer_state import LayerState
from kv_gym.live.ragged_attention import attend_absorbed, attend_kernel, attend_ragged, causal_mask, reads_in_place
from kv_gym.live.slots import EqualSlots, RaggedSlots
from kv_gym.models.attention import AttentionCall, observe_next_attention
from kv_gym.models.hidden_states import current_hidden_states

PrefillChunk = slice | Tensor


class EvictingLayer(CacheLayerMixin):
    """Keys and values of one full-attention layer, of which every KV head keeps its own tokens.

    The model calls :meth:`update` with new keys and values, then the attention function calls :meth:`attend`, which
    ends with an eviction when it is time. All stored slots are older than the tokens of the forward under way; their
    order is free. Padding is never stored.

    Attributes:
        state: what is held, and how it is evicted.
        seen: tokens that came so far in every row, evicted ones and padding included.
        token_mask: `[batch, m]` bool on the CPU, which tokens of the coming forward are no padding; None means all.
        cascade: what the layers before it in the forward under way were cut to, where the allocation cascades.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, index: int, ordinal: int, config: CacheConfig):
        # not CacheLayerMixin's: keys and values are properties here
        self._begin(LayerState(index, ordinal, config))

    def reset(self) -> None:
        """Forget everything."""
        self._begin(LayerState(self.state.index, self.state.ordinal, self.state.config))

    def _begin(self, state: LayerState) -> None:
        self.state, self.seen = state, 0
        self.token_mask: Tensor | None = None
        self.cascade: Cascade | None = None
        self._new: tuple[Tensor, Tensor, Tensor | None] | None = None  # what attend is to take in
        self.is_initialized = False

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """`[batch, kv_heads, longest, d]`, or None before the first forward."""
        return self.state.slots.padded(("keys",))[0]["keys"] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """`[batch, kv_heads, longest, d]`, or None before the first forward."""
        return self.state.slots.padded(("values",))[0]["values"] if self.is_initialized else None

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that the layer holds."""
        return self.state.tensors()

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
        batch, stored = len(keys), len(self.state.tokens_seen)
        if stored and batch != stored:
            raise UserError(
                f"the cache holds a batch of {stored} and was given one of {batch}: "
                "call batch_repeat_interleave or batch_select_indices first, or make a new cache"
            )
        self.lazy_initialization(keys)
        self.seen += keys.shape[2]
        hidden = current_hidden_states(self.state.index) if self.state.config.needs_hidden else None
        chunks = self._chunks(keys)
        at_once = len(chunks) == 1 and isinstance(chunks[0], slice) and isinstance(self.state.slots, EqualSlots)
        if at_once and not (reads_in_place(keys) and self.state.stored_as_read):
            self.state.append(keys, values, None, hidden)
            visible = self.state.visible_slots()
            keys, values = visible.data("keys"), visible.data("values")
        else:
            # attention takes them in chunk by chunk, or head by head: what is returned here is not what it reads
            self._new = keys, values, hidden
        observe_next_attention(self)
        return keys, values

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Attend, observe the queries and evict when it is time; for every chunk of the forward in turn."""
        self.state.scaling = call.scaling
        self.state.use_output_projection(call.module, call.query.shape[1], call.query.shape[3])
        if self._new is None:
            output = self._attend_otherwise(call, call.query, None)
            result = self._attend_equal(call) if output is None else (output, None)
            self._observe_and_evict(call.query, None)
        else:
            new, self._new = self._new, None
            result = self._attend_in_chunks(call, *new), None
        if call.query.shape[2] == self.seen:
            self.state.slots.own_memory()
        self.token_mask = None
        return result

    def _attend_equal(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        m, n = call.query.shape[2], call.key.shape[2]
        # transformers' mask is not used: it is one for all layers, and it may be skipped where its `is_causal` would
        # align the wrong corner; sdpa is causal by itself where nothing is stored
        is_causal = m == n and call.implementation == "sdpa"
        call.mask = None if is_causal else causal_mask(m, n, call.query)
        return call.run()

    def _attend_otherwise(self, call: AttentionCall, query: Tensor, token_mask: Tensor | None) -> Tensor | None:
        """Attention of queries that select what they read, or that meet a state of evicted pairs; None: of others.

        In the first forward every query reads all slots.
        """
        state, dropout = self.state, call.kwargs.get("dropout", 0.0)
        if not state.config.reads_all and self.seen > call.query.shape[2]:
            return state.selection.attend(query, state.slots, call.scaling, self.seen, token_mask, dropout)
        if not state.tier.absorbs:
            return None
        if token_mask is None and reads_in_place(query, dropout):
            return attend_kernel(query, state.slots, call.scaling, absorbed=state.tier.absorbed(query))
        positions = state.newest_positions(query.shape[2], token_mask)
        return attend_absorbed(query, state.slots, call.scaling, state.tier.absorbed, positions, dropout)

    def _attend_in_chunks(self, call: AttentionCall, keys: Tensor, values: Tensor, hidden: Tensor | None) -> Tensor:
        outputs, padded = [], self.token_mask is not None
        for chunk in self._chunks(keys):
            if isinstance(chunk, slice):
                query, token_mask = call.query[:, :, chunk], None
                chunk_hidden = None if hidden is None else hidden[:, chunk]
                self.state.append(keys[:, :, chunk], values[:, :, chunk], None, chunk_hidden)
            else:
                query, token_mask, padded = call.query, chunk, True
                self.state.append(keys, values, token_mask, hidden)
            dropout = call.kwargs.get("dropout", 0.0)
            in_place = token_mask is None and reads_in_place(query, dropout) and self.state.stored_as_read
            if (output := self._attend_otherwise(call, query, token_mask)) is not None:
                outputs.append(output)
            elif in_place:
                outputs.append(attend_kernel(query, self.state.slots, call.scaling, self.state.tier.packed()))
            elif isinstance(slots := self.state.visible_slots(), RaggedSlots):
                outputs.append(attend_ragged(query, slots, call.scaling, token_mask, dropout))
            else:
                visible = replace(call, query=query, key=slots.data("keys"), value=slots.data("values"))
                outputs.append(self._attend_equal(visible)[0])
                self.state.slots.own_memory()
            self._observe_and_evict(query, token_mask)
        # chunks of padded rows are full-sized, and zero outside of their own queries
        return torch.stack(outputs).sum(0) if padded else torch.cat(outputs, 1)

    @torch.no_grad()
    def _observe_and_evict(self, query: Tensor, token_mask: Tensor | None) -> None:
        if self.state.newest is not None:  # decided at the end of the forward, and the policy sees no queries
            return
        self.state.observe(query, token_mask)
        rows_to_evict = self.state.rows_to_evict()
        if not any(rows_to_evict) or self.state.config.evicts_after_forward:
            return
        if self.cascade is not None and not self.state.fits_budget(rows_to_evict):
            self.cascade.cut(self.state, rows_to_evict)
        else:
            self.state.evict(rows_to_evict)

    def _chunks(self, keys: Tensor) -> list[PrefillChunk]:
        block_size, waiting = self.state.config.block_size, []
        if block_size is not None:
            tokens = zip(self.state.tokens_seen, self.state.evicted_at, strict=True)
            waiting = [seen - (at or 0) for seen, at in tokens] or [0] * len(keys)
        return prefill_chunks(block_size, waiting, keys.shape[2], self.token_mask)

    @_disable_dynamo
    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Keys that the next forward sees, and the offset that puts the newest at their true position."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        stored = self.state.slots.longest
        return stored + new, self.seen - stored

    @_disable_dynamo
    def get_seq_length(self) -> int:
        """Tokens seen, from which models count the position of the next one."""
        return self.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length

    # copies and batches

    def fork(self, config: CacheConfig) -> EvictingLayer:
        """An independent copy with other settings; see :meth:`LayerState.fork`."""
        twin = EvictingLayer(self.state.index, self.state.ordinal, config)
        twin.state, twin.seen = self.state.fork(config), self.seen
        if self.is_initialized:
            twin.lazy_initialization(self.state.slots.buffers["keys"])
        return twin

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch, `beam_idx [batch]`."""
        self.state.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices [rows]` of the batch."""
        self.state.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self.state.select_rows(torch.arange(len(self.state.tokens_seen)).repeat_interleave(repeats))

    def remove_newest(self, count: int) -> None:
        """Forget the newest `count` tokens, as many as `state.removable` at most."""
        self.state.remove_newest(count)
        self.seen -= count

    def activate_past_recording(self) -> None:
        """Drafts come: keep what is needed to take them back."""
        self.state.record_past = True


def prefill_chunks(
    block_size: int | None, waiting: Sequence[int], m: int, token_mask: Tensor | None
) -> list[PrefillChunk]:
    """Which of a forward's m columns are taken in at a time: all, or blocks after each of which the layer evicts.

    Args:
        block_size: real tokens between two evictions inside a forward, each of which ends a chunk; None: no such ones.
        waiting: per row, real tokens since the last eviction; not used without blocks.
        m: columns of the forward.
        token_mask: `[batch, m]` bool on the CPU, which of them are tokens and not padding; None means all.

    Returns:
        Slices of columns where all rows agree, else bool `[batch, m]` on the CPU: every row's blocks begin at its own
        tokens, so a padded row is read as it would be alone.
    """
    if block_size is None:
        return [slice(0, m) if token_mask is None else token_mask]
    if token_mask is None and len(set(waiting)) == 1:
        ends = [*range(block_size - waiting[0], m, block_size), m]
        return [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
    real = torch.ones(len(waiting), m, dtype=torch.bool) if token_mask is None else token_mask
    block = (torch.tensor(waiting)[:, None] + real.cumsum(1) - 1) // block_size
    chunks = [real & (block == k) for k in range(int(block.max()) + 1)]
    return [chunk for chunk in chunks if bool(chunk.any())]


def copy_layer(layer: Any) -> Any:
    """An independent copy of one of transformers' own layers."""
    twin = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            setattr(twin, name, value.clone())
    return twin
