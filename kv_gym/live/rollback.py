"""Taking back the newest tokens: what drafts of assisted decoding need, exactly or not at all."""

from __future__ import annotations

from collections.abc import Sequence

from kv_gym.errors import UserError
from kv_gym.live.contents import SHORT, Contents

_NOT_ASSISTED = (
    "assisted and prompt-lookup decoding equal decoding token by token only where nothing is evicted meanwhile: use "
    "trigger='prefill', and run the model on the context before generate()"
)


def refuse_drafts(layer: Contents) -> None:
    """Raise a UserError where a cache may evict while drafts are read: the drafts themselves would change the choice.

    Args:
        layer: what one of its layers holds.
    """
    if layer.eviction.trigger.every is not None or None in (layer.fired or [None]):
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
    possible = min(layer.retractable for layer in layers)
    if asked > 0:
        refuse_drafts(layers[0])
        if not possible:  # evicted at the end of the forward that brought them
            raise UserError(_NOT_ASSISTED)
    count = -asked if asked <= 0 else max(0, seen - asked)
    if count > possible:
        raise UserError(
            f"the cache cannot be cropped by the newest {count} tokens but by {possible}: what was evicted does "
            f"not return and policies with memory can forget the last forward alone, of at most {SHORT} tokens; fork() "
            "the cache before tokens that you may want to take back"
        )
    return count
