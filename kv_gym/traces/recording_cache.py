"""The cache that records: transformers' own layers, of which the full-attention ones observe their attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from kv_gym.cache_view import CacheView
from kv_gym.devices import to_device
from kv_gym.errors import UserError
from kv_gym.models.attention import AttentionCall, full_layers, observe_next_attention
from kv_gym.models.hidden_states import current_hidden_states
from kv_gym.models.second_reading import run_second_reading
from kv_gym.policies.base import StatefulPolicy
from kv_gym.policies.scoring.block_schedule import observe_blocks

LARGEST_PRODUCT = 1 << 25  # query-key products in memory at a time while attention to a sample is computed


class RecordingLayer(DynamicLayer):
    """A full-attention layer that records a context's queries and statistics, then what continuations attend to.

    Attributes:
        queries: `[B, Hq, m, d]`, the last m queries of the context.
        hidden: `[B, N, D]` hidden states of the recorded slots, where they are recorded, else None.
        scaling: factor on query-key products.
        stats: policy name -> its state after the context.
        future: `[B, H, N, K, 2]` float32, attention that the recorded slots received from the last continuation.
        rereading_policy: name of the policy whose state a second reading updates.
    """

    def __init__(
        self,
        layer: int,
        window: int,
        policies: Mapping[str, StatefulPolicy],
        records_hidden: bool = False,
        positions: Tensor | None = None,
    ):
        super().__init__()
        self.layer = layer
        self.window = window
        self.policies = policies
        self.records_hidden = records_hidden
        self.positions = positions
        self.block: int | None = None  # None while the context is read, then queries per block
        self.context_tokens = 0
        self.queries: Tensor | None = None
        self.hidden: Tensor | None = None
        self.scaling = 0.0
        self.stats: dict[str, dict[str, Tensor]] = {}
        self.future: Tensor | None = None
        self.rereading_policy = ""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store as usual, and ask to see the attention that follows."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        observe_next_attention(self)
        return keys, values

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """The model's own attention; what is recorded is computed beside it."""
        output = call.run()
        if self.block is None:
            self._record_context(call)
        elif self.positions is None:
            self.future = attention_received(call.query, call.key, self.context_tokens, call.scaling, self.block)
        else:
            positions = to_device(self.positions, call.key.device)
            self.future = attention_to_sample(
                call.query, call.key, positions, self.context_tokens, call.scaling, self.block
            )
        return output

    def view(self) -> CacheView:
        """The context's slots, with the state of the policy that asked for the second reading."""
        assert self.keys is not None and self.values is not None
        view = CacheView.of(self.keys, self.values, self.context_tokens, layer=self.layer, scaling=self.scaling)
        return replace(view, state=self.stats[self.rereading_policy])

    def write_state(self, state: Mapping[str, Tensor]) -> None:
        """Replace that state."""
        self.stats[self.rereading_policy] = dict(state)

    def of_slots(self, tensor: Tensor, axis: int = 2) -> Tensor:
        """The recorded slots of a tensor with one entry per context token: all, or those at `positions`."""
        if self.positions is None:
            return tensor
        return tensor.index_select(axis, to_device(self.positions, tensor.device))

    def _record_context(self, call: AttentionCall) -> None:
        n = call.key.shape[2]
        self.context_tokens, self.scaling = n, call.scaling
        self.queries = call.query[:, :, max(0, n - self.window) :].clone()
        self.hidden = self.of_slots(current_hidden_states(self.layer), 1) if self.records_hidden else None
        if not self.policies:
            return
        view = CacheView.of(call.key, call.value, budget=n, layer=self.layer, scaling=call.scaling)
        for name, policy in self.policies.items():
            self.stats[name] = observe_blocks(policy, view, call.query, policy.initial_state(view), newest_last=True)


class RecordingCache(Cache):
    """A model's cache for one context, from which several continuations may start.

    Args:
        model: a transformers decoder.
        window: how many of the context's last queries to keep.
        policies: policies with memory, by name, whose statistics to take over the context.
        hidden: record the hidden states of the context (:mod:`kv_gym.models.hidden_states`).
        positions: `[N]` int64, the context tokens to record, ascending; None: all of them.
    """

    def __init__(
        self,
        model,
        window: int,
        policies: Mapping[str, StatefulPolicy],
        hidden: bool = False,
        positions: Tensor | None = None,
    ):
        config = model.config.get_text_config()
        layers = DynamicCache(config=config).layers
        full = set(full_layers(config))
        super().__init__(
            layers=[
                RecordingLayer(i, window, policies, hidden, positions) if i in full else layer
                for i, layer in enumerate(layers)
            ]
        )

    @property
    def recorded(self) -> list[RecordingLayer]:
        """The full-attention layers.

        Raises:
            UserError: one of them was never used, or they differ in shape.
        """
        recorded = [layer for layer in self.layers if isinstance(layer, RecordingLayer)]
        shapes = set()
        for layer in recorded:
            if layer.queries is None or layer.keys is None:
                raise UserError(f"layer {layer.layer} of the model caches nothing of its own, so it cannot be recorded")
            shapes.add((tuple(layer.keys.shape), tuple(layer.queries.shape)))
        if len(shapes) > 1:
            raise UserError("the model's full-attention layers differ in heads or sizes, and traces hold one size")
        return recorded

    @property
    def futures(self) -> list[Tensor]:
        """Attention that each full-attention layer's context received from the last continuation.

        Each is `[B, H, N, K, 2]` float32, see :func:`attention_received`.
        """
        return [layer.future for layer in self.recorded if layer.future is not None]

    def run_second_readings(self, model, ids: Tensor) -> None:
        """Take the statistics of the policies that ask for a second reading of the context `ids [1, n]`."""
        layers = {layer.layer: layer for layer in self.recorded}
        for name, policy in self.recorded[0].policies.items():
            if policy.repetition is not None:
                for layer in layers.values():
                    layer.rereading_policy = name
                text = torch.stack((ids, torch.arange(ids.shape[1], device=ids.device)[None]), -1)
                run_second_reading(model, policy, text, layers, self.layers, ids.shape[1], padded=False)

    @contextmanager
    def continuation(self, rows: int, block: int) -> Iterator[None]:
        """Let `rows` continuations start from the context; afterwards the context is cached as before.

        Args:
            rows: batch size of the continuation.
            block: its queries per block of `future`.
        """
        attributes_before = [dict(vars(layer)) for layer in self.layers]
        try:
            for layer in self.layers:
                for name in ("keys", "values"):  # expanded, not copied: the next `update` makes new tensors anyway
                    if isinstance(stored := getattr(layer, name, None), Tensor):
                        setattr(layer, name, stored.expand(rows, -1, -1, -1))
                if isinstance(layer, RecordingLayer):
                    layer.block = block
            yield
        finally:
            for layer, attributes in zip(self.layers, attributes_before, strict=True):
                vars(layer).update(attributes)


