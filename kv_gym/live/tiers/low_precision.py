"""Evicted pairs stay visible in 2, 4 or 8 bits per number.

Source: MiKV, "No Token Left Behind" (arXiv 2402.18096): what is evicted is kept at low precision, one way. Differs
from the paper in: any policy evicts; survivors keep the model's own precision; the group size is a setting (the paper
takes half a head), and there may be a bound on how many are kept. The balancer of a head is fixed when it first
evicts, from all queries and cached keys until then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.errors import UserError
from kv_gym.live.slots import EqualSlots, Slots
from kv_gym.live.tiers.base import EvictedPairs, LayerTier, PackedPairs, Tier
from kv_gym.live.tiers.quantiser import dequantise, quantise
from kv_gym.policies.base import Paper

BITS = (2, 4, 8)
GROUP = 32


@dataclass(frozen=True)
class LowPrecision(Tier):
    """Evicted pairs are quantised and go on taking part in attention; they never return to full precision.

    Policies score, count and observe the full-precision slots alone, with a softmax over these: they choose as if
    evicted pairs were dropped. On a GPU a decoding step reads the tier as it is stored (see
    :mod:`kv_gym.live.ragged_kernel`). Other forwards bring the whole tier back to the model's precision, one layer at
    a time: that saves memory and not time (on a CPU a step takes longer than with the full cache).

    The tier grows with the text unless `most` bounds it: see :meth:`nbytes` for what a pair takes.

    Attributes:
        bits: per number, 2, 4 or 8.
        group: channels that share a scale and a zero; at most the head's size, which it must divide.
        balanced: MiKV's channel balancer: keys are multiplied by √(max|q| / max|k|) of their channel before they are
            rounded and divided after, so that channels which queries weigh most are rounded least.
        most: how many evicted pairs a KV head keeps, those of the latest tokens; None: all of them.

    Raises:
        UserError: other bits, or a group or `most` below 1.
    """

    paper = Paper(
        "No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision Quantization",
        "2402.18096",
    )  # fmt: skip
    bits: int = 4
    group: int = GROUP
    balanced: bool = False
    most: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UserError(f"evicted pairs cannot be kept in {self.bits} bits; expected 2, 4 or 8")
        if self.group < 1:
            raise UserError(f"a group of {self.group} channels cannot share a scale; expected a number from 1")
        if self.most is not None and self.most < 1:
            raise UserError(
                f"a head cannot keep {self.most} evicted pairs; expected a number from 1, or evicted='drop'"
            )

    @property
    def name(self) -> str:
        """Such as ``bits:2``, ``bits:4:balanced`` or ``bits:4:most=512``."""
        bound = "" if self.most is None else f":most={self.most}"
        return f"bits:{self.bits}" + (":balanced" if self.balanced else "") + bound

    @property
    def sees_queries(self) -> bool:  # type: ignore[override]
        """Whether queries are watched: for the balancer."""
        return self.balanced

    def refuse_unfit(self, config) -> None:
        d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if d % (8 // self.bits) or d % min(self.group, d):
            raise UserError(
                f"the model's heads have {d} channels, which {self.bits} bits in groups of {self.group} do not divide: "
                "choose another LowPrecision(bits, group)"
            )

    def begin(self, ordinal: int = 0) -> LayerTier:
        return QuantisedLayer(self)

    def begin_after(self, previous: LayerTier, ordinal: int, empty: bool, complete: bool) -> LayerTier:
        largest = previous.largest_query if isinstance(previous, QuantisedLayer) else None
        layer = super().begin_after(previous, ordinal, empty or largest is not None, complete)
        if self.balanced and largest is not None and isinstance(layer, QuantisedLayer):
            layer.largest_query = largest.clone()
        return layer

    def nbytes(self, d: int) -> int:
        """Bytes that one evicted pair takes, key and value of `d` channels each."""
        position = 0 if self.most is None else 4
        return 2 * (d * self.bits // 8 + d // min(self.group, d) * 2 * 2) + position


class QuantisedLayer(LayerTier):
    """The evicted pairs of one layer: packed codes and float16 grids of keys and values, or of one of them.

    Attributes:
        settings: bits, groups and the bound.
        names: ``keys``, ``values`` or both.
        largest_query: `[batch, query_heads, d]`, largest size of each query channel so far; only with a balancer.
        balance: `[batch, kv_heads, d]`, what keys are multiplied by; 0 where a head has evicted nothing yet.
    """

    row_tensors = ("largest_query", "balance")

    def __init__(self, settings: LowPrecision, names: tuple[str, ...] = ("keys", "values")):
        self.settings, self.names = settings, names
        self.largest_query: Tensor | None = None
        self.balance: Tensor | None = None

    def observe(self, query: Tensor, token_mask: Tensor | None) -> None:
        if not self.settings.balanced:
            return
        sizes = query.detach().abs()
        if token_mask is not None:
            sizes = sizes.masked_fill(~token_mask.to(query.device)[:, None, :, None], 0)
        # by query head here: how many KV heads there are is known when pairs are evicted
        largest = sizes.amax(2)
        self.largest_query = largest if self.largest_query is None else torch.maximum(self.largest_query, largest)

    def take(self, pairs: EvictedPairs) -> None:
        group = min(self.settings.group, pairs.keys.shape[-1])
        balance = self._fixed_balance(pairs) if self.settings.balanced else None
        new = {}
        for name in self.names:
            (numbers,) = pairs.select(getattr(pairs, name))
            if name == "keys" and balance is not None:
                numbers = numbers * balance[:, :, None]
            new[f"{name}_codes"], new[f"{name}_grid"] = quantise(numbers, self.settings.bits, group)
        most = self.settings.most
        if most is None:
            self.stored = pairs.append_to(self.stored, new)
            return
        (positions,) = pairs.select(pairs.positions)
        new["positions"] = positions.int()
        self.stored = pairs.append_to(self.stored, new, most + pairs.most)
        if self.stored.longest > most:
            self.stored = self._latest(self.stored, most, pairs)

    def _latest(self, stored: Slots, most: int, pairs: EvictedPairs) -> Slots:
        """Keep the `most` latest tokens of every head."""
        if isinstance(stored, EqualSlots):
            stored.keep_top(stored.data("positions"), most, pairs.slack, pairs.trim)
            return stored
        padded, real = stored.padded(["positions"])
        positions = padded["positions"]
        return stored.keep(real & (positions >= positions.topk(most).values[..., -1:]), pairs.slack, pairs.trim)

    def _fixed_balance(self, pairs: EvictedPairs) -> Tensor:
        """The balance, fixed now for the heads that evict for the first time."""
        assert self.largest_query is not None
        queries = self.largest_query.unflatten(1, (pairs.keys.shape[1], -1)).amax(2)
        keys = pairs.keys.abs().masked_fill(~pairs.valid[..., None], 0).amax(2)
        # a channel that is zero in all keys, or in all queries, needs no balance
        balance = torch.where((queries > 0) & (keys > 0), (queries / keys).sqrt(), torch.ones_like(queries))
        before = torch.zeros_like(balance) if self.balance is None else self.balance
        evicts = pairs.evicted.any(2)[..., None]
        self.balance = torch.where(evicts & (before == 0), balance, before)
        return self.balance

    def visible(self, dtype: torch.dtype) -> Slots | None:
        if self.stored is None:
            return None
        return self.stored.with_data({name: self._dequantised(self.stored, name, dtype) for name in self.names})

    def packed(self) -> PackedPairs | None:
        if self.stored is None:
            return None
        balance = None if self.balance is None else self.balance.masked_fill(self.balance == 0, 1)
        return PackedPairs(self.stored, self.settings.bits, balance)

    def keys(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Keys alone, `[batch, kv_heads, longest, d]`, and which are real; None: none yet."""
        if self.stored is None:
            return None
        filled, real = self.stored.with_data({"keys": self._dequantised(self.stored, "keys", dtype)}).padded()
        return filled["keys"], real

    def _dequantised(self, stored: Slots, name: str, dtype: torch.dtype) -> Tensor:
        codes, grid = stored.data(f"{name}_codes"), stored.data(f"{name}_grid")
        numbers = dequantise(codes, grid, self.settings.bits, dtype)
        if name == "keys" and self.balance is not None:
            numbers /= stored.per_slot(self.balance.masked_fill(self.balance == 0, 1)).to(dtype)
        return numbers
