"""How a policy has its context repeated in a second reading, and what it must offer for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.devices import number_tensor, to_device

QUERY_BLOCK = 128
"""New queries that a policy observes at a time."""


@dataclass(frozen=True)
class ContextRepetition:
    """A context repeated behind itself, chunk by chunk, each chunk on top of the context alone.

    The policy is shown the attention of a chunk's queries to that chunk's own cached tokens: the softmax is over the
    sinks, the chunk's cached tokens, and the earlier tokens of the repetition.

    Attributes:
        chunk: tokens that are repeated at a time.
        overlap: tokens of the preceding chunk that each chunk begins with.
        sinks: first tokens that every query sees.
        instruction: token ids in front of every chunk; empty: the model's beginning token, where it has one.
        projected: whether the policy is shown the layer's hidden states and output projection too.
    """

    chunk: int
    overlap: int
    sinks: int
    instruction: tuple[int, ...] = ()
    projected: bool = False

    def chunks(
        self, text: Tensor, beginning: tuple[int, ...], padded: bool = True
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The chunks of the repetition, in order.

        Args:
            text: `[batch, tokens]` int64, the tokens to repeat, -1 where a row has padding.
            beginning: token ids to begin with where there is no instruction.
            padded: whether some row has padding.

        Returns:
            For each chunk: its token ids `[batch, m]`, -1 behind the end of a row; and, each `[batch]`, the first of
            the row's tokens that it repeats, the one after the last, and the number of the row's tokens.
        """
        rows = [row[row >= 0] for row in text] if padded else list(text)
        prefix = to_device(torch.tensor(self.instruction or beginning, dtype=text.dtype), text.device)
        counts = number_tensor([len(row) for row in rows], text.device)
        chunks = []
        for start in range(0, max(map(len, rows)), self.chunk):
            stop = start + self.chunk
            before = max(0, start - self.overlap)
            parts = [torch.cat((prefix, row[before:stop])) if len(row) > start else prefix[:0] for row in rows]
            ids = text.new_full((len(rows), max(map(len, parts))), -1)
            for row, part in enumerate(parts):
                ids[row, : len(part)] = part
            chunks.append((ids, counts.clamp(max=start), counts.clamp(max=stop), counts))
        return chunks


class RereadingPolicy(Protocol):
    """A policy whose statistics are taken in a second reading; see :class:`kv_gym.policies.StatefulPolicy`."""

    @property
    def name(self) -> str:  # noqa: D102
        ...

    @property
    def repetition(self) -> ContextRepetition | None:  # noqa: D102
        ...

    def observe_again(  # noqa: D102
        self, view: CacheView, attention: Tensor, state: Mapping[str, Tensor], hidden: Tensor | None = None
    ) -> dict[str, Tensor]: ...
