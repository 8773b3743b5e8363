"""Attention over heads of different lengths: which of four forms reads the slots, and the forms themselves.

| form | serves | runs on |
|---|---|---|
| ``kernel`` | decoding steps | a GPU with Triton (:mod:`kv_gym.live.ragged_kernel`); low-precision tiers in place |
| ``varlen`` | several new tokens, in 16 bits | a GPU: ``torch.nn.attention.varlen`` |
| ``padded`` | everything but padding tokens | any device; copies all heads to the length of the longest |
| ``per_head`` | everything | any device; one product per head, so best on a CPU |

On a GPU the first one that serves the call is used, on a CPU the last one; :func:`ragged_backend` chooses another.
On a GPU, decoding steps of equal heads go through the kernel too: torch's own attention makes a new plan for every
length. The kernel ran on an H200 (``benchmarks/gpu/run.py``); tests run it in Triton's interpreter, and ``varlen``,
which no GPU has run yet (November 2026), against a slow stand-in.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from kv_gym.errors import UserError
from kv_gym.live.slots import EqualSlots, RaggedSlots, Slots
from kv_gym.live.tiers import PackedPairs

MOST_QUERIES = 256  # whose products with all slots are held at a time, where a state takes part
BACKENDS = ("kernel", "varlen", "padded", "per_head")
_chosen: ContextVar[str | None] = ContextVar("ragged_backend", default=None)


@contextmanager
def ragged_backend(name: str) -> Iterator[None]:
    """Read heads of different lengths in this form, one of `BACKENDS`, wherever it serves the call.

        with ragged_backend("padded"):
            model.generate(**inputs, past_key_values=cache)

    Raises:
        UserError: an unknown name, or a form that this installation lacks.
    """
    if name not in BACKENDS:
        raise UserError(f"ragged backend {name!r} is unknown; expected one of {', '.join(BACKENDS)}")
    if name == "kernel" and not _has_triton():
        raise UserError("the kernel needs Triton, which is not installed: pip install 'kv-gym[gpu]'")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


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
    backend = backend_for(query, token_mask, dropout)
    if backend == "kernel":
        return attend_kernel(query, slots, scaling)
    if backend == "varlen":
        return attend_varlen(query, slots, scaling)
    if backend == "padded":
        return attend_padded(query, slots, scaling, dropout)
    return attend_per_head(query, slots, scaling, token_mask, dropout)


def backend_for(query: Tensor, token_mask: Tensor | None = None, dropout: float = 0.0) -> str:
    """Which of `BACKENDS` reads the slots for the queries `[batch, query_heads, m, d]`."""
    if token_mask is not None:
        return "per_head"
    chosen, on_gpu = _chosen.get(), query.device.type == "cuda"
    plain = not dropout and not (query.requires_grad and torch.is_grad_enabled())
    serves = {
        "kernel": plain and query.shape[2] == 1 and _kernel_serves(query),
        "varlen": plain and on_gpu and query.dtype in (torch.float16, torch.bfloat16) and _has_varlen(),
        "padded": True,
        "per_head": True,
    }
    if chosen is not None and serves[chosen]:
        return chosen
    if query.device.type == "cpu":
        return "per_head"
    return next(name for name in BACKENDS if serves[name])


def reads_in_place(query: Tensor, dropout: float = 0.0) -> bool:
    """Whether the pairs of a low-precision tier are read as they are stored, and not brought back before."""
    return backend_for(query, None, dropout) == "kernel"


def _kernel_serves(query: Tensor) -> bool:
    """Whether the kernel runs here on queries `[..., d]`; on a CPU that takes Triton's interpreter."""
    runs = query.device.type == "cuda" or (_chosen.get() == "kernel" and os.environ.get("TRITON_INTERPRET") == "1")
    if not runs or not _has_triton():
        return False
    from kv_gym.live.ragged_kernel import DTYPES, LARGEST_HEAD

    return query.dtype in DTYPES and query.shape[-1] <= LARGEST_HEAD


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _has_varlen() -> bool:
    """Whether this torch reads a part of every sequence: 2.11 has the function without that."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"seqused_k", "enable_gqa", "window_size"} <= inspect.signature(varlen_attn).parameters.keys()


def attend_kernel(
    query: Tensor,
    slots: Slots,
    scaling: float,
    packed: PackedPairs | None = None,
    absorbed: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A decoding step over slots and what a tier holds of evicted pairs: in low precision, or in a state.

    Args:
        query: `[batch, query_heads, 1, d]`.
        slots: of any layout, with the new token's key and value appended.
        scaling: factor on the products.
        packed: pairs in low precision, which are read where they lie; None: there are none.
        absorbed: what :meth:`~kv_gym.live.tiers.LayerTier.absorbed` says of a state; None: there is none.

    Returns:
        `[batch, 1, query_heads, d]`.
    """
    from kv_gym.live.ragged_kernel import attend_rows

    batch, query_heads, _, d = query.shape
    (keys, values), starts, lengths, longest = _rows(slots, ("keys", "values"))
    queries = query.reshape(len(starts), -1, d)
    out, lse = attend_rows(queries, keys, values, starts, lengths, scaling, longest)
    if packed is not None:
        names = ("keys_codes", "values_codes", "keys_grid", "values_grid")
        (keys, values, *grids), starts, lengths, longest = _rows(packed.slots, names)
        if packed.balance is not None:  # keys are stored multiplied by it
            queries = queries / packed.balance.view(-1, 1, d).to(queries.dtype)
        out = _joined(
            out, lse, *attend_rows(queries, keys, values, starts, lengths, scaling, longest, packed.bits, *grids)
        )
    if absorbed is not None:
        logit, value = absorbed
        out = _joined(out, lse, value.view_as(out), logit.view_as(lse))
    return out.view(batch, 1, query_heads, d)


