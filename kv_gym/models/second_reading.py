"""The second reading: a model repeats what it has cached, while a policy looks on.

Recordings and live caches run it by one function, so that both find the same statistics. The cache that the model is
given for it holds nothing of the repetition: every layer sees what is cached and the chunk that is being repeated.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from kv_gym.cache_view import CacheView, attention_weights
from kv_gym.errors import UserError
from kv_gym.models.attention import AttentionCall, hand_over, output_projection
from kv_gym.models.hidden_states import listen, received, unlisten
from kv_gym.models.repetition import BLOCK, Repetition, RereadingPolicy


class Held(Protocol):
    """What a full-attention layer has cached of the context."""

    def view(self) -> CacheView:
        """Its slots, with the policy's state."""

    def write_state(self, state: Mapping[str, Tensor]) -> None:
        """Replace the policy's state."""


@torch.no_grad()
def read_again(
    model, policy: RereadingPolicy, text: Tensor, held: Mapping[int, Held], others: Sequence[Any], columns: int
) -> None:
    """Have a model repeat the last tokens that it has cached, and the policy's state updated by what that attends to.

    Time: a forward over the tokens. Memory: one layer's keys and values once more, and a chunk's activations.

    Args:
        model: the model, watched (see :func:`kv_gym.models.attention.attach`).
        policy: one with a `repetition`.
        text: `[batch, t, 2]` int64, the tokens to repeat, the last ones of each row that are no padding, and the
            positions that the model gave them; -1: padding.
        held: what is cached, by the layer's index in the model.
        others: the cache's layers; those with sliding windows are read, and left as they are.
        columns: tokens seen, padding included.

    Raises:
        UserError: rows with padding in a model with sliding-window layers, whose windows hold the padding.
    """
    repetition = policy.repetition
    assert repetition is not None
    if bool((text < 0).any()) and len(held) < len(others):
        raise UserError(
            f"policy {policy.name!r} reads the context again, which is not served for padded batches of a model with "
            "sliding-window layers: give the rows one at a time"
        )
    following = text[..., 1].amax(1) + 1
    for ids, first, last, counts in repetition.chunks(text[..., 0], _beginning(model)):
        seen = next(iter(held.values())).view().seen
        asked = (seen - counts + first)[:, None], (seen - counts + last)[:, None]
        layers = [
            _Rereading(i, held[i], policy, repetition, ids >= 0, asked, columns) if i in held else copy.copy(layer)
            for i, layer in enumerate(others)
        ]
        positions = following[:, None] + torch.arange(ids.shape[1], device=ids.device)
        if repetition.projected:
            listen(model)
        try:
            model.base_model(
                input_ids=ids.clamp(min=0), position_ids=positions, past_key_values=Cache(layers=layers), use_cache=True
            )
        finally:
            if repetition.projected:
                unlisten(model)


def _beginning(model) -> tuple[int, ...]:
    token = getattr(model.config.get_text_config(), "bos_token_id", None)
    return (token,) if isinstance(token, int) else ()


class _Rereading(CacheLayerMixin):
    """A layer under the repetition of one chunk."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(
        self,
        index: int,
        held: Held,
        policy: RereadingPolicy,
        repetition: Repetition,
        real: Tensor,
        asked: tuple[Tensor, Tensor],
        columns: int,
    ):
        super().__init__()
        self._index, self._held, self._policy, self._repetition = index, held, policy, repetition
        self._real, self._asked, self._columns = real, asked, columns
        self._slots = held.view().positions.shape[2]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Nothing is stored."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Attention puts them behind what is held."""
        hand_over(self)
        return key_states, value_states

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Attention over all that is held; the policy is shown what the chunk's own tokens got of it."""
        view = replace(self._held.view(), queries=None)
        heads, n = view.positions.shape[1:]
        m = call.query.shape[2]
        projected = self._repetition.projected
        if projected:
            view = replace(view, output=output_projection(call.module, call.query.shape[1], call.query.shape[3]))
        keys, values = torch.cat((view.keys, call.key), 2), torch.cat((view.values, call.value), 2)
        theirs = view.seen[:, None] + torch.arange(m, device=keys.device)  # [B, m]
        positions = torch.cat((view.positions, theirs[:, None].expand(-1, heads, -1)), 2)
        valid = torch.cat((view.valid, self._real[:, None].expand(-1, heads, -1)), 2)
        first, last = (edge[:, None] for edge in self._asked)
        about = view.valid & (view.positions >= first) & (view.positions < last)
        scored = valid.clone()
        scored[..., :n] &= about | (view.positions < self._repetition.sinks)
        outputs, state = [], dict(view.state)
        for start in range(0, m, BLOCK):
            block = slice(start, min(start + BLOCK, m))
            part = replace(
                call, query=call.query[:, :, block], key=keys, value=values,
                mask=_mask(call.query, valid, positions, theirs[:, block]),
            )  # fmt: skip
            outputs.append(part.run()[0])
            paid = attention_weights(
                call.query[:, :, block], keys, theirs[:, block], positions, scored, call.scaling
            )[..., :n]  # fmt: skip
            shown = about.repeat_interleave(paid.shape[1] // heads, 1)[:, :, None] & self._real[:, None, block, None]
            hidden = received(self._index)[:, block] if projected else None
            state = self._policy.observe_again(view, paid.masked_fill_(~shown, 0.0), state, hidden)
        self._held.write_state(state)
        return torch.cat(outputs, 1), None

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Of a mask that :meth:`attend` replaces."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self._slots + new, self._columns - self._slots

    def get_seq_length(self) -> int:
        """Tokens seen before the repetition."""
        return self._columns

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length


def _mask(like: Tensor, valid: Tensor, positions: Tensor, asking: Tensor) -> Tensor:
    """Additive `[batch, query_heads, m, n]`: which slots queries at the positions `asking [batch, m]` see."""
    seen = valid[:, :, None] & (positions[:, :, None] <= asking[:, None, :, None])
    mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
    mask.masked_fill_(~seen, torch.finfo(like.dtype).min)
    return mask.repeat_interleave(like.shape[1] // seen.shape[1], 1)