def attention_received(queries: Tensor, keys: Tensor, context: int, scaling: float, block: int) -> Tensor:
    """Attention that each context slot received from a continuation: `[B, H, context, K, 2]` float32.

    The softmax is over all the keys that a query sees, those of earlier continuation tokens included. Attention is
    summed over the queries of each block; the last axis is the maximum (taken query by query) and the mean over the
    KV head's query heads. Memory: one block's attention.

    Args:
        queries: `[B, Hq, c, d]`, those of the last c positions.
        keys: `[B, H, context + c, d]`.
        context: number of context slots.
        scaling: factor on the products.
        block: queries per block, K = ceil(c / block).
    """
    batch, heads, _, d = keys.shape
    c = queries.shape[2]
    grouped = (queries.float() * scaling).unflatten(1, (heads, -1))  # [B, H, g, c, d]
    transposed = keys.float().transpose(-1, -2)
    blocks: list[Tensor] = []
    for start in range(0, c, block):
        stop = min(start + block, c)
        m, visible = stop - start, context + stop
        rows = grouped[:, :, :, start:stop].reshape(batch, heads, -1, d)
        scores = (rows @ transposed[..., :visible]).unflatten(2, (-1, m))  # [B, H, g, m, visible]
        later = torch.ones(m, m, dtype=torch.bool, device=keys.device).triu(1)
        scores[..., visible - m :].masked_fill_(later, float("-inf"))
        weights = scores.softmax(-1)[..., :context]
        blocks.append(torch.stack([weights.amax(2).sum(2), weights.mean(2).sum(2)], -1))
    return torch.stack(blocks, 3)


def attention_to_sample(
    queries: Tensor, keys: Tensor, positions: Tensor, context: int, scaling: float, block: int
) -> Tensor:  # fmt: skip
    """What :func:`attention_received` gives at some context slots alone: `[B, H, N, K, 2]` float32.

    The products with all keys are needed only for the logarithm of each query's softmax denominator, and are summed in
    chunks of keys. Memory: :data:`LARGEST_PRODUCT` numbers, whatever the number of queries and keys.

    Args:
        queries: `[B, Hq, c, d]`, those of the last c positions.
        keys: `[B, H, context + c, d]`.
        positions: `[N]` int64, the context slots.
        context: number of context slots.
        scaling: factor on the products.
        block: queries per block, K = ceil(c / block).
    """
    batch, heads = keys.shape[:2]
    query_heads, c = queries.shape[1:3]
    grouped = (queries.float() * scaling).unflatten(1, (heads, -1))  # [B, H, g, c, d]
    sample = keys.index_select(2, positions).float().transpose(-1, -2)
    at_once = block * max(1, LARGEST_PRODUCT // (batch * query_heads * len(positions) * block))
    blocks: list[Tensor] = []
    for start in range(0, c, at_once):
        part = grouped[:, :, :, start : start + at_once]
        denominator = _log_denominator(part, keys[:, :, : context + start + part.shape[3]])
        weights = (part.flatten(2, 3) @ sample).unflatten(2, part.shape[2:4]).sub_(denominator[..., None]).exp_()
        received = torch.stack([weights.amax(2), weights.mean(2)], -1)  # [B, H, m, N, 2]
        whole = pad(received, (0, 0, 0, 0, 0, -received.shape[2] % block))
        blocks.append(whole.unflatten(2, (-1, block)).sum(3))
    return torch.cat(blocks, 2).transpose(2, 3)


def _log_denominator(grouped: Tensor, keys: Tensor) -> Tensor:
    """Logarithm of the sum of exponentials over all keys that each query sees, `[B, H, g, m]`.

    Args:
        grouped: `[B, H, g, m, d]` float32, scaled queries of the last m positions.
        keys: `[B, H, n, d]`.
    """
    m, n = grouped.shape[3], keys.shape[2]
    rows = grouped.flatten(2, 3)
    size = max(1, LARGEST_PRODUCT // rows[..., 0].numel())
    last_seen = torch.arange(n - m, n, device=keys.device)[:, None]
    total: Tensor | None = None
    for start in range(0, n, size):
        stop = min(start + size, n)
        scores = (rows @ keys[:, :, start:stop].float().transpose(-1, -2)).unflatten(2, grouped.shape[2:4])
        if stop > n - m + 1:
            later = torch.arange(start, stop, device=keys.device) > last_seen
            scores.masked_fill_(later, float("-inf"))
        more = scores.logsumexp(-1)
        total = more if total is None else torch.logaddexp(total, more)
    assert total is not None
    return total
