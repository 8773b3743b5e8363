"""The second reading: a model repeats the context that it has cached, and a policy observes the attention.

Recordings and live caches run it by one function, so that both find the same statistics. The cache that the model is
given stores nothing of the repetition: every layer attends to what is cached and to the chunk that is being repeated.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kv_gym.cache_view import CacheView, attention_weights
from kv_gym.devices import to_device
from kv_gym.errors import UserError
from kv_gym.models.attention import AttentionCall, output_projection
from kv_gym.models.cache_name import with_cache
from kv_gym.models.context_repetition import QUERY_BLOCK, ContextRepetition, RereadingPolicy
from kv_gym.models.hidden_states import attach_hidden_state_hooks, current_hidden_states, remove_hidden_state_hooks
from kv_gym.models.storeless_layer import StorelessLayer


class CachedLayer(Protocol):
    """A full-attention layer that has cached the context."""

    def view(self) -> CacheView:
        """Its slots, with the policy's state."""

    def write_state(self, state: Mapping[str, Tensor]) -> None:
        """Replace the policy's state."""


@torch.no_grad()
def run_second_reading(
    model,
    policy: RereadingPolicy,
    text: Tensor,
    cached: Mapping[int, CachedLayer],
    layers: Sequence[Any],
    columns: int,
    padded: bool = True,
) -> None:
    """Have a model repeat the last tokens that it has cached, and update the policy's state by the attention.

    Time: a forward over the tokens. Memory: one layer's keys and values once more, and a chunk's activations.

    Args:
        model: the model, attached (see :func:`kv_gym.models.attention.attach`).
        policy: one with a `repetition`.
        text: `[batch, tokens, 2]` int64: the tokens to repeat, the last real ones of each row, and the positions that
            the model gave them; -1: padding.
        cached: the full-attention layers, by their index in the model.
        layers: all layers of the cache; those with sliding windows are read, and left as they are.
        columns: tokens seen, padding included.
        padded: whether some of `text` is padding; an accelerator is then waited for.

    Raises:
        UserError: rows with padding in a model with sliding-window layers, whose windows hold the padding.
    """
    repetition = policy.repetition
    assert repetition is not None
    padded = padded and bool((text < 0).any())
    if padded and len(cached) < len(layers):
        raise UserError(
            f"policy {policy.name!r} reads the context again, which is not supported for padded batches of a "
            "model with sliding-window layers: give the rows one at a time"
        )
    following = text[..., 1].amax(1) + 1
    for ids, first, last, counts in repetition.chunks(text[..., 0], _beginning(model), padded):
        seen = next(iter(cached.values())).view().seen
        repeated = (seen - counts + first)[:, None], (seen - counts + last)[:, None]
        chunk_layers: list[Any] = [copy.copy(layer) for layer in layers]
        for i, layer in cached.items():
            chunk_layers[i] = _RereadingLayer(i, layer, policy, repetition, ids >= 0, repeated, columns)
        positions = following[:, None] + torch.arange(ids.shape[1], device=ids.device)
        if repetition.projected:
            attach_hidden_state_hooks(model)
        try:
            cache = Cache(layers=chunk_layers)
            model.base_model(input_ids=ids.clamp(min=0), position_ids=positions, **with_cache(cache), use_cache=True)
        finally:
            if repetition.projected:
                remove_hidden_state_hooks(model)


def _beginning(model) -> tuple[int, ...]:
    token = getattr(model.config.get_text_config(), "bos_token_id", None)
    return (token,) if isinstance(token, int) else ()


class ReadOnlyLayer(StorelessLayer):
    """A full-attention layer whose slots a forward attends to, and which stores nothing of that forward."""

    def __init__(self, cached: CachedLayer, columns: int):
        super().__init__()
        self._cached, self._columns = cached, columns
        self._slots = cached.view().positions.shape[2]

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Length and offset of a mask that :meth:`attend` replaces."""
        length = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self._slots + length, self._columns - self._slots

    def get_seq_length(self) -> int:
        """Tokens seen before the forward."""
        return self._columns


class _RereadingLayer(ReadOnlyLayer):
    """A full-attention layer while one chunk is repeated."""

    def __init__(
        self,
        index: int,
        cached: CachedLayer,
        policy: RereadingPolicy,
        repetition: ContextRepetition,
        real: Tensor,
        repeated: tuple[Tensor, Tensor],
        columns: int,
    ):
        super().__init__(cached, columns)
        self._index, self._policy, self._repetition = index, policy, repetition
        self._real, self._repeated = real, repeated

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Attention over cached and new slots; the policy is shown what the chunk's cached tokens receive."""
        view = replace(self._cached.view(), queries=None)
        heads, n = view.positions.shape[1:]
        m = call.query.shape[2]
        # this layer's device: a model may lie on several
        real, first, last = (to_device(tensor, call.query.device) for tensor in (self._real, *self._repeated))
        projected = self._repetition.projected
        if projected:
            view = replace(view, output=output_projection(call.module, call.query.shape[1], call.query.shape[3]))
        keys, values = torch.cat((view.keys, call.key), 2), torch.cat((view.values, call.value), 2)
        query_positions = view.seen[:, None] + torch.arange(m, device=keys.device)  # [B, m]
        positions = torch.cat((view.positions, query_positions[:, None].expand(-1, heads, -1)), 2)
        valid = torch.cat((view.valid, real[:, None].expand(-1, heads, -1)), 2)
        in_chunk = view.valid & (view.positions >= first[:, None]) & (view.positions < last[:, None])
        scored = valid.clone()
        scored[..., :n] &= in_chunk | (view.positions < self._repetition.sinks)
        outputs, state = [], dict(view.state)
        for start in range(0, m, QUERY_BLOCK):
            block = slice(start, min(start + QUERY_BLOCK, m))
            part = replace(
                call, query=call.query[:, :, block], key=keys, value=values,
                mask=visibility_mask(call.query, valid, positions, query_positions[:, block]),
            )  # fmt: skip
            outputs.append(part.run()[0])
            attention = attention_weights(
                call.query[:, :, block], keys, query_positions[:, block], positions, scored, call.scaling
            )[..., :n]  # fmt: skip
            shown = in_chunk.repeat_interleave(attention.shape[1] // heads, 1)[:, :, None] & real[:, None, block, None]
            hidden = current_hidden_states(self._index)[:, block] if projected else None
            state = self._policy.observe_again(view, attention.masked_fill_(~shown, 0.0), state, hidden)
        self._cached.write_state(state)
        return torch.cat(outputs, 1), None


def visibility_mask(like: Tensor, valid: Tensor, positions: Tensor, query_positions: Tensor) -> Tensor:
    """Additive `[batch, query_heads, m, n]`: which slots the queries at `query_positions [batch, m]` see."""
    visible = valid[:, :, None] & (positions[:, :, None] <= query_positions[:, None, :, None])
    mask = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
    mask.masked_fill_(~visible, torch.finfo(like.dtype).min)
    return mask.repeat_interleave(like.shape[1] // visible.shape[1], 1)
