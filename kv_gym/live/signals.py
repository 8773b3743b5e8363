"""What a guard sees at one forward: of a layer's attention, and of the model's output."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Glance:
    """One layer right after its attention.

    Attributes:
        query: `[batch, query_heads, m, d]` of the new tokens; their last one counts.
        fresh: `[batch, m]` bool on the CPU, which of them are no padding; None means all.
        keys: `[batch, kv_heads, n, d]` in full precision, the new tokens' among them.
        positions: `[batch, kv_heads, n]` int64.
        real: `[batch, kv_heads, n]` bool.
        scaling: factor on the products.
        since: `[batch]` int64, tokens seen at the last cut.
        evicted: keys of evicted pairs `[batch, kv_heads, e, d]`, and which are real; None: not known.
    """

    query: Tensor
    fresh: Tensor | None
    keys: Tensor
    positions: Tensor
    real: Tensor
    scaling: float
    since: Tensor
    evicted: tuple[Tensor, Tensor] | None


def glance(signal: str, seen: Glance, shown: bool, before: Tensor | None) -> Tensor:
    """The signal of one layer, `[batch]` float32, mean over query heads.

    Args:
        signal: one of :data:`kv_gym.live.guard.ATTENTION`.
        seen: the layer.
        shown: evicted pairs take part in attention.
        before: `[batch]`, what stays for rows that have no new token.
    """
    query, asked = _newest(seen)
    products = _products(query, seen.keys, seen.real, seen.scaling)
    total = products.logsumexp(-1)
    evicted = None if seen.evicted is None else _products(query, *seen.evicted, seen.scaling)
    if evicted is not None and shown:
        total = torch.logaddexp(total, evicted.logsumexp(-1))
    if signal == "missing":
        value = torch.zeros_like(total) if evicted is None else _share(evicted.amax(-1), total, shown)
    elif signal == "tier":
        value = torch.zeros_like(total) if evicted is None else (evicted.logsumexp(-1) - total).exp()
    else:
        old = (seen.positions < seen.since[:, None, None]) & seen.real
        weights = (products - total[..., None]).exp()
        if signal == "new":
            value = weights.masked_fill((old | ~seen.real)[:, :, None], 0).sum(-1)
        else:
            value = 1 - weights.masked_fill(~(old & (seen.positions > 0))[:, :, None], 0).amax(-1)
    value = value.flatten(1).mean(1)
    if asked is None:
        return value
    return torch.where(asked, value, torch.full_like(value, math.nan) if before is None else before)


def of_output(signal: str, logits: Tensor, mean: Tensor | None) -> Tensor:
    """The signal of the model's output, `[batch]` float32.

    Args:
        signal: one of :data:`kv_gym.live.guard.OUTPUT`.
        logits: `[batch, vocabulary]` for the next token.
        mean: `[batch]`, entropies of the forwards before; None: there were none.
    """
    likelihood = logits.float().log_softmax(-1)
    if signal == "margin":
        first, second = likelihood.exp().topk(2).values.unbind(-1)
        return second - first
    entropy = -(likelihood.exp() * likelihood).sum(-1)
    if signal == "entropy":
        return entropy
    return torch.full_like(entropy, math.nan) if mean is None else entropy - mean


def _newest(seen: Glance) -> tuple[Tensor, Tensor | None]:
    """Each row's last query that is no padding `[batch, query_heads, d]`, and which rows have one."""
    if seen.fresh is None:
        return seen.query[:, :, -1], None
    m = seen.fresh.shape[1]
    last = (seen.fresh * torch.arange(1, m + 1)).amax(1)
    rows = torch.arange(len(last))
    device = seen.query.device
    return seen.query[rows.to(device), :, (last - 1).clamp(min=0).to(device)], (last > 0).to(device)


def _products(query: Tensor, keys: Tensor, real: Tensor, scaling: float) -> Tensor:
    """`[batch, kv_heads, group, n]` float32 (float64 for such a query), minus infinity where a slot is not real."""
    grouped = query.unflatten(1, (keys.shape[1], -1))
    products = (grouped @ keys.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)) * scaling
    return products.masked_fill(~real[:, :, None], -math.inf)


def _share(best: Tensor, total: Tensor, counted: bool) -> Tensor:
    """Weight of the best evicted key, which is in the total already or is added to it."""
    return (best - total).exp() if counted else (best - total).sigmoid()
