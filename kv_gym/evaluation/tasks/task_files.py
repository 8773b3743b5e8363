"""Task files: what a line holds, and its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from kv_gym.errors import UserError
from kv_gym.models.loading import beginning_ids, plain_ids


def _with_content(text: str) -> str:
    if not text.strip():
        raise ValueError("expected a text that is not empty")
    return text


def _with_items(texts: list[str]) -> list[str]:
    if not texts:
        raise ValueError("expected at least one text")
    return texts


Text = Annotated[str, AfterValidator(_with_content)]
"""A text that is not empty."""
Texts = Annotated[list[str], AfterValidator(_with_items)]
"""At least one text."""


class TaskLine(BaseModel):
    """A line of a task file; keys that a subclass does not know say nothing of the question and are left out."""

    model_config = ConfigDict(extra="ignore", strict=True)


def require_tokenizer(tokenizer, place: str | Path) -> None:
    """Raise a UserError where a text has no tokenizer to make tokens of it."""
    if tokenizer is None:
        raise UserError(
            f"{place} holds text and the model has no tokenizer; give the tokenizer, or a model that has one"
        )


def encode_text(tokenizer, text: str, is_context: bool = False) -> list[int]:
    """Token ids of a text: a context begins with the tokenizer's beginning token, and nothing has an end token.

    Args:
        tokenizer: the model's.
        text: a context, or what follows one.
        is_context: whether it is a context; one that has no token of its own gets no beginning token either.
    """
    ids = plain_ids(tokenizer, text)
    return [*beginning_ids(tokenizer), *ids] if is_context and ids else ids
