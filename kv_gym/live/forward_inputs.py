"""What a forward brings to an evicting cache: its tokens, padding and positions, and refusals of what goes wrong."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kv_gym.devices import to_device
from kv_gym.errors import UserError


def new_tokens(arguments: Mapping[str, Any]) -> int:
    """How many tokens a forward brings, by the decoder's arguments.

    Raises:
        UserError: none, or images.
    """
    if arguments.get("pixel_values") is not None:
        raise UserError("an evicting cache serves text only and was given images: leave pixel_values out")
    given = [arguments.get(name) for name in ("input_ids", "inputs_embeds")]
    count = next((tensor.shape[1] for tensor in given if tensor is not None), 0)
    if not count:
        raise UserError("a forward brought no tokens: give at least one that the cache has not seen")
    return count


def refuse_attention_weights(arguments: Mapping[str, Any], config: Any) -> None:
    """Raise a UserError where a forward asks for attention weights: the heads of a cache hold different tokens."""
    asked = arguments.get("output_attentions")
    if getattr(config.get_text_config(), "output_attentions", False) if asked is None else asked:
        raise UserError(
            "an evicting cache has no attention weights to give, because every head holds its own tokens: leave "
            "output_attentions out, or read without the cache"
        )


def new_token_mask(mask: Tensor | None, seen: int, tokens_seen: Sequence[int], count: int) -> Tensor | None:
    """Which tokens of a coming forward are no padding: bool `[batch, m]` on the CPU, or None where none is padding.

    Args:
        mask: `[batch, seen + m]`, one for every token so far and to come, or None.
        seen: tokens that came before, padding included.
        tokens_seen: how many of them were real, per row.
        count: m, how many tokens the forward brings.

    Raises:
        UserError: a mask of other than two dimensions, or of more or other tokens than came; or one that hides other
            tokens than it hid when they came.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise UserError(
            "an evicting cache makes its own causal mask and was given an explicit one of other than two "
            "dimensions: leave attention_mask out"
        )
    real = mask.bool().cpu()
    before, new = real[:, :seen].sum(1).tolist(), real[:, seen:]
    if new.shape[1] != count:
        raise UserError(
            f"the attention mask covers {mask.shape[1]} tokens and {seen} were seen before this forward of {count}: "
            "give one that covers the tokens seen and the new ones"
        )
    if tokens_seen and before != list(tokens_seen):
        raise UserError(
            f"the attention mask shows {before} of the tokens seen and the cache read {list(tokens_seen)}: "
            "what is padding is decided when a token comes, so give the same mask with the new tokens appended"
        )
    return None if bool(new.all()) else new


def text_positions(positions: Tensor | None) -> Tensor | None:
    """Position ids `[batch or 1, m]` of text, or None where none were given.

    Args:
        positions: the same; or `[3 or 4, batch, m]` of models that also read images, which are alike for text.

    Raises:
        UserError: positions of other than text.
    """
    if positions is None or positions.dim() < 3:
        return positions
    if positions.shape[-1] > 1 and not bool((positions == positions[:1]).all()):
        raise UserError(
            "the position ids are of images or video, and an evicting cache serves text only: give a prompt of text"
        )
    return positions[0]


def refuse_shifted(positions: Tensor, seen: int, tokens_seen: Sequence[int]) -> None:
    """Raise a UserError for position ids `[batch or 1, m]` of another text, or of packed or shifted sequences.

    They count on from the tokens seen, or, in rows that hold padding, from the real ones.
    """
    ahead = torch.arange(positions.shape[-1], device=positions.device)
    starts = to_device(torch.tensor([[seen], *([count] for count in tokens_seen)]), positions.device)
    allowed = (positions[:, None] == (starts + ahead)[None]).all(-1).any(1)
    if not bool(allowed.all()):
        first = int(positions[~allowed][0, 0])
        raise UserError(
            f"the position ids begin at {first} and do not count on from the {seen} tokens seen: for another text call "
            "reset() or make a new cache; to go on, give generate() the whole text so far with the new tokens behind "
            "it (packed or shifted sequences are not served)"
        )


def prefill_is_unfinished() -> bool:
    """Whether ``generate(prefill_chunk_size=...)`` is on the stack, with more chunks of the prompt to come.

    Nothing that transformers gives to a model or a cache says so.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_prefill" and "input_chunks" in frame.f_locals:
            return frame.f_locals.get("input_chunk") is not frame.f_locals["input_chunks"][-1]
        frame = frame.f_back  # type: ignore[assignment]
    return False
