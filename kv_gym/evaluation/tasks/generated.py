"""What tasks of the reference generator share: its contexts, their words as tokens of a model, and random choices."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kv_gym.errors import UserError
from kv_gym.reference.generator import FIRST_HELD_OUT_SEED, Context, make_context
from kv_gym.reference.heldout import CONTEXTS, QUESTIONS, held_out
from kv_gym.reference.tokenizer import encode, word_ids

SEEDS_PER_SET = 1_000_000  # of the generator, for each `seed` of a task
Item = TypeVar("Item")


def generated_contexts(task: str, tokens: int, count: int | None = None, seed: int | None = None) -> Iterator[Context]:
    """Contexts of a task and a length.

    Args:
        task: one of `kv_gym.reference.generator.TASKS`.
        tokens: words per context.
        count: number of contexts, 64 by default.
        seed: None gives the pinned held-out contexts, on which results are reported; a number below 1,000 gives
            others, which may be those that ``kv-gym record --seed`` makes for training: take one that no policy was
            trained on.

    Raises:
        UserError: unknown task, a length that the generator does not make, or a seed out of range.
    """
    if seed is None:
        return held_out(task, tokens, count).make(count)
    first = first_seed(seed)
    return (make_context(task, tokens, first + i, QUESTIONS) for i in range(CONTEXTS if count is None else count))


def first_seed(seed: int) -> int:
    """The generator's first seed of a set of contexts that is not held out.

    Raises:
        UserError: a seed whose contexts would be the held-out ones.
    """
    if not 0 <= seed < FIRST_HELD_OUT_SEED // SEEDS_PER_SET:
        raise UserError(f"seeds of contexts are from 0 to {FIRST_HELD_OUT_SEED // SEEDS_PER_SET - 1}, got {seed}")
    return seed * SEEDS_PER_SET


def name_with_seed(name: str, seed: int | None) -> str:
    """A task's name, with the seed of its contexts where they are not the held-out ones."""
    return name if seed is None else f"{name} seed {seed}"


def sample(items: Sequence[Item], count: int, seed: str | random.Random) -> list[Item]:
    """Up to `count` distinct items in random order.

    Only ``random()`` is called, whose stream Python guarantees: the choice is the same on every machine and in every
    version.

    Args:
        items: what to choose from.
        count: how many.
        seed: a text that names the choice, or a stream of random numbers to go on with.
    """
    stream = seed if isinstance(seed, random.Random) else random.Random(seed)
    return [items[index] for _, index in sorted((stream.random(), index) for index in range(len(items)))][:count]


@dataclass(frozen=True)
class WordEncoder:
    """Words of the reference language as tokens: one each for the reference model, any number for another.

    Attributes:
        tokenizer: of another model; None means the reference model's.
    """

    tokenizer: Any = None

    @classmethod
    def for_tokenizer(cls, tokenizer) -> WordEncoder:
        """The encoder for a model's tokenizer; None, or one with the reference vocabulary, is the reference's."""
        is_reference = tokenizer is None or tokenizer.get_vocab() == word_ids()
        return cls(None if is_reference else tokenizer)

    @property
    def beginning(self) -> tuple[int, ...]:
        """The tokens that stand before every text; none for some models."""
        if self.tokenizer is None:
            return (word_ids()["<bos>"],)
        return () if self.tokenizer.bos_token_id is None else (self.tokenizer.bos_token_id,)

    def encode(self, words: Sequence[str]) -> tuple[int, ...]:
        """Tokens of words inside a text; for another model with a space before each."""
        if self.tokenizer is None:
            return tuple(encode(words))
        text = "".join(f" {word}" for word in words)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
