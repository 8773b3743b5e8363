"""What a forward's attention mask and position ids say about its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kv_gym.errors import UserError


def fresh_tokens(mask: Tensor | None, seen: int, rows: Sequence[int]) -> Tensor | None:
    """Which tokens of a coming forward are real: bool `[batch, m]` on the CPU, or None where none is padding.

    Args:
        mask: `[batch, seen + m]`, one for every token so far and to come, or None.
        seen: tokens that came before, padding included.
        rows: how many of them were real, per row.

    Raises:
        UserError: a mask of other than two dimensions, or of other tokens than came; or one that hides other tokens
            than it hid when they came.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise UserError(
            "an evicting cache makes its own causal mask and was given an explicit one of other than two "
            "dimensions: leave attention_mask out"
        )
    real = mask.bool().cpu()
    before, fresh = real[:, :seen], real[:, seen:]
    if not fresh.shape[1]:
        raise UserError(
            f"the attention mask covers {mask.shape[1]} tokens and {seen} were seen before this forward: give one "
            "that covers the tokens seen and the new ones"
        )
    if rows and before.sum(1).tolist() != list(rows):
        raise UserError(
            f"the attention mask shows {before.sum(1).tolist()} of the tokens seen and the cache read {list(rows)}: "
            "what is padding is decided when a token comes, so give the same mask with the new tokens appended"
        )
    return None if bool(fresh.all()) else fresh


def refuse_shifted(positions: Tensor, seen: int, rows: Sequence[int]) -> None:
    """Raise a UserError for position ids `[batch, m]` of packed or shifted sequences.

    They count on from the tokens seen, or, in rows that hold padding, from the real ones.
    """
    ahead = torch.arange(positions.shape[-1], device=positions.device)
    starts = torch.tensor([[seen], *([count] for count in rows)], device=positions.device)
    allowed = (positions[:, None] == (starts + ahead)[None]).all(-1).any(1)
    if not bool(allowed.all()):
        raise UserError(
            f"the position ids do not count on from the {seen} tokens seen, and packed or shifted "
            "sequences are not served: leave position_ids out"
        )
