"""One layer of an evicting cache: its slots, and what it does when the model attends to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kv_gym.attention import AttentionCall, hand_over
from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.live.trigger import Eviction
from kv_gym.policies import StatefulPolicy
from kv_gym.policies.observing import observe_blocks

LEAST_SLACK = 16


class Slots:
    """Keys, values and positions of the cached tokens: buffers `[batch, kv_heads, capacity, ...]`.

    A buffer that is full grows by an eighth of its slots, at least 16, so that a new token is written in place and
    not the whole cache copied. Until the first growth, and after every eviction, a buffer has no slack.
    """

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.length = 0

    def __getitem__(self, name: str) -> Tensor:
        """The filled part of a buffer, `[batch, kv_heads, length, ...]`; a view."""
        return self.buffers[name][:, :, : self.length]

    def append(self, **new: Tensor) -> None:
        """Add slots `[batch, kv_heads, new, ...]`; the first ones are held as they come, without a copy."""
        start = self.length
        self.length += next(iter(new.values())).shape[2]
        if start == 0:
            self.buffers = new
            return
        for name, tensor in new.items():
            if not self._writable(self.buffers[name]):
                self.buffers[name] = self._grown(self.buffers[name], start)
            self.buffers[name][:, :, start : self.length] = tensor

    def take(self, index: Tensor) -> None:
        """Keep only the slots `index [batch, kv_heads, kept]`, in new buffers: the old ones are freed."""
        self.buffers = {name: take(self[name], index) for name in self.buffers}
        self.length = index.shape[2]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every buffer by `change` of its filled part."""
        self.buffers = {name: change(self[name]) for name in self.buffers}

    def own(self) -> None:
        """Copy what shares its memory with other tensors, such as a slice of a fused projection."""
        for name, buffer in self.buffers.items():
            if buffer.untyped_storage().nbytes() != buffer.numel() * buffer.element_size():
                self.buffers[name] = buffer.clone(memory_format=torch.contiguous_format)

    def _writable(self, buffer: Tensor) -> bool:
        # a buffer made under torch.inference_mode() may not be written to outside it
        return buffer.shape[2] >= self.length and (not buffer.is_inference() or torch.is_inference_mode_enabled())

    def _grown(self, buffer: Tensor, filled: int) -> Tensor:
        capacity = self.length + max(LEAST_SLACK, self.length // 8)
        grown = buffer.new_empty(*buffer.shape[:2], capacity, *buffer.shape[3:])
        grown[:, :, :filled] = buffer[:, :, :filled]
        return grown


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Slots `index [batch, kv_heads, kept]` of a tensor `[batch, kv_heads, slots, ...]`, as a new tensor."""
    index = index.reshape(*index.shape, *[1] * (tensor.dim() - 3))
    return tensor.gather(2, index.expand(*index.shape[:3], *tensor.shape[3:]))


class EvictingLayer(CacheLayerMixin):
    """Keys and values of one full-attention layer, of which every KV head keeps its own tokens.

    No row is padded, so every slot is valid, every head holds as many, and all stored slots are older than the tokens
    of the forward under way. Slots stay sorted by position.

    Attributes:
        index: the layer's index in the model.
        eviction: what to do, shared with the other layers.
        slots: keys, values and positions.
        seen: tokens that came so far, evicted ones included.
        fired_at: `seen` when the trigger last fired, or None.
        queries: the last `[batch, query_heads, m, d]` queries that a watched policy needs, or None.
        states: state of each watched policy that has one, by its place among the watched.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, index: int, eviction: Eviction):
        # not CacheLayerMixin's: keys and values are properties here
        self.index = index
        self.eviction = eviction
        self.scaling: float | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.slots = Slots()
        self.seen = 0
        self.fired_at: int | None = None
        self.queries: Tensor | None = None
        self.states: dict[int, dict[str, Tensor]] = {}
        self.is_initialized = False

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """`[batch, kv_heads, stored, d]`, or None before the first forward."""
        return self.slots["keys"] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """`[batch, kv_heads, stored, d]`, or None before the first forward."""
        return self.slots["values"] if self.is_initialized else None

    # what the model calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Nothing is allocated before the first keys come."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Add the new tokens and return all that this forward may see: what is stored, and they.

        Raises:
            UserError: the batch is another than the stored one.
        """
        keys, values = key_states.detach(), value_states.detach()
        batch, heads, new, _ = keys.shape
        if self.is_initialized and batch != (held := self.slots["keys"].shape[0]):
            raise UserError(
                f"the cache holds a batch of {held} and was given one of {batch}: "
                "call batch_repeat_interleave or batch_select_indices first, or make a new cache"
            )
        self.lazy_initialization(keys)
        positions = torch.arange(self.seen, self.seen + new, device=keys.device).expand(batch, heads, new)
        self.slots.append(keys=keys, values=values, positions=positions)
        self.seen += new
        hand_over(self)
        return self.slots["keys"], self.slots["values"]

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Attend as the model would, then observe the queries and evict if it is time."""
        self.scaling = call.scaling
        result = replace(call, mask=_causal_mask(call)).run()
        with torch.no_grad():
            self._retain(call.query)
            self._observe(call.query)
            if self.eviction.trigger.fires(self.seen, self.fired_at):
                self.evict()
            if call.query.shape[2] == self.seen:
                self.slots.own()
        return result

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Keys that the next forward sees, and the offset that puts the newest at their true position."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.slots.length + new, self.seen - self.slots.length

    def get_seq_length(self) -> int:
        """Tokens seen, from which models count the position of the next one."""
        return self.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length

    # eviction

    @torch.no_grad()
    def evict(self) -> None:
        """Keep what the policy would within the budget; the rest is freed."""
        self.fired_at = self.seen
        if self.eviction.room(self.seen) >= self.slots.length:
            return
        self.eviction.warn_of_length(self.seen)
        index = self.eviction.keep(self.view())
        self.slots.take(index)
        self.states = {
            place: {name: take(tensor, index) for name, tensor in state.items()} for place, state in self.states.items()
        }

    def view(self) -> CacheView:
        """The layer as the policy may see it now."""
        positions = self.slots["positions"]
        seen = torch.full((positions.shape[0],), self.seen, device=positions.device)
        wanted = self.eviction.policy.needs_queries
        return CacheView(
            keys=self.slots["keys"],
            values=self.slots["values"],
            positions=positions,
            valid=torch.ones_like(positions, dtype=torch.bool),
            seen=seen,
            budget=self.eviction.budgets(seen, positions.shape[1]),
            layer=self.index,
            scaling=self.scaling,
            queries=self.queries[:, :, -wanted:] if wanted and self.queries is not None else None,
            state=self.states.get(0, {}),  # the policy's own: it is the only one watched, unless it is a panel
        )

    def _retain(self, query: Tensor) -> None:
        if wanted := self.eviction.queries:
            known = query if self.queries is None else torch.cat((self.queries, query[:, :, -wanted:]), 2)
            self.queries = known[:, :, -wanted:].clone()  # a view would hold all of the forward's queries

    def _observe(self, query: Tensor) -> None:
        for place, policy in enumerate(self.eviction.watched):
            if isinstance(policy, StatefulPolicy):
                view = replace(self.view(), queries=None, state={})
                state = policy.initial_state(view)
                for name, before in self.states.get(place, {}).items():
                    state[name] = torch.cat((before, state[name][:, :, before.shape[2] :]), 2)
                self.states[place] = observe_blocks(policy, view, query, state)

    # copies and batches

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that the layer holds."""
        yield from self.slots.buffers.values()
        yield from (tensor for state in self.states.values() for tensor in state.values())
        if self.queries is not None:
            yield self.queries

    def fork(self, eviction: Eviction) -> EvictingLayer:
        """An independent copy that evicts by `eviction`; it takes along only what that one's policies need."""
        copy = EvictingLayer(self.index, eviction)
        copy.seen, copy.fired_at, copy.scaling = self.seen, self.fired_at, self.scaling
        if not self.is_initialized:
            return copy
        copy.lazy_initialization(self.slots["keys"])
        copy.slots.buffers, copy.slots.length = dict(self.slots.buffers), self.slots.length
        copy.states = {
            place: self.states[known]
            for place, policy in enumerate(eviction.watched)
            for known in self.states
            if self.eviction.watched[known] == policy
        }
        if self.queries is not None and eviction.queries:
            copy.queries = self.queries[:, :, -eviction.queries :]
        copy._map(torch.clone)
        return copy

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch, `beam_idx [batch]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices [rows]` of the batch."""
        self._map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to forget the newest tokens: what was evicted since they came would have to return.

        Raises:
            UserError: `tokens_to_remove` is not 0.
        """
        if tokens_to_remove:
            raise UserError(
                "an evicting cache cannot be cropped, because evicted tokens do not come back: "
                "fork() the cache before the tokens that you may want to take back"
            )

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.slots.map(change)
        self.states = {
            place: {name: change(tensor) for name, tensor in state.items()} for place, state in self.states.items()
        }
        if self.queries is not None:
            self.queries = change(self.queries)


def _causal_mask(call: AttentionCall) -> Tensor | None:
    """The mask under which every query sees all keys up to its own, additive `[1, 1, m, n]`, or None.

    All stored slots are older than the m new tokens, whose keys come last. The mask that transformers made is not
    used: it is one for all layers, and it may be skipped where its `is_causal` would align the wrong corner.
    """
    m, n = call.query.shape[2], call.key.shape[2]
    if m == 1 or (m == n and call.implementation == "sdpa"):  # sdpa is causal by itself
        return None
    hidden = torch.ones(m, n, dtype=torch.bool, device=call.query.device).triu(n - m + 1)
    mask = torch.zeros(m, n, dtype=call.query.dtype, device=call.query.device)
    return mask.masked_fill_(hidden, torch.finfo(mask.dtype).min)[None, None]
