"""The safety net of one cache: it reads the guard's signal after every forward and reacts to alarms."""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from kv_gym.errors import UserError
from kv_gym.live.config import Eviction
from kv_gym.live.guard import Guard
from kv_gym.live.layer import EvictingLayer
from kv_gym.live.layer_state import Contents
from kv_gym.live.signals import of_output
from kv_gym.live.slots import EqualSlots
from kv_gym.live.tiers import LowPrecision, Merge, MergeValues, Tier, parse_tier
from kv_gym.live.tiers.tier import ragged
from kv_gym.live.tiers.watched import Watched, WatchedLayer

if TYPE_CHECKING:
    from kv_gym.live.cache import EvictingCache


def under_watch(evicted: str | Tier, guard: Guard | None, offload: bool) -> Tier:
    """The tier that a cache with a guard or a host copy uses.

    Raises:
        UserError: a guard that needs what the tier or the cache does not have.
    """
    tier = parse_tier(evicted)
    if guard is None and not offload:
        return tier
    if offload and isinstance(tier, Merge | MergeValues):
        raise UserError(
            f"evicted={tier.name!r} changes survivors, so a copy of evicted pairs would not bring the context back: "
            "choose drop or bits with offload=True"
        )
    if guard is not None and guard.then == "restore" and not offload:
        raise UserError("a guard can restore only what was kept: give offload=True to the cache")
    if guard is not None and guard.signal == "tier" and not isinstance(tier, LowPrecision):
        raise UserError(f"signal 'tier' is of pairs kept in low precision, and evicted={tier.name!r} keeps none")
    return Watched(tier, guard, offload)


def guarded(eviction: Eviction, guard: Guard, layers: Iterable[Contents]) -> Eviction:
    """The settings of a fork with another guard.

    Raises:
        UserError: pairs were evicted before whose keys that guard needs and the cache did not sketch.
    """
    before = eviction.evicted
    old = before if isinstance(before, Watched) else Watched(before)
    new = under_watch(old.tier, guard, old.offload)
    if isinstance(new, Watched) and new.sketches:
        for contents in layers:
            known = old.guard is not None and old.guard.heeds(contents.place) and old.sketch_bits == new.sketch_bits
            if known or not guard.heeds(contents.place):
                continue
            if contents.rows and bool((contents.slots.counts() < torch.tensor(contents.rows)[:, None]).any()):
                raise UserError(
                    f"signal {guard.signal!r} needs the keys of all that was evicted, and the cache did not sketch "
                    "them: fork with this guard before the first eviction"
                )
    return replace(eviction, evicted=new)


class SafetyNet:
    """What the guard saw last, and how often it raised an alarm.

    Attributes:
        guard: its settings.
        signal: `[batch]` float32, of the last forward; NaN where there is nothing to measure yet.
        alarms: forwards whose signal was above the threshold in some row.
    """

    def __init__(self, guard: Guard, layers: int):
        for layer in guard.layers or ():
            if not 0 <= layer < layers:
                raise UserError(f"the guard averages layer {layer}, and {layers} layers evict: count them from 0")
        self.guard = guard
        self.signal: Tensor | None = None
        self.alarms = 0

    def copy(self) -> SafetyNet:
        """An independent one that goes on counting from here."""
        return copy.copy(self)

    def listen(self, cache: EvictingCache) -> RemovableHandle | None:
        """Hear the output of every forward of the cache's model with that cache, where the signal is of that."""
        if not self.guard.reads_output:
            return None
        known = weakref.ref(cache)

        def hear(module, args, arguments, output) -> None:
            cache, logits = known(), getattr(output, "logits", None)
            if cache is not None and cache is arguments.get("past_key_values") and logits is not None:
                assert cache.net is not None
                cache.net.after_output(cache, logits[:, -1].detach())

        return cache.model.register_forward_hook(hear, with_kwargs=True)

    def after_attention(self, cache: EvictingCache) -> None:
        """A forward's attention is over: read the layers' signals, and react."""
        if self.guard.reads_output:
            return
        layers = watched_layers(cache)
        chosen = layers if self.guard.layers is None else [layers[i] for i in self.guard.layers]
        values = [layer.value for layer in chosen if layer.value is not None]
        if values:
            self.signal = torch.stack([value.to(values[0].device) for value in values]).mean(0)
            self._react(cache)

    def after_output(self, cache: EvictingCache, logits: Tensor) -> None:
        """Read the model's output `[batch, vocabulary]` for the next token, and react."""
        first = watched_layers(cache)[0]  # follows the rows of the batch
        mean = None if first.tally is None else first.tally[:, 0] / first.tally[:, 1]
        self.signal = of_output(self.guard.signal, logits, mean)
        if self.guard.signal == "entropy_rise":
            entropy = of_output("entropy", logits, None)
            more = torch.stack((entropy, torch.ones_like(entropy)), 1)
            first.tally = more if first.tally is None else first.tally + more
        self._react(cache)

    def _react(self, cache: EvictingCache) -> None:
        assert self.signal is not None
        # NaN is above nothing; an accelerator is waited for once in a forward
        if not bool((self.signal > self.guard.threshold).any()):
            return
        self.alarms += 1
        if self.guard.then == "restore":
            cache.restore()
        elif self.guard.then == "enlarge":
            cache.adopt_budget(enlarged(cache.eviction.budget, self.guard.growth))
        else:
            warnings.warn(
                f"safety net: {self.guard.signal!r} is above {self.guard.threshold:g}, so what was evicted may be "
                "missing here",
                stacklevel=2,
            )


def watched_layers(cache: EvictingCache) -> list[WatchedLayer]:
    """What a cache with a guard holds beside the slots of its evicting layers."""
    tiers = (layer.contents.tier for layer in cache.layers if isinstance(layer, EvictingLayer))
    return [tier for tier in tiers if isinstance(tier, WatchedLayer)]


def enlarged(budget: int | float, growth: float) -> int | float:
    """A budget `growth` times as large; a share ends at 1."""
    return math.ceil(budget * growth) if isinstance(budget, int) else min(1.0, budget * growth)


@torch.no_grad()
def put_back(layers: Iterable[Contents]) -> None:
    """Return all evicted pairs to full precision, from the host's copies.

    Policies with memory know of them what they know of new tokens.

    Raises:
        UserError: the cache was made without ``offload=True``.
    """
    for contents in layers:
        tier = contents.tier
        if not isinstance(tier, WatchedLayer) or tier.host is None:
            raise UserError("there is no copy of what was evicted: give offload=True to the cache")
        contents.settle()
        back = tier.give_back()
        if back is None:
            continue
        filled, real = back
        device = contents.slots.buffers["keys"].device
        keys, values, positions = (filled[name].to(device) for name in ("keys", "values", "positions"))
        new = {"keys": keys, "values": values, "positions": positions}
        new |= contents.beside(keys, values, positions, None)
        contents.loose = 0  # the newest tokens are no longer the last ones
        if isinstance(contents.slots, EqualSlots) and bool(real.all()):
            contents.slots.append(new, 0)
        else:
            contents.slots = ragged(contents.slots)
            contents.slots.append(new, 0, real.cpu())
