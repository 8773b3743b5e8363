"""CacheView: all that a policy may see of one layer of a KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Future:
    """Attention of later queries; only oracles need it, and only replay has it.

    Attributes:
        attention: `[batch, kv_heads, tokens, blocks, 2]` float32, mean attention per query of each block of
            continuation queries; the last axis is the maximum and the mean over the KV head's query heads.
        weights: `[blocks]` float32, sums to 1: every continuation weighs the same, its queries too.
        starts: `[blocks]` bool, the first block of each continuation; None: there is one continuation.
    """

    attention: Tensor
    weights: Tensor
    starts: Tensor | None = None

    def expected(self, reduction: str = "max") -> Tensor:
        """Expected utility `[batch, kv_heads, tokens]`: the mean over continuations of attention per query."""
        return self.attention[..., ("max", "mean").index(reduction)] @ self.weights

    @property
    def block_numbers(self) -> Tensor:
        """Number of each block within its continuation, from 0: `[blocks]` int64."""
        blocks = torch.arange(len(self.weights), device=self.weights.device)
        if self.starts is None:
            return blocks
        return blocks - (blocks * self.starts).cummax(0).values


@dataclass(frozen=True)
class CacheView:
    """One layer: B batch rows, H KV heads, Hq query heads, n slots, m recent queries, d head dimension.

    Attributes:
        keys: `[B, H, n, d]` after rotary embedding.
        values: `[B, H, n, d]`.
        positions: `[B, H, n]` int64, the original position of each slot's token, -1 where not valid.
        valid: `[B, H, n]` bool; invalid slots (padding) come last and never count.
        seen: `[B]` int64, real tokens seen so far, evicted ones included.
        budget: `[B, H]` int64, slots the head may keep (to read, never to set).
        layer: index of the layer in the model.
        scaling: factor on query-key products before the softmax (None: d ** -0.5).
        queries: `[B, Hq, m, d]` the last m queries after rotary embedding, or None if not declared as needed.
        probe_length: how many queries came after the newest slot's own: those of a probe prompt, whose keys are no
            slots and which sees all of them; 0: the last query is the newest token's.
        state: a stateful policy's own tensors, each `[B, H, n, ...]`.
        hidden: `[B, n, D]` hidden state of each slot's token, as the layer's attention received it, or None if not
            declared as needed. A live cache has those of new tokens and keeps none, so that only static policies,
            which score a token once, may need them.
        largest_budget: the largest of `budget`, or a bound of it, where the host knows one; None: it does not.
        output: `[Hq, d, D]` the output projection, the slice that each query head's output is multiplied by, or None
            if not declared as needed.
        future: only for oracles, only in replay.
        frequencies: `[pairs]` angle per position of the rotary embedding's pairs, for learned policies that read keys
            before it; they set it themselves.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    valid: Tensor
    seen: Tensor
    budget: Tensor
    layer: int = 0
    scaling: float | None = None
    queries: Tensor | None = None
    probe_length: int = 0
    state: Mapping[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None
    future: Future | None = None
    output: Tensor | None = None
    largest_budget: int | None = None
    frequencies: Tensor | None = None

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, budget: int | Tensor = 1, **fields) -> CacheView:
        """The view of a plain cache of `[B, H, n, d]` tensors, with nothing evicted and one budget for all heads."""
        batch, heads, n, _ = keys.shape
        positions = torch.arange(n, device=keys.device).expand(batch, heads, n)
        seen = torch.full((batch,), n, device=keys.device)
        per_head = budget if isinstance(budget, Tensor) else torch.full((), budget, device=keys.device)
        valid = torch.ones_like(positions, dtype=torch.bool)
        return cls(keys, values, positions, valid, seen, per_head.to(keys.device).expand(batch, heads), **fields)

    @property
    def age(self) -> Tensor:
        """`[B, H, n]` int64: how many tokens came after each slot's own (meaningless where not valid)."""
        return self.seen[:, None, None] - 1 - self.positions

    def with_budget(self, budget: Tensor) -> CacheView:
        """The same view for another budget `[B, H]`."""
        return replace(self, budget=budget, largest_budget=None)

    def protected(self, sinks: int, recent: int) -> Tensor:
        """Slots of the first `sinks` and last `recent` tokens, `[B, H, n]` bool; see :func:`protected_tokens`."""
        first, last = (count[..., None] for count in protected_tokens(self.budget, sinks, recent))
        return self.valid & ((self.positions < first) | (self.age < last))

    def query_positions(self, m: int) -> Tensor:
        """Positions of the last `m` queries, `[B, m]` int64; below zero where a row has fewer."""
        return self.seen[:, None] + self.probe_length - m + torch.arange(m, device=self.seen.device)

    def attention(self, window: int | None = None) -> Tensor:
        """Attention of the last `window` queries over every visible slot, `[B, Hq, window, n]` float32.

        Softmax over all valid slots at or before each query's position, so causal inside the window.

        Raises:
            ValueError: no queries, or fewer than `window`, are in the view.
        """
        if self.queries is None:
            raise ValueError("this view holds no queries: set `needs_queries` on the policy to be given them")
        m = self.queries.shape[2]
        window = min(m, m if window is None else window)
        query_positions = self.query_positions(window)
        return attention_weights(
            self.queries[:, :, m - window :], self.keys, query_positions, self.positions, self.valid, self.scaling
        )


