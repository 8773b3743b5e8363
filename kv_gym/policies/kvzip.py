"""KVzip: keep what the model needs to repeat the context, so that later questions are not needed for the choice.

After the prompt the model reads the context again, behind itself and chunk by
chunk; a token scores the largest attention that any query of its chunk's repetition pays to it. `projected=True` is
KVzip+ of kvpress: each weight times |W_O v| of the query head over |h| of the query's own layer input.
Differs from the paper in: the words that ask for the repetition are the same for every chunk; they are a setting, token
ids, since a cache has no tokenizer: `generate`, `chat`, `evaluate` and leaderboards, which have one, put in the
published words and what the model's chat template has before a reply. Without them, as in recordings and for a
tokenizer that does not know these words, the repetition begins with the model's beginning token, as suits a model that
has no instructions. Tokens that came after the first cut are repeated before the next one, on top of what is left (the
paper cuts once). The first four tokens are a setting of the protection (the code gives them the largest score).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.models.context_repetition import ContextRepetition
from kv_gym.policies.base import Paper, StatefulPolicy

REPEAT = "\n\nRepeat the previous context exactly."
"""The published words that ask for the repetition, behind a context within the user's message."""


@dataclass(frozen=True)
class KVzip(StatefulPolicy):
    """Largest attention of the repetition; state `paid` is float32 `[batch, kv_heads, tokens]`.

    The paper's own allocation is one threshold over all heads and layers: ``allocation="global"``.

    Attributes:
        chunk: tokens that are repeated at a time.
        overlap: tokens of the chunk before that lead in the next one.
        instruction: token ids that ask for the repetition, as numbers with spaces between; "": those of
            :meth:`with_tokenizer`, where there is a tokenizer.
        projected: weigh attention as KVzip+ does.
    """

    paper = Paper(
        "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", "2505.23416", venue="NeurIPS 2025"
    )
    sinks = 4
    comparable = True
    prompt_only = True
    observed_with = ("chunk", "overlap", "instruction", "projected")
    chunk: int = 2048
    overlap: int = 8
    instruction: str = ""
    projected: bool = False

    def __post_init__(self) -> None:
        self._require(self.chunk >= 1 and self.overlap >= 0, "chunk from 1 and overlap from 0")
        words = self.instruction.split()
        self._require(
            all(re.fullmatch("[0-9]{1,9}", word) for word in words), "token ids in instruction, such as '17 4 256'"
        )

    @property
    def repetition(self) -> ContextRepetition:
        words = tuple(map(int, self.instruction.split()))
        return ContextRepetition(self.chunk, self.overlap, self.sinks, words, self.projected)

    def with_tokenizer(self, tokenizer: Any) -> KVzip:
        """With the published instruction, unless one was given; as it is where the tokenizer cannot say the words."""
        if self.instruction:
            return self
        from kv_gym.models.chat_template import ChatTemplate
        from kv_gym.models.loading import plain_ids

        words = plain_ids(tokenizer, REPEAT)
        if "".join(tokenizer.decode(words).split()).lower() != "".join(REPEAT.split()).lower():
            return self
        if getattr(tokenizer, "chat_template", None):
            words = plain_ids(tokenizer, REPEAT + ChatTemplate(tokenizer).frame()[1])
        return replace(self, instruction=" ".join(map(str, words)))

    def initial_state(self, view: CacheView) -> dict[str, Tensor]:
        return {"paid": view.keys.new_zeros(view.keys.shape[:3]).float()}

    def observe(self, view: CacheView, attention: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(state)  # only the repetition counts

    def observe_again(
        self, view: CacheView, attention: Tensor, state: Mapping[str, Tensor], hidden: Tensor | None = None
    ) -> dict[str, Tensor]:
        heads = view.keys.shape[1]
        if not self.projected:
            largest = attention.amax(2).unflatten(1, (heads, -1)).amax(2)
        else:
            assert hidden is not None and view.output is not None
            weighted = (attention / hidden.float().norm(dim=-1)[:, None, :, None].clamp(min=1e-12)).amax(2)
            largest = (weighted.unflatten(1, (heads, -1)) * _output_norms(view.values, view.output)).amax(2)
        return {"paid": torch.maximum(state["paid"], largest)}

    def score(self, view: CacheView) -> Tensor:
        return view.state["paid"]


def _output_norms(values: Tensor, output: Tensor) -> Tensor:
    """|W_O v| for every query head of the value's KV head, `[batch, kv_heads, group, tokens]` float32.

    Its square is the form v (W W^T) v, so that nothing as wide as the model is held for a token.
    """
    grouped = output.float().unflatten(0, (values.shape[1], -1))  # [H, g, d, D]
    forms = grouped @ grouped.transpose(-1, -2)  # [H, g, d, d]
    wide = values.float()[:, :, None]  # [B, H, 1, n, d]
    return ((wide @ forms) * wide).sum(-1).clamp(min=0).sqrt()
