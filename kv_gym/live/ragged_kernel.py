"""Decode attention over heads of different lengths on a GPU: a split-KV kernel in Triton, and one that merges.

A row is one KV head of one sequence. Its slots are one run of a flat buffer, and all query heads of the group read it
together, so that every key and value is loaded once. A program reads one chunk of a row; chunks have one size, so rows
of very different lengths keep a GPU evenly busy. Programs whose chunk lies behind the end of their row do nothing:
the grid follows from capacities, which the host knows, and lengths stay on the device. Where every row fits into one
chunk, it writes the result itself and nothing is merged.

Products, softmax and sums are in float32. The log-sum-exp of every query comes with its output, so that attention over
two sets of slots, such as full-precision ones and those of a low-precision tier, can be merged exactly.

Source: the split over keys and its merge are Flash-Decoding's (FlashAttention-2, arXiv 2307.08691, section 3); groups
of query heads in one program and runs of uneven length are common in serving engines. Its sizes are
those that were fastest on an H200 (``benchmarks/gpu/tune_kernel.py``). Tests run it in Triton's interpreter, where
bfloat16 and float16 are multiplied as float32.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD = 256
TILE_BYTES = 1 << 14  # of keys that a program multiplies at a time; a few such tiles fit the smallest shared memories
MIN_CHUNK = 128  # slots; with fewer, writing and merging partial results costs more than it gains
PROGRAMS = 528  # four on each multiprocessor of an H100 or H200: all run at once
WARPS, STAGES = 4, 2  # of a program: warps, and tiles under way from memory

_LOG2_E = tl.constexpr(1.4426950408889634)
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # as Triton reads it when it wraps the kernels below


@triton.jit
def _tile(numbers, grid, slots, real, channels, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Keys or values of some slots, `[slots, channels]`; zero where a slot is not real."""
    mask = real[:, None] & (channels[None, :] < D)
    if BITS == 0:
        tile = tl.load(numbers + slots[:, None] * D + channels[None, :], mask=mask, other=0.0)
    else:
        bit = channels * BITS
        codes = tl.load(numbers + slots[:, None] * (D * BITS // 8) + (bit // 8)[None, :], mask=mask, other=0)
        codes = (codes.to(tl.int32) >> (bit % 8)[None, :]) & ((1 << BITS) - 1)
        place = grid + (slots[:, None] * (D // GROUP) + (channels // GROUP)[None, :]) * 2
        scale = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        zero = tl.load(place + 1, mask=mask, other=0.0).to(tl.float32)
        tile = codes.to(tl.float32) * scale + zero
    return tile


@triton.jit(do_not_specialize=["chunk", "chunks"])
def _attend_chunk(
    query, keys, key_grid, values, value_grid, starts, lengths, out, lse, scaling, chunk, chunks,
    G: tl.constexpr, PADDED_G: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    TILE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, FLOAT32: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Attention of a row's queries over one chunk: output and log-sum-exp of the chunk alone."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + row)
    first = part * chunk
    last = tl.minimum(first + chunk, length)  # before `first` where the row has no such chunk: nothing is read
    start = tl.load(starts + row).to(tl.int64)
    heads, channels, offsets = tl.arange(0, PADDED_G), tl.arange(0, PADDED_D), tl.arange(0, TILE)
    mask = (heads[:, None] < G) & (channels[None, :] < D)
    q = tl.load(query + (row * G + heads[:, None]) * D + channels[None, :], mask=mask, other=0.0)
    dtype = tl.float32 if FLOAT32 else q.dtype
    q = q.to(dtype)
    highest = tl.full([PADDED_G], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_G], tl.float32)
    weighted = tl.zeros([PADDED_G, PADDED_D], tl.float32)
    for at in range(first, last, TILE):
        real = at + offsets < last
        slots = start + at + offsets
        k = _tile(keys, key_grid, slots, real, channels, D, BITS, GROUP).to(dtype)
        products = tl.dot(q, tl.trans(k), input_precision="ieee") * (scaling * _LOG2_E)
        products = tl.where(real[None, :], products, float("-inf"))
        higher = tl.maximum(highest, tl.max(products, 1))
        rescale, weights = tl.exp2(highest - higher), tl.exp2(products - higher[:, None])
        v = _tile(values, value_grid, slots, real, channels, D, BITS, GROUP).to(dtype)
        total = total * rescale + tl.sum(weights, 1)
        weighted = weighted * rescale[:, None] + tl.dot(weights.to(dtype), v, input_precision="ieee")
        highest = higher
    some = tl.where(total > 0, total, 1.0)
    index = (row * chunks + part) * G + heads
    # the merge does not read chunks that do not exist
    written = heads < (G if WHOLE else tl.where(first < length, G, 0))
    tl.store(lse + index, (highest + tl.log2(some)) / _LOG2_E, mask=written)
    weighted = (weighted / some[:, None]).to(out.dtype.element_ty)
    tl.store(out + index[:, None] * D + channels[None, :], weighted, mask=written[:, None] & (channels[None, :] < D))


@triton.jit(do_not_specialize=["chunk", "chunks"])
def _merge_chunks(
    part_out, part_lse, lengths, out, lse, chunk, chunks,
    G: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The results of a row's chunks as one, for one query head; chunks that do not exist are not read."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    used = tl.cdiv(tl.load(lengths + row), chunk)
    channels, offsets = tl.arange(0, PADDED_D), tl.arange(0, PARTS)
    highest, total = float("-inf"), 0.0
    weighted = tl.zeros([PADDED_D], tl.float32)
    for at in range(0, used, PARTS):
        real = at + offsets < used
        index = (row * chunks + at + offsets) * G + head
        of_part = tl.load(part_lse + index, mask=real, other=float("-inf"))
        higher = tl.maximum(highest, tl.max(of_part, 0))
        rescale, weights = tl.exp(highest - higher), tl.exp(of_part - higher)
        mask = real[:, None] & (channels[None, :] < D)
        parts = tl.load(part_out + index[:, None] * D + channels[None, :], mask=mask, other=0.0)
        total = total * rescale + tl.sum(weights, 0)
        weighted = weighted * rescale + tl.sum(parts * weights[:, None], 0)
        highest = higher
    some = tl.where(total > 0, total, 1.0)
    tl.store(lse + row * G + head, highest + tl.log(some))
    at = out + (row * G + head) * D + channels
    tl.store(at, (weighted / some).to(out.dtype.element_ty), mask=channels < D)


def attend_rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scaling: float,
    longest: int,
    bits: int = 0,
    key_grid: Tensor | None = None,
    value_grid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query per query head over the slots of its row.

    Called as it is, because an operator of torch's own would cost more time on the host than a short row on the device;
    on the ``meta`` device, only shapes come out.

    Args:
        query: `[rows, group, d]`, contiguous, of a type in `DTYPES`; d at most `LARGEST_HEAD`.
        keys, values: `[slots, d]`, contiguous and of the query's type; with `bits`, codes `[slots, d * bits / 8]`
            uint8 of :func:`~kv_gym.live.tiers.quantiser.quantise`.
        starts: `[rows]` int64, first slot of every row.
        lengths: `[rows]` int32 or int64, slots of every row, 0 included; slots beyond are never read.
        scaling: factor on the products.
        longest: no row has more slots; it may be a capacity.
        bits: 2, 4 or 8 for codes; 0 for numbers.
        key_grid, value_grid: with `bits`, `[slots, d / channels that share a scale, 2]` float16.

    Returns:
        Outputs `[rows, group, d]` of the query's type, zero for rows without slots, and log-sum-exps `[rows, group]`
        float32, minus infinity for those.
    """
    if query.is_meta:
        return _empty_results(query)
    rows, group, d = query.shape
    chunk = max(MIN_CHUNK, triton.cdiv(triton.cdiv(len(keys), PROGRAMS), 64) * 64)
    chunks = max(1, triton.cdiv(longest, chunk))
    out, lse = _empty_results(query)
    whole = chunks == 1
    part_out, part_lse = out, lse
    if not whole:
        part_out = query.new_empty(rows, chunks, group, d, dtype=torch.float32)
        part_lse = query.new_empty(rows, chunks, group, dtype=torch.float32)
    _attend_chunk[(rows, chunks)](
        query, keys, keys if key_grid is None else key_grid, values, values if value_grid is None else value_grid,
        starts, lengths, part_out, part_lse, scaling, chunk, chunks,
        FLOAT32=_INTERPRETED or query.dtype == torch.float32, num_warps=WARPS, num_stages=STAGES,
        **constants(group, d, query.element_size(), bits, 1 if key_grid is None else d // key_grid.shape[1], whole),
    )  # fmt: skip
    if not whole:
        parts = min(32, triton.next_power_of_2(chunks))
        _merge_chunks[(rows, group)](
            part_out,
            part_lse,
            lengths,
            out,
            lse,
            chunk,
            chunks,
            G=group,
            D=d,
            PADDED_D=triton.next_power_of_2(d),
            PARTS=parts,
        )
    return out, lse


def constants(group: int, d: int, itemsize: int, bits: int, shared: int, whole: bool) -> dict[str, int | bool]:
    """What one variant of the kernel is compiled for; products take 16 rows and columns at least.

    Args:
        group: query heads of a KV head.
        d: channels of a head.
        itemsize: bytes of a number of the query's type.
        bits: of stored numbers; 0: they have the query's type.
        shared: channels that share a scale, with `bits`.
        whole: every row fits into one chunk.
    """
    padded = max(16, triton.next_power_of_2(d))
    return {
        "G": group, "PADDED_G": max(16, triton.next_power_of_2(group)), "D": d, "PADDED_D": padded,
        "TILE": max(16, min(128, TILE_BYTES // (padded * itemsize))), "BITS": bits, "GROUP": shared, "WHOLE": whole,
    }  # fmt: skip


def _empty_results(query: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
