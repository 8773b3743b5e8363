"""Token ids on their way into a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kv_gym.errors import UserError


def token_rows(model, rows: Sequence[Sequence[int]]) -> Tensor:
    """`[rows, tokens]` int64 on the model's device; rows are of one length.

    Raises:
        UserError: an id that the model has no embedding for, which would end in an error of the machine.
    """
    vocabulary = model.config.get_text_config().vocab_size
    largest = max((max(row) for row in rows if row), default=0)
    if largest >= vocabulary:
        raise UserError(
            f"a text holds token id {largest} and the model knows ids below {vocabulary}: make its ids with the "
            "tokenizer of this model"
        )
    return torch.tensor([list(row) for row in rows], dtype=torch.int64, device=model.device)
