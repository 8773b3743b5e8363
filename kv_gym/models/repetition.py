"""What a policy asks for that wants the context repeated: the second reading that its statistics are taken over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView

BLOCK = 128  # queries that a policy observes at a time


@dataclass(frozen=True)
class Repetition:
    """How a context is repeated behind itself, chunk by chunk, each chunk on top of the context alone.

    What a chunk's queries pay is shown for that chunk's own tokens: the softmax is over the sinks, the chunk's tokens
    as they are cached, and what of the repetition came before.

    Attributes:
        chunk: tokens that are repeated at a time.
        overlap: the last tokens of the preceding chunk that lead in the next one.
        sinks: first tokens that every query sees.
        instruction: token ids in front of every chunk; empty: the model's beginning token, where it has one.
        projected: the policy is shown the layer's input and its output projection too.
    """

    chunk: int
    overlap: int
    sinks: int
    instruction: tuple[int, ...] = ()
    projected: bool = False

    def chunks(self, text: Tensor, beginning: tuple[int, ...]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """What is read again, in turn.

        Args:
            text: `[batch, t]` int64, the tokens to repeat, -1 where a row has padding.
            beginning: ids to begin with where there is no instruction.

        Returns:
            For each chunk: ids `[batch, m]`, -1 behind the end of a row; and, each `[batch]`, which of the row's
            tokens are asked about: from one number up to another, counted from the row's first; and how many there are.
        """
        rows = [row[row >= 0] for row in text]
        lead = text.new_tensor(self.instruction or beginning)
        counts = torch.tensor([len(row) for row in rows], device=text.device)
        found = []
        for start in range(0, int(counts.max()), self.chunk):
            stop = start + self.chunk
            before = max(0, start - self.overlap)
            parts = [torch.cat((lead, row[before:stop])) if len(row) > start else lead[:0] for row in rows]
            ids = text.new_full((len(rows), max(map(len, parts))), -1)
            for row, part in enumerate(parts):
                ids[row, : len(part)] = part
            found.append((ids, counts.clamp(max=start), counts.clamp(max=stop), counts))
        return found


class RereadingPolicy(Protocol):
    """What a second reading needs of a policy; see :class:`kv_gym.policies.StatefulPolicy`."""

    @property
    def name(self) -> str:  # noqa: D102
        ...

    @property
    def repetition(self) -> Repetition | None:  # noqa: D102
        ...

    def observe_again(  # noqa: D102
        self, view: CacheView, attention: Tensor, state: Mapping[str, Tensor], hidden: Tensor | None = None
    ) -> dict[str, Tensor]: ...
