"""A tier with a recorder beside it: keys of evicted pairs are sketched for a guard, or pairs copied to the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.errors import UserError
from kv_gym.live.guard import Guard, LayerAttention, attention_signal, output_signal
from kv_gym.live.slots import Slots
from kv_gym.live.tiers.base import Drop, EvictedPairs, LayerTier, Tier, copy_optional, select_optional
from kv_gym.live.tiers.low_precision import LowPrecision, QuantisedLayer
from kv_gym.live.tiers.quantiser import dequantise, quantise


@dataclass(frozen=True)
class RecordingTier(Tier):
    """Another tier, with what a guard or :meth:`EvictingCache.restore` needs of evicted pairs beside it.

    Attributes:
        tier: what becomes of evicted pairs.
        guard: what is measured at every forward, or None.
        offload: whether evicted pairs are copied to the host.
    """

    tier: Tier
    guard: Guard | None = None
    offload: bool = False

    @property
    def name(self) -> str:
        """Such as ``drop, guarded by missing, offloaded``."""
        guarded = f", guarded by {self.guard.signal}" if self.guard else ""
        return self.tier.name + guarded + (", offloaded" if self.offload else "")

    @property
    def changes_keys(self) -> bool:  # type: ignore[override]
        """As the tier does."""
        return self.tier.changes_keys

    @property
    def sees_queries(self) -> bool:  # type: ignore[override]
        """As the tier does: what a guard measures is of the last query alone, and is not stored."""
        return self.tier.sees_queries

    @property
    def sketch_bits(self) -> int | None:
        """Bits in which evicted keys are kept for the guard alone, or None where none are."""
        if self.guard is None or self.guard.signal != "missing" or isinstance(self.tier, LowPrecision):
            return None
        return self.guard.bits

    def refuse_unfit(self, config) -> None:
        self.tier.refuse_unfit(config)
        if self.sketch_bits:
            LowPrecision(self.sketch_bits).refuse_unfit(config)

    def begin(self) -> LayerTier:
        return RecordingLayer(self, self.tier.begin())

    def begin_after(self, previous: LayerTier, ordinal: int, empty: bool, complete: bool) -> LayerTier:
        before = previous if isinstance(previous, RecordingLayer) else RecordingLayer(RecordingTier(Drop()), previous)
        if not complete and self.sketch_bits and self.guard is not None and self.guard.covers(ordinal):
            known = before.settings.guard is not None and before.settings.guard.covers(ordinal)
            if not known or before.settings.sketch_bits != self.sketch_bits:
                raise UserError(
                    f"signal {self.guard.signal!r} needs the keys of all that was evicted, and the cache did not "
                    "sketch them: fork with this guard before the first eviction"
                )
        same = isinstance(previous, RecordingLayer) and previous.settings.tier == self.tier
        inner = before.inner.fork() if same else self.tier.begin_after(before.inner, ordinal, empty, complete)
        return before.fork_into(self, inner)


class RecordingLayer(LayerTier):
    """One layer of a tier with a recorder.

    Attributes:
        inner: the tier's own.
        sketch: evicted keys for the guard, or None.
        host: copies of evicted pairs in the host's memory, or None.
        signal: `[batch]`, what the guard measured of this layer at the last forward; None or NaN: nothing yet.
        measured: whether the guard averages this layer; known from its first eviction on.
        entropies: `[batch, 2]`, sum and number of the output's entropies so far; layer 0 alone.
    """

    def __init__(self, settings: RecordingTier, inner: LayerTier):
        self.settings, self.inner = settings, inner
        self.sketch = KeySketch(settings.sketch_bits) if settings.sketch_bits else None
        self.host = HostCopies() if settings.offload else None
        self.measured = True
        self.signal: Tensor | None = None
        self.entropies: Tensor | None = None

    @property
    def drops(self) -> bool:  # type: ignore[override]
        """Whether nobody asks which pairs are evicted."""
        return self.inner.drops and self.sketch is None and self.host is None

    @property
    def stored(self) -> Slots | None:  # type: ignore[override]
        """What the tier stores."""
        return self.inner.stored

    def observe(self, query: Tensor, token_mask: Tensor | None) -> None:
        self.inner.observe(query, token_mask)

    def measure(
        self,
        query: Tensor,
        token_mask: Tensor | None,
        slots: Slots,
        scaling: float | None,
        evicted_at: Sequence[int | None],
    ) -> None:
        guard = self.settings.guard
        if guard is None or guard.reads_output or not self.measured or all(at is None for at in evicted_at):
            return
        visible = isinstance(self.inner, QuantisedLayer)
        source = self.inner if isinstance(self.inner, QuantisedLayer) else self.sketch
        evicted = None if source is None else source.keys(query.dtype)
        assert scaling is not None
        filled, real = slots.padded(("keys", "positions"))
        at = torch.tensor([at or 0 for at in evicted_at], device=query.device)
        layer = LayerAttention(
            query, token_mask, filled["keys"], filled["positions"], real, scaling, at, evicted, visible
        )
        self.signal = attention_signal(guard.signal, layer, self.signal)

    def measure_output(self, logits: Tensor) -> Tensor:
        """The guard's signal `[batch]` of the model's output `[batch, vocabulary]` for the next token."""
        assert self.settings.guard is not None
        name = self.settings.guard.signal
        mean = None if self.entropies is None else self.entropies[:, 0] / self.entropies[:, 1]
        if name == "entropy_rise":
            entropy = output_signal("entropy", logits, None)
            more = torch.stack((entropy, torch.ones_like(entropy)), 1)
            self.entropies = more if self.entropies is None else self.entropies + more
        return output_signal(name, logits, mean)

    def take(self, pairs: EvictedPairs) -> dict[str, Tensor] | None:
        guard = self.settings.guard
        self.measured = guard is None or guard.covers(pairs.ordinal)
        if self.sketch is not None and self.measured:
            self.sketch.take(pairs)
        if self.host is not None:
            self.host.take(pairs)
        return self.inner.take(pairs)

    def visible(self, dtype: torch.dtype) -> Slots | None:
        return self.inner.visible(dtype)

    def tensors(self) -> Iterator[Tensor]:
        yield from self.inner.tensors()
        if self.sketch is not None:
            yield from self.sketch.tensors()
        yield from (tensor for tensor in (self.signal, self.entropies) if tensor is not None)

    def host_tensors(self) -> Iterator[Tensor]:
        if self.host is not None:
            yield from self.host.tensors()

    def take_back(self) -> tuple[dict[str, Tensor], Tensor] | None:
        """The host's copies, padded, and which are real; nothing is stored of them here any more. None: none yet."""
        copies = None if self.host is None or self.host.stored is None else self.host.stored.padded()
        self.inner.stored = None
        for recorder in (self.sketch, self.host):
            if recorder is not None:
                recorder.stored = None
        return copies

    def select_rows(self, rows: Tensor) -> None:
        for layer in (self.inner, self.sketch, self.host):
            if layer is not None:
                layer.select_rows(rows)
        self.signal, self.entropies = select_optional(self.signal, rows), select_optional(self.entropies, rows)

    def fork(self) -> RecordingLayer:
        return self.fork_into(self.settings, self.inner.fork())

    def fork_into(self, settings: RecordingTier, inner: LayerTier) -> RecordingLayer:
        """A copy of what is recorded, with another tier's layer or guard."""
        twin = RecordingLayer(settings, inner)
        if self.sketch is not None and self.sketch.bits == settings.sketch_bits:
            twin.sketch = self.sketch.fork()
        if self.host is not None and twin.host is not None:
            twin.host = self.host.fork()
        if settings.guard == self.settings.guard:
            twin.measured = self.measured
            twin.signal, twin.entropies = copy_optional(self.signal), copy_optional(self.entropies)
        return twin


