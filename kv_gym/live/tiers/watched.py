"""A tier under watch: it does what it does, and beside it evicted keys are sketched or pairs copied to the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kv_gym.live.guard import Guard
from kv_gym.live.ragged import RaggedSlots
from kv_gym.live.signals import Glance, glance
from kv_gym.live.slots import EqualSlots
from kv_gym.live.tiers.host import HostLayer
from kv_gym.live.tiers.low_precision import LowPrecision, QuantisedLayer
from kv_gym.live.tiers.quantiser import dequantise, quantise
from kv_gym.live.tiers.tier import LayerTier, Leaving, Tier, all_of, picked


@dataclass(frozen=True)
class Watched(Tier):
    """Another tier, with what a safety net needs beside it.

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
        """As the tier does: what a guard measures is of the last query alone, and is not remembered."""
        return self.tier.sees_queries

    @property
    def sketches(self) -> bool:
        """Whether evicted keys are kept for the guard alone."""
        return self.guard is not None and self.guard.signal == "missing" and not isinstance(self.tier, LowPrecision)

    @property
    def sketch_bits(self) -> int | None:
        """Bits of a sketched key, or None where none is sketched."""
        return self.guard.bits if self.guard is not None and self.sketches else None

    def refuse_unfit(self, config) -> None:
        self.tier.refuse_unfit(config)
        if self.sketch_bits:
            LowPrecision(self.sketch_bits).refuse_unfit(config)

    def instead(self, other: Tier) -> Tier:
        return replace(self, tier=other)

    def begin(self) -> LayerTier:
        return WatchedLayer(self, self.tier.begin())

    def after(self, before: LayerTier, empty: bool) -> LayerTier:
        if isinstance(before, WatchedLayer):
            same = self.tier == before.settings.tier
            return before.fork_into(self, before.inner.fork() if same else self.tier.after(before.inner, empty))
        return WatchedLayer(self, self.tier.after(before, empty))


class KeySketch(LayerTier):
    """The keys of evicted pairs in a few bits, for the question whether a query would have found one of them."""

    def __init__(self, bits: int):
        self.bits = bits

    def take(self, leaving: Leaving) -> None:
        (keys,) = picked(leaving, leaving.keys)
        codes, grid = quantise(keys, self.bits, min(LowPrecision.group, keys.shape[-1]))
        self.held = leaving.add_to(self.held, {"codes": codes, "grid": grid})

    def keys(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Keys `[batch, kv_heads, longest, d]` and which are real, or None where nothing went."""
        if self.held is None:
            return None
        filled, real = all_of(self.held)
        return dequantise(filled["codes"], filled["grid"], self.bits, dtype), real

    def fork(self) -> KeySketch:
        twin = KeySketch(self.bits)
        twin.held = copied(self.held)
        return twin


class WatchedLayer(LayerTier):
    """One layer of a tier under watch.

    Attributes:
        inner: the tier's own.
        sketch: evicted keys for the guard, or None.
        host: copies of evicted pairs in the host's memory, or None.
        value: `[batch]`, what the guard saw of this layer at the last forward; NaN: nothing yet.
        heeded: whether the guard averages this layer; known from its first eviction on.
        tally: `[batch, 2]`, sum and number of what the guard saw of the model's output so far; layer 0 only.
    """

    def __init__(self, settings: Watched, inner: LayerTier):
        self.settings, self.inner = settings, inner
        self.sketch = KeySketch(settings.sketch_bits) if settings.sketch_bits else None
        self.host = HostLayer() if settings.offload else None
        self.heeded = True
        self.value: Tensor | None = None
        self.tally: Tensor | None = None

    @property
    def drops(self) -> bool:  # type: ignore[override]
        """Whether nobody asks which pairs go."""
        return self.inner.drops and self.sketch is None and self.host is None

    @property
    def held(self) -> EqualSlots | RaggedSlots | None:  # type: ignore[override]
        """What the tier holds."""
        return self.inner.held

    def observe(self, query: Tensor, fresh: Tensor | None) -> None:
        self.inner.observe(query, fresh)

    def watch(
        self, query: Tensor, fresh: Tensor | None, slots, scaling: float | None, cut_at: list[int | None]
    ) -> None:
        guard = self.settings.guard
        if guard is None or guard.reads_output or not self.heeded or all(at is None for at in cut_at):
            return
        evicted = None
        if self.sketch is not None:
            evicted = self.sketch.keys(query.dtype)
        elif isinstance(self.inner, QuantisedLayer):
            evicted = self.inner.keys(query.dtype)
        assert scaling is not None
        filled, real = slots.padded(("keys", "positions"))
        since = torch.tensor([at or 0 for at in cut_at], device=query.device)
        seen = Glance(query, fresh, filled["keys"], filled["positions"], real, scaling, since, evicted)
        shown = isinstance(self.inner, QuantisedLayer)
        self.value = glance(guard.signal, seen, shown, self.value)

    def take(self, leaving: Leaving) -> dict[str, Tensor] | None:
        guard = self.settings.guard
        self.heeded = guard is None or guard.heeds(leaving.place)
        if self.sketch is not None and self.heeded:
            self.sketch.take(leaving)
        if self.host is not None:
            self.host.take(leaving)
        return self.inner.take(leaving)

    def visible(self, dtype: torch.dtype) -> EqualSlots | RaggedSlots | None:
        return self.inner.visible(dtype)

    def tensors(self) -> Iterator[Tensor]:
        yield from self.inner.tensors()
        if self.sketch is not None:
            yield from self.sketch.tensors()
        yield from (tensor for tensor in (self.value, self.tally) if tensor is not None)

    def host_tensors(self) -> Iterator[Tensor]:
        if self.host is not None:
            yield from self.host.tensors()

    def give_back(self) -> tuple[dict[str, Tensor], Tensor] | None:
        """The host's copies, after which nothing is left of evicted pairs here; None: nothing went."""
        back = None if self.host is None else self.host.padded()
        self.inner.held = None
        for beside in (self.sketch, self.host):
            if beside is not None:
                beside.held = None
        return back

    def select_rows(self, rows: Tensor) -> None:
        for each in (self.inner, self.sketch, self.host):
            if each is not None:
                each.select_rows(rows)
        self.value, self.tally = (
            None if tensor is None else tensor.index_select(0, rows.to(tensor.device))
            for tensor in (self.value, self.tally)
        )

    def fork(self) -> WatchedLayer:
        return self.fork_into(self.settings, self.inner.fork())

    def fork_into(self, settings: Watched, inner: LayerTier) -> WatchedLayer:
        """A copy of what is beside the tier, with another tier's layer or guard."""
        twin = WatchedLayer(settings, inner)
        if self.sketch is not None and self.sketch.bits == settings.sketch_bits:
            twin.sketch = self.sketch.fork()
        if self.host is not None and twin.host is not None:
            twin.host.held = copied(self.host.held)
        if settings.guard == self.settings.guard:
            twin.heeded = self.heeded
            twin.value = None if self.value is None else self.value.clone()
            twin.tally = None if self.tally is None else self.tally.clone()
        return twin


def copied(slots: EqualSlots | RaggedSlots | None) -> EqualSlots | RaggedSlots | None:
    """An independent copy without room."""
    return None if slots is None else slots.clone({name: name for name in slots.buffers})