def attention_weights(
    queries: Tensor, keys: Tensor, query_positions: Tensor, positions: Tensor, valid: Tensor, scaling: float | None
) -> Tensor:
    """Softmax attention `[B, Hq, m, n]` in float32 over valid slots at or before each query's position.

    Args:
        queries: `[B, Hq, m, d]`; Hq is a multiple of the number of KV heads H.
        keys: `[B, H, n, d]`.
        query_positions: `[B, m]` int64.
        positions: `[B, H, n]` int64 of the keys.
        valid: `[B, H, n]` bool.
        scaling: factor on the products; None means d ** -0.5.
    """
    batch, query_heads, m, d = queries.shape
    heads, n = keys.shape[1:3]
    exact = torch.promote_types(keys.dtype, torch.float32)  # 16-bit products would be rounded before the softmax
    grouped = queries.to(exact).reshape(batch, heads, -1, d)  # query heads of one KV head lie side by side
    scores = (grouped @ keys.to(exact).transpose(-1, -2)).float().reshape(batch, heads, -1, m, n)
    scores *= d**-0.5 if scaling is None else scaling
    visible = valid[:, :, None] & (positions[:, :, None] <= query_positions[:, None, :, None])  # [B, H, m, n]
    scores.masked_fill_(~visible[:, :, None], float("-inf"))
    # a query that sees nothing (padding) gets zeros; NaN of keys or queries stays, for whoever scores by it to refuse
    weights = scores.softmax(-1).masked_fill_(~visible.any(-1)[:, :, None, :, None], 0.0)
    return weights.reshape(batch, query_heads, m, n)


def group_mean(attention: Tensor, kv_heads: int) -> Tensor:
    """Mean over the query heads of each KV head: `[B, Hq, ...]` to `[B, H, ...]`."""
    return attention.unflatten(1, (kv_heads, -1)).mean(2)


def protected_tokens(budget: int | Tensor, sinks: int, recent: int) -> tuple:
    """How many of the first and of the last tokens a head protects: at most half its budget, recent ones give way.

    Args:
        budget: slots of a head, an int or an int64 tensor of any shape.
        sinks: first tokens to protect, where there is room.
        recent: last tokens to protect, where there is room.

    Returns:
        Two counts, ints or tensors shaped as `budget`.
    """
    half = budget // 2
    if isinstance(half, Tensor):
        kept_sinks = half.clamp(max=sinks)
        return kept_sinks, (half - kept_sinks).clamp(max=recent)
    first = min(half, sinks)
    return first, min(half - first, recent)