class KeySketch(LayerTier):
    """The keys of evicted pairs in a few bits, to see whether a query would have found one of them."""

    def __init__(self, bits: int):
        self.bits = bits

    def take(self, pairs: EvictedPairs) -> None:
        (keys,) = pairs.select(pairs.keys)
        codes, grid = quantise(keys, self.bits, min(LowPrecision.group, keys.shape[-1]))
        self.stored = pairs.append_to(self.stored, {"codes": codes, "grid": grid})

    def keys(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Keys `[batch, kv_heads, longest, d]` and which are real, or None where nothing was evicted."""
        if self.stored is None:
            return None
        filled, real = self.stored.padded()
        return dequantise(filled["codes"], filled["grid"], self.bits, dtype), real

    def fork(self) -> KeySketch:
        twin = KeySketch(self.bits)
        twin.stored = None if self.stored is None else self.stored.clone()
        return twin


class HostCopies(LayerTier):
    """One layer's evicted pairs in the model's own precision, with their positions, on the CPU.

    Together with what the cache holds that is the whole context. Attention does not see them.
    """

    def take(self, pairs: EvictedPairs) -> None:
        keys, values, positions = (tensor.cpu() for tensor in pairs.select(pairs.keys, pairs.values, pairs.positions))
        self.stored = pairs.append_to(self.stored, {"keys": keys, "values": values, "positions": positions})

    def fork(self) -> HostCopies:
        twin = HostCopies()
        twin.stored = None if self.stored is None else self.stored.clone()
        return twin
