"""Evicted pairs stay visible in 2, 4 or 8 bits per number.

Source: MiKV, "No Token Left Behind" (arXiv 2402.18096): what is evicted is kept at low precision, one way. Differs
from the paper in: any policy evicts; survivors keep the model's own precision; the group size is a setting (the paper
takes half a head). The balancer of a head is fixed when it first evicts, from all queries and cached keys until then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.errors import UserError
from kv_gym.live.ragged import RaggedSlots
from kv_gym.live.slots import EqualSlots
from kv_gym.live.tiers.quantiser import dequantise, quantise
from kv_gym.live.tiers.tier import LayerTier, Leaving, Tier, all_of, picked

BITS = (2, 4, 8)
GROUP = 32


@dataclass(frozen=True)
class LowPrecision(Tier):
    """Evicted pairs are quantised and go on taking part in attention; they never return to full precision.

    Policies score, count and observe the full-precision slots alone, with a softmax over these: they choose as if
    evicted pairs were dropped. Every forward brings the whole tier back to the model's precision, one layer at a
    time: that saves memory and not time (on a CPU a step takes longer than with the full cache).

    Attributes:
        bits: per number, 2, 4 or 8.
        group: channels that share a scale and a zero; at most the head's size, which it must divide.
        balanced: MiKV's channel balancer: keys are multiplied by √(max|q| / max|k|) of their channel before they are
            rounded and divided after, so that channels which queries weigh most are rounded least.

    Raises:
        UserError: other bits, or a group below 1.
    """

    bits: int = 4
    group: int = GROUP
    balanced: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UserError(f"evicted pairs cannot be kept in {self.bits} bits; expected 2, 4 or 8")
        if self.group < 1:
            raise UserError(f"a group of {self.group} channels cannot share a scale; expected a number from 1")

    @property
    def name(self) -> str:
        """Such as ``bits:2`` or ``bits:4:balanced``."""
        return f"bits:{self.bits}" + (":balanced" if self.balanced else "")

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

    def begin(self) -> LayerTier:
        return QuantisedLayer(self)

    def after(self, before: LayerTier, empty: bool) -> LayerTier:
        reach = before.reach if isinstance(before, QuantisedLayer) else None
        begun = super().after(before, empty or reach is not None)
        if self.balanced and reach is not None and isinstance(begun, QuantisedLayer):
            begun.reach = reach.clone()
        return begun

    def nbytes(self, d: int) -> int:
        """Bytes that one evicted pair takes, key and value of `d` channels each."""
        return 2 * (d * self.bits // 8 + d // min(self.group, d) * 2 * 2)


class QuantisedLayer(LayerTier):
    """The evicted pairs of one layer: packed codes and float16 grids of keys and values.

    Attributes:
        settings: bits and groups.
        reach: `[batch, kv_heads, d]`, largest size of each query channel so far; only with a balancer.
        balance: `[batch, kv_heads, d]`, what keys are multiplied by; 0 where a head has evicted nothing yet.
    """

    def __init__(self, settings: LowPrecision):
        self.settings = settings
        self.held: EqualSlots | RaggedSlots | None = None
        self.reach: Tensor | None = None
        self.balance: Tensor | None = None
        self._heads = 0

    def observe(self, query: Tensor, fresh: Tensor | None) -> None:
        if not self.settings.balanced:
            return
        sizes = query.detach().abs()
        if fresh is not None:
            sizes = sizes.masked_fill(~fresh.to(query.device)[:, None, :, None], 0)
        # by query head here: how many KV heads there are is known when pairs are evicted
        largest = sizes.amax(2)
        self.reach = largest if self.reach is None else torch.maximum(self.reach, largest)

    def take(self, leaving: Leaving) -> None:
        keys, values = picked(leaving, leaving.keys, leaving.values)
        group = min(self.settings.group, keys.shape[-1])
        if self.settings.balanced:
            self._fix_balance(leaving)
            assert self.balance is not None
            keys = keys * self.balance[:, :, None]
        new = {}
        for name, numbers in (("keys", keys), ("values", values)):
            new[f"{name}_codes"], new[f"{name}_grid"] = quantise(numbers, self.settings.bits, group)
        self.held = leaving.add_to(self.held, new)

    def _fix_balance(self, leaving: Leaving) -> None:
        assert self.reach is not None
        reach = self.reach.unflatten(1, (leaving.keys.shape[1], -1)).amax(2)
        largest = leaving.keys.abs().masked_fill(~leaving.valid[..., None], 0).amax(2)
        # a channel that is zero in all keys, or in all queries, needs no balance
        balance = torch.where((reach > 0) & (largest > 0), (reach / largest).sqrt(), torch.ones_like(reach))
        first = leaving.gone.any(2)[..., None]
        if self.balance is None:
            self.balance = torch.zeros_like(balance)
        self.balance = torch.where(first & (self.balance == 0), balance, self.balance)

    def visible(self, dtype: torch.dtype) -> EqualSlots | RaggedSlots | None:
        if self.held is None:
            return None
        bits = self.settings.bits
        if isinstance(self.held, EqualSlots):
            out = EqualSlots()
            out.length = self.held.length
            out.buffers = {
                name: dequantise(self.held[f"{name}_codes"], self.held[f"{name}_grid"], bits, dtype)
                for name in ("keys", "values")
            }
            if self.balance is not None:
                out.buffers["keys"] /= self._divisor()[:, :, None].to(dtype)
            return out
        stored = self.held.buffers
        flat = {
            name: dequantise(stored[f"{name}_codes"], stored[f"{name}_grid"], bits, dtype)
            for name in ("keys", "values")
        }
        if self.balance is not None:
            capacities = self.held.capacities.flatten().to(self.balance.device)
            flat["keys"] /= self._divisor().flatten(0, 1).to(dtype).repeat_interleave(capacities, 0)
        return RaggedSlots(flat, self.held.lengths, self.held.capacities)

    def keys(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Keys alone, `[batch, kv_heads, longest, d]`, and which are real; None: none yet."""
        if self.held is None:
            return None
        filled, real = all_of(self.held)
        keys = dequantise(filled["keys_codes"], filled["keys_grid"], self.settings.bits, dtype)
        return keys if self.balance is None else keys / self._divisor()[:, :, None].to(dtype), real

    def _divisor(self) -> Tensor:
        assert self.balance is not None
        return self.balance.masked_fill(self.balance == 0, 1)

    def tensors(self) -> Iterator[Tensor]:
        yield from super().tensors()
        yield from (tensor for tensor in (self.reach, self.balance) if tensor is not None)

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        if self.reach is not None:
            self.reach = self.reach.index_select(0, rows.to(self.reach.device))
        if self.balance is not None:
            self.balance = self.balance.index_select(0, rows.to(self.balance.device))

    def fork(self) -> QuantisedLayer:
        twin = QuantisedLayer(self.settings)
        if self.held is not None:
            twin.held = self.held.clone({name: name for name in self.held.buffers})
        twin.reach = None if self.reach is None else self.reach.clone()
        twin.balance = None if self.balance is None else self.balance.clone()
        return twin
