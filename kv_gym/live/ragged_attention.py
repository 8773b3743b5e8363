"""Attention over heads of different lengths: one product per head on a CPU, one variable-length kernel on a GPU.

The kernel's call has not been run on a GPU yet: tests check it against a slow stand-in for the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kv_gym.live.slots import RaggedSlots


def attend_ragged(
    query: Tensor, slots: RaggedSlots, scaling: float, token_mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Causal attention of the newest tokens over the slots of every head, of which their own are the last ones.

    Args:
        query: `[batch, query_heads, m, d]`.
        slots: with the new tokens' keys and values appended.
        scaling: factor on the products.
        token_mask: `[batch, m]` bool on the CPU, which queries are tokens and not padding; None means all.
        dropout: on the weights, when the model trains.

    Returns:
        `[batch, m, query_heads, d]`; zero where a query is padding.
    """
    if (
        query.device.type == "cuda"
        and token_mask is None
        and not dropout
        and query.dtype in (torch.float16, torch.bfloat16)
    ):
        return attend_varlen(query, slots, scaling)
    if query.device.type != "cpu" and token_mask is None:
        return attend_padded(query, slots, scaling, dropout)
    return attend_per_head(query, slots, scaling, token_mask, dropout)


def attend_per_head(
    query: Tensor, slots: RaggedSlots, scaling: float, token_mask: Tensor | None, dropout: float
) -> Tensor:
    """One product per head over exactly its slots: no byte of another head or of padding is read; any device."""
    batch, query_heads, m, d = query.shape
    heads = slots.lengths.shape[1]
    group = query_heads // heads
    all_keys, all_values = _per_head(slots, "keys"), _per_head(slots, "values")
    if m == 1 and token_mask is None and not dropout:
        return _decode_per_head(query, all_keys, all_values, scaling)
    out = query.new_zeros(batch, m, query_heads, d)
    for row in range(batch):
        columns: slice | Tensor = slice(None)
        new = m
        if token_mask is not None:
            columns, new = token_mask[row].nonzero()[:, 0].to(query.device), int(token_mask[row].sum())
        if new == 0:
            continue
        queries, output = query[row], out[row].transpose(0, 1)  # [query_heads, m, d], the second one a view
        for head in range(heads):
            keys, values = all_keys[row * heads + head], all_values[row * heads + head]
            query_group = slice(head * group, (head + 1) * group)
            output[query_group, columns] = F.scaled_dot_product_attention(
                queries[query_group, columns][None],
                keys.expand(1, group, -1, -1),
                values.expand(1, group, -1, -1),
                causal_mask(new, len(keys), query),
                dropout,
                scale=scaling,
            )[0]
    return out


def _decode_per_head(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scaling: float) -> Tensor:
    """A decoding step, `[batch, 1, query_heads, d]`: three operations a head, since each costs as much as its bytes."""
    batch, query_heads, _, d = query.shape
    queries = (query * scaling).view(len(keys), -1, d).unbind()
    exact = torch.promote_types(query.dtype, torch.float32)
    weights = [(group @ key.t()).to(exact).softmax(-1) for group, key in zip(queries, keys, strict=True)]
    outputs = [weight.to(query.dtype) @ value for weight, value in zip(weights, values, strict=True)]
    return torch.cat(outputs).view(batch, 1, query_heads, d)


def _per_head(slots: RaggedSlots, name: str) -> Sequence[Tensor]:
    """The slots of every (row, KV head) in turn, `[length, d]` each; views."""
    gaps = slots.capacities - slots.lengths
    sizes = torch.stack((slots.lengths, gaps), -1).flatten().tolist()
    return slots.buffers[name].split(sizes)[::2]


def attend_varlen(query: Tensor, slots: RaggedSlots, scaling: float) -> Tensor:
    """One kernel for all heads: every (row, KV head) is a sequence of its own with a group of query heads.

    Not run on a GPU yet.
    """
    from torch.nn.attention.varlen import varlen_attn

    batch, query_heads, m, d = query.shape
    heads = slots.lengths.shape[1]
    group = query_heads // heads
    device = query.device
    # [batch * kv heads * m, group, d]: the queries of one KV head lie together, in the order of time
    queries = query.view(batch, heads, group, m, d).transpose(2, 3).reshape(-1, group, d)
    sequences = batch * heads
    ends = torch.cat((slots.starts.flatten(), slots.capacities.sum()[None])).int()
    out = varlen_attn(
        queries,
        slots.buffers["keys"][:, None],
        slots.buffers["values"][:, None],
        torch.arange(sequences + 1, dtype=torch.int32, device=device) * m,
        ends.to(device, non_blocking=True),
        m,
        slots.longest,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=group > 1,
        seqused_k=slots.lengths.flatten().int().to(device, non_blocking=True),
    )
    assert isinstance(out, Tensor)  # nothing else was asked for
    return out.view(batch, heads, m, group, -1).transpose(1, 2).reshape(batch, m, query_heads, -1)


def attend_padded(query: Tensor, slots: RaggedSlots, scaling: float, dropout: float = 0.0) -> Tensor:
    """All heads padded to the longest, under a mask: reads the most memory, and runs anywhere."""
    query_heads, m = query.shape[1:3]
    heads = slots.lengths.shape[1]
    filled, real = slots.padded()
    offsets = torch.arange(real.shape[2], device=real.device)
    # the last m real slots are the new ones: query i sees all but the m - 1 - i slots at the end
    lengths = real.sum(-1)[..., None] - (m - 1) + torch.arange(m, device=real.device)
    visible = offsets < lengths[..., None]  # [batch, heads, m, longest]
    group = query_heads // heads
    out = F.scaled_dot_product_attention(
        query,
        filled["keys"].repeat_interleave(group, 1),
        filled["values"].repeat_interleave(group, 1),
        visible.repeat_interleave(group, 1),
        dropout,
        scale=scaling,
    )
    return out.transpose(1, 2).contiguous()


def causal_mask(m: int, n: int, like: Tensor) -> Tensor | None:
    """The mask under which each of the last m of n tokens sees all up to itself, additive `[1, 1, m, n]`, or None."""
    if m == 1:
        return None
    hidden = torch.ones(m, n, dtype=torch.bool, device=like.device).triu(n - m + 1)
    mask = torch.zeros(m, n, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(hidden, torch.finfo(mask.dtype).min)[None, None]
