"""When a cache evicts."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kv_gym.errors import UserError

_FORM = re.compile(r"(every|block|lagged):([1-9]\d*)")


@dataclass(frozen=True)
class Trigger:
    """Fires at the end of the first forward, then whenever `every` new tokens came since it last fired.

    Attributes:
        every: new tokens between firings; None fires once.
        inside: fires inside a forward too, after each `every` tokens, and not at the end of the first one: a long
            prompt is read block by block, and the cache never holds more than the budget and a block.
        spared: the newest tokens that a firing leaves alone: they are judged when later queries have seen them.
    """

    every: int | None = None
    inside: bool = False
    spared: int = 0

    @classmethod
    def parse(cls, text: str) -> Trigger:
        """Read ``prefill``, ``every:<tokens>``, ``block:<tokens>`` or ``lagged:<tokens>``.

        Raises:
            UserError: anything else.
        """
        if text == "prefill":
            return cls()
        match = _FORM.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise UserError(
                f"trigger {text!r} is unknown; expected 'prefill', 'every:<tokens>', 'block:<tokens>' or "
                "'lagged:<tokens>', such as 'every:64'"
            )
        kind, tokens = match[1], int(match[2])
        return cls(tokens, inside=kind == "block", spared=tokens if kind == "lagged" else 0)

    @property
    def text(self) -> str:
        """What :meth:`parse` reads."""
        if self.every is None:
            return "prefill"
        return f"{'block' if self.inside else 'lagged' if self.spared else 'every'}:{self.every}"

    def fires(self, seen: int, fired_at: int | None) -> bool:
        """Whether to evict now, after `seen` tokens, when it last fired after `fired_at` (None: never)."""
        if not seen:  # a row of which only padding came: its first forward is yet to come
            return False
        if self.inside or fired_at is not None:
            return self.every is not None and seen - (fired_at or 0) >= self.every
        return True
