"""The text of a reply as its tokens come, ended by stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

_INCOMPLETE = "\ufffd"  # what a tokenizer makes of the first bytes of a character


class ReplyStream(StoppingCriteria):
    """Decodes every new token of ``generate`` and hands the text on when it is certain.

    Held back is what later tokens may change: incomplete characters, and what may be the beginning of a stop string.

    Args:
        tokenizer: of the model.
        stops: the reply ends before the first of them.
        write: is called with every part of the text.

    Attributes:
        tokens: all new tokens, those of a stop string among them.
        text: what was written so far.
        stopped: whether a stop string was found.
        times: when each token came, by the monotonic clock.
    """

    def __init__(self, tokenizer, stops: Sequence[str], write: Callable[[str], object]):
        self._tokenizer, self._stops, self._write = tokenizer, stops, write
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        """Take the newest token of the only row."""
        self.times.append(monotonic())
        self.tokens.append(int(input_ids[0, -1]))
        text = self._decode(self.tokens)
        ends = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        self.stopped = bool(ends)
        self._advance(text[: min(ends)] if ends else self._certain(text))
        return torch.full((len(input_ids),), self.stopped, dtype=torch.bool, device=input_ids.device)

    def finish(self) -> None:
        """Hand on what was held back: no more tokens come."""
        if not self.stopped:
            self._advance(self._decode(self.tokens))

    def tokens_of_text(self) -> list[int]:
        """The first tokens, as many as make up no more than the text: those before a stop string."""
        count = len(self.tokens)
        while count and not self.text.startswith(self._decode(self.tokens[:count])):
            count -= 1
        return self.tokens[:count]

    def _certain(self, text: str) -> str:
        held = max(
            (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )
        return text[: len(text) - held].rstrip(_INCOMPLETE)

    def _advance(self, text: str) -> None:
        # a tokenizer that tidies up spaces may take back what it wrote; a client cannot
        if len(text) > len(self.text) and text.startswith(self.text):
            new, self.text = text[len(self.text) :], text
            self._write(new)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)
