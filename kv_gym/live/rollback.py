"""Taking back the newest tokens: what drafts of assisted decoding need, exactly or not at all."""

from __future__ import annotations

from collections.abc import Sequence

from kv_gym.errors import UserError
from kv_gym.live.holding import SHORT
from kv_gym.live.layer_state import Contents

_NOT_ASSISTED = (
    "with assisted or prompt-lookup decoding generate() reads drafts before it is known whether they stay, and a cache "
    "would evict by them: generate without drafts, or into an empty cache of budget 1.0, and fork() that one with "
    "another budget"
)


def refuse_drafts(layer: Contents) -> None:
    """Raise a UserError unless drafts that are announced for a whole prompt leave no trace.

    transformers reads the prompt and its first drafts in one forward; of a cache that has read a part already, it
    reads that part again.

    Args:
        layer: what one of the cache's layers holds.
    """
    if layer.rows or not layer.eviction.keeps_all:
        raise UserError(_NOT_ASSISTED)


def newest(asked: int, seen: int, layers: Sequence[Contents]) -> int:
    """How many tokens a call of ``crop(asked)`` takes back.

    Args:
        asked: minus how many; above zero, as transformers had it up to 5.12: how many shall be left. That call comes
            right after every forward with drafts, and nothing said before that drafts would come.
        seen: tokens seen.
        layers: what the evicting layers hold.

    Raises:
        UserError: that cannot be done exactly.
    """
    possible, eviction = min(layer.retractable for layer in layers), layers[0].eviction
    if asked > 0 and not eviction.keeps_all and (eviction.trigger.every is not None or not possible):
        raise UserError(_NOT_ASSISTED)
    count = -asked if asked <= 0 else max(0, seen - asked)
    if count > possible:
        raise UserError(
            f"the cache cannot be cropped by the newest {count} tokens but by {possible}: what was evicted does "
            f"not return and policies with memory can forget the last forward alone, of at most {SHORT} tokens; fork() "
            "the cache before tokens that you may want to take back"
        )
    return count
