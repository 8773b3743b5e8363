"""What becomes of evicted pairs: dropped, merged into survivors, kept in low precision, or absorbed into a state."""

from __future__ import annotations

import re
from dataclasses import replace

from kv_gym.errors import UserError
from kv_gym.live.tiers.base import Drop, EvictedPairs, LayerTier, PackedPairs, Tier
from kv_gym.live.tiers.low_precision import LowPrecision
from kv_gym.live.tiers.low_rank import LowRankState
from kv_gym.live.tiers.merge import Merge, MergeValues
from kv_gym.live.tiers.recording import RecordingTier, TierRecorder

__all__ = [
    "Drop", "EvictedPairs", "LayerTier", "LowPrecision", "LowRankState", "Merge", "MergeValues", "PackedPairs",
    "RecordingTier", "TIERS", "Tier", "TierRecorder", "parse_tier",
]  # fmt: skip

_BY_NAME: dict[str, Tier] = {
    tier.name: tier
    for tier in (
        Drop(), Merge(), MergeValues(), *(LowPrecision(bits, balanced=balanced) for bits in (2, 4, 8)
        for balanced in (False, True)),
    )
}  # fmt: skip
TIERS = tuple(_BY_NAME)


def parse_tier(evicted: str | Tier) -> Tier:
    """A tier by name: ``drop``, ``merge``, ``merge:values``, ``bits:2``, ``bits:4``, ``bits:8``, or one of these with
    ``:balanced``, and with ``:most=N`` at most N evicted pairs for each KV head; ``less:FOLDER``, with what
    `kv-gym train-less` wrote; an object is returned as it is.

    Raises:
        UserError: an unknown name, or a folder without a trained state.
    """
    if isinstance(evicted, Tier):
        return evicted
    if str(evicted).startswith("less:"):
        return LowRankState.from_pretrained(str(evicted).removeprefix("less:"))
    name, bounded, most = str(evicted).partition(":most=")
    tier = _BY_NAME.get(name)
    if bounded and isinstance(tier, LowPrecision) and re.fullmatch("[0-9]{1,9}", most):
        return replace(tier, most=int(most))
    if bounded or tier is None:
        raise UserError(
            f"evicted={evicted!r} is unknown; expected one of {', '.join(_BY_NAME)}, those in bits also with :most=N, "
            "or less:FOLDER with a trained state"
        )
    return tier