def _joined(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """Attention over two sets of pairs, of the outputs `[..., d]` and the log-sum-exp `[...]` of each alone.

    The newest token is in the first set, so its log-sum-exp is finite.
    """
    share = (other_lse - lse).sigmoid()[..., None]
    return (out * (1 - share) + other * share).to(out.dtype)


def _rows(slots: Slots, names: Sequence[str]) -> tuple[list[Tensor], Tensor, Tensor, int]:
    """Flat buffers `[slots, ...]`, where every row starts, how long it is, and how long one can be."""
    buffers = [slots.buffers[name] for name in names]
    device = buffers[0].device
    if isinstance(slots, EqualSlots):
        batch, heads, capacity = buffers[0].shape[:3]
        starts = torch.arange(batch * heads, device=device) * capacity
        lengths = torch.full((batch * heads,), slots.length, device=device)
        return [buffer.contiguous().flatten(0, 2) for buffer in buffers], starts, lengths, slots.length
    assert isinstance(slots, RaggedSlots)
    return buffers, slots.starts_on_device.flatten(), slots.lengths.flatten(), slots.reach


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
    lengths = slots.lengths.cpu()
    sizes = torch.stack((lengths, slots.capacities - lengths), -1).flatten().tolist()
    return slots.buffers[name].split(sizes)[::2]


def attend_varlen(query: Tensor, slots: RaggedSlots, scaling: float) -> Tensor:
    """One kernel for all heads: every (row, KV head) is a sequence of its own with a group of query heads."""
    from torch.nn.attention.varlen import varlen_attn

    batch, query_heads, m, d = query.shape
    heads = slots.lengths.shape[1]
    group = query_heads // heads
    device = query.device
    # [batch * kv heads * m, group, d]: the queries of one KV head lie together, in the order of time
    queries = query.view(batch, heads, group, m, d).transpose(2, 3).reshape(-1, group, d)
    sequences = batch * heads
    ends = torch.cat((slots.starts.flatten(), slots.capacities.sum()[None])).int()  # on the CPU
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
        seqused_k=slots.lengths.flatten().int(),
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


def attend_absorbed(
    query: Tensor,
    slots: Slots,
    scaling: float,
    absorbed: Callable[[Tensor], tuple[Tensor, Tensor]],
    positions: Tensor,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of the newest tokens over slots and a state of evicted pairs, in float32 or wider; any device.

    Args:
        query: `[batch, query_heads, m, d]`.
        slots: of any layout, with the new tokens' keys and values appended.
        scaling: factor on the products.
        absorbed: gives logit and value of the state for some of the queries.
        positions: `[batch, m]` int64 of the queries; below 0 where a query is padding.
        dropout: on the weights, when the model trains.

    Returns:
        `[batch, m, query_heads, d]`; zero where a query is padding.
    """
    filled, real = slots.padded(("keys", "values", "positions"))
    exact = torch.promote_types(query.dtype, torch.float32)
    keys, values = (filled[name].to(exact)[:, :, None] for name in ("keys", "values"))
    outputs = []
    for part, at in zip(query.split(MOST_QUERIES, 2), positions.split(MOST_QUERIES, 1), strict=True):
        logit, value = (tensor.unflatten(1, (real.shape[1], -1)) for tensor in absorbed(part))
        products = part.to(exact).unflatten(1, (real.shape[1], -1)) @ keys.transpose(-1, -2) * scaling
        visible = (real[:, :, None] & (filled["positions"][:, :, None] <= at[:, None, :, None]))[:, :, None]
        products = products.masked_fill(~visible, torch.finfo(exact).min)
        weights = F.dropout(torch.cat((products, logit[..., None]), -1).softmax(-1), dropout, dropout > 0)
        out = weights[..., :-1] @ values + weights[..., -1:] * value
        outputs.append(out.flatten(1, 2).masked_fill((at < 0)[:, None, :, None], 0))
    return torch.cat(outputs, 2).transpose(1, 2).to(query.dtype).contiguous()


def causal_mask(m: int, n: int, like: Tensor) -> Tensor | None:
    """The mask under which each of the last m of n tokens sees all up to itself, additive `[1, 1, m, n]`, or None."""
    if m == 1:
        return None
    hidden = torch.ones(m, n, dtype=torch.bool, device=like.device).triu(n - m + 1)
    mask = torch.zeros(m, n, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(hidden, torch.finfo(mask.dtype).min)[None, None]
