"""A tier with a recorder beside it: keys of evicted pairs are sketched for a guard, or pairs copied to the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.devices import number_tensor
from kv_gym.errors import UserError
from kv_gym.live.guard import Guard, LayerAttention, attention_signal, output_signal
from kv_gym.live.slots import Slots
from kv_gym.live.tiers.base import EvictedPairs, LayerTier, PackedPairs, Tier
from kv_gym.live.tiers.low_precision import LowPrecision, QuantisedLayer


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

    def refuse_other_model(self, model) -> None:
        self.tier.refuse_other_model(model)

    def refuse_unfit(self, config) -> None:
        self.tier.refuse_unfit(config)
        if self.sketch_bits:
            LowPrecision(self.sketch_bits).refuse_unfit(config)

    def begin(self, ordinal: int = 0) -> LayerTier:
        return TierRecorder(self, self.tier.begin(ordinal), ordinal)

    def begin_after(self, previous: LayerTier, ordinal: int, empty: bool, complete: bool) -> LayerTier:
        before = previous if isinstance(previous, TierRecorder) else None
        inner = previous if before is None else before.inner
        same = before is not None and before.settings.tier == self.tier
        inner = inner.fork() if same else self.tier.begin_after(inner, ordinal, empty, complete)
        recorder = TierRecorder(self, inner, ordinal)
        if recorder.sketch is not None and not complete and (before is None or not before.sketches_like(recorder)):
            assert self.guard is not None
            raise UserError(
                f"signal {self.guard.signal!r} needs the keys of all that was evicted, and the cache did not sketch "
                "them: fork with this guard before the first eviction"
            )
        if before is not None:
            recorder.continue_from(before)
        return recorder


class TierRecorder(LayerTier):
    """One layer of a tier with a recorder.

    Attributes:
        settings: the tier with its recorder.
        inner: the tier's own layer.
        guard: what is measured of this layer's attention or of the output, or None.
        sketch: evicted keys in a few bits, for the guard, or None.
        host: copies of evicted pairs in the host's memory, or None.
        signal: `[batch]`, what the guard measured at the last forward; None or NaN: nothing yet.
        entropies: `[batch, 2]`, sum and number of the output's entropies so far; layer 0 alone.
    """

    row_tensors = ("signal", "entropies")

    def __init__(self, settings: RecordingTier, inner: LayerTier, ordinal: int):
        guard = settings.guard
        self.settings, self.inner = settings, inner
        self.guard = guard if guard is not None and (guard.reads_output or guard.covers(ordinal)) else None
        bits = settings.sketch_bits if self.guard is not None else None
        self.sketch = QuantisedLayer(LowPrecision(bits), ("keys",)) if bits else None
        self.host = HostCopies() if settings.offload else None
        self.signal: Tensor | None = None
        self.entropies: Tensor | None = None

    @property
    def drops(self) -> bool:  # type: ignore[override]
        """Whether nobody asks which pairs are evicted."""
        return self.inner.drops and self.sketch is None and self.host is None

    @property
    def absorbs(self) -> bool:
        return self.inner.absorbs

    @property
    def held_as(self) -> str:  # type: ignore[override]
        return self.inner.held_as

    @property
    def _parts(self) -> dict[str, LayerTier]:
        parts = {"inner": self.inner, "sketch": self.sketch, "host": self.host}
        return {name: part for name, part in parts.items() if part is not None}

    def observe(self, query: Tensor, token_mask: Tensor | None) -> None:
        self.inner.observe(query, token_mask)

    def measure(
        self, query: Tensor, token_mask: Tensor | None, slots: Slots, scaling: float, evicted_at: Sequence[int | None]
    ) -> None:
        if self.guard is None or self.guard.reads_output or all(at is None for at in evicted_at):
            return
        visible = isinstance(self.inner, QuantisedLayer)
        source = self.inner if isinstance(self.inner, QuantisedLayer) else self.sketch
        evicted = None if source is None else source.keys(query.dtype)
        filled, real = slots.padded(("keys", "positions"))
        at = number_tensor([at or 0 for at in evicted_at], query.device)
        keys, positions = filled["keys"], filled["positions"]
        layer = LayerAttention(query, token_mask, keys, positions, real, scaling, at, evicted, visible)
        self.signal = attention_signal(self.guard.signal, layer, self.signal)

    def measure_output(self, logits: Tensor) -> Tensor:
        """The guard's signal `[batch]` of the model's output `[batch, vocabulary]` for the next token."""
        assert self.guard is not None
        mean = None if self.entropies is None else self.entropies[:, 0] / self.entropies[:, 1]
        if self.guard.signal == "entropy_rise":
            entropy = output_signal("entropy", logits, None)
            more = torch.stack((entropy, torch.ones_like(entropy)), 1)
            self.entropies = more if self.entropies is None else self.entropies + more
        return output_signal(self.guard.signal, logits, mean)

    def take(self, pairs: EvictedPairs) -> dict[str, Tensor] | None:
        if self.sketch is not None:
            self.sketch.take(pairs)
        if self.host is not None:
            self.host.take(pairs)
        return self.inner.take(pairs)

    def take_back(self) -> tuple[dict[str, Tensor], Tensor] | None:
        """The host's copies, padded, and which are real; nothing is stored of them here any more. None: none yet."""
        copies = None if self.host is None or self.host.stored is None else self.host.stored.padded()
        for part in self._parts.values():
            part.forget()
        return copies

    def absorbed(self, query: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.absorbed(query)

    def visible(self, dtype: torch.dtype) -> Slots | None:
        return self.inner.visible(dtype)

    def packed(self) -> PackedPairs | None:
        return self.inner.packed()

    def tensors(self) -> Iterator[Tensor]:
        yield from super().tensors()
        for name, part in self._parts.items():
            if name != "host":
                yield from part.tensors()

    def host_tensors(self) -> Iterator[Tensor]:
        return iter(()) if self.host is None else self.host.tensors()

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        for part in self._parts.values():
            part.select_rows(rows)

    def fork(self) -> LayerTier:
        twin = super().fork()
        for name, part in self._parts.items():
            setattr(twin, name, part.fork())
        return twin

    def sketches_like(self, other: TierRecorder) -> bool:
        """Whether evicted keys were sketched here as they would be there."""
        return self.sketch is not None and other.sketch is not None and self.sketch.settings == other.sketch.settings

    def continue_from(self, before: TierRecorder) -> None:
        """Take along copies of what was recorded with another tier or guard, as far as it fits."""
        twin = before.fork()
        assert isinstance(twin, TierRecorder)
        if before.sketches_like(self):
            self.sketch = twin.sketch
        if self.host is not None and twin.host is not None:
            self.host = twin.host
        if self.settings.guard == before.settings.guard:
            self.signal, self.entropies = twin.signal, twin.entropies


class HostCopies(LayerTier):
    """One layer's evicted pairs in the model's own precision, with their positions, on the CPU.

    Together with what the cache holds that is the whole context. Attention does not see them.
    """

    def take(self, pairs: EvictedPairs) -> None:
        keys, values, positions = (tensor.cpu() for tensor in pairs.select(pairs.keys, pairs.values, pairs.positions))
        self.stored = pairs.append_to(self.stored, {"keys": keys, "values": values, "positions": positions})
