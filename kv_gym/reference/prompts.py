"""Prompts to record from the reference tasks: contexts, and one continuation per question."""

from __future__ import annotations

from collections.abc import Iterator

from kv_gym.errors import UserError
from kv_gym.reference.generator import FIRST_HELD_OUT_SEED, Context, make_context
from kv_gym.reference.heldout import held_out
from kv_gym.reference.tokenizer import encode, word_ids
from kv_gym.traces.prompts import Prompt


def reference_prompts(
    task: str = "multi_key",
    tokens: int = 512,
    count: int = 64,
    continuations: int = 8,
    split: str = "train",
    seed: int = 0,
) -> Iterator[Prompt]:
    """`count` contexts of a task, each with up to `continuations` questions and answers that follow it.

    Args:
        task: one of `kv_gym.reference.generator.TASKS`.
        tokens: words per context; a beginning token comes before them.
        count: number of contexts.
        continuations: questions per context; each is a continuation of its own.
        split: ``train`` draws from `seed`; ``test`` gives the pinned held-out contexts.
        seed: names the training contexts; sets of different seeds below 1,000 share none.

    Raises:
        UserError: unknown task or split, or a length that the density does not divide.
    """
    if split not in ("train", "test"):
        raise UserError(f"unknown split {split!r}; choose train or test")
    if split == "test":
        contexts = held_out(task, tokens, count).make(count)
    else:
        first = seed * 1_000_000 % FIRST_HELD_OUT_SEED
        contexts = (make_context(task, tokens, first + i, continuations) for i in range(count))
    for i, context in enumerate(contexts):
        name = f"{task}-{tokens}-{split}-{seed if split == 'train' else 'pinned'}-{i}"
        yield _prompt(context, name, split, continuations)


def reference_recipe(task: str, tokens: int, continuations: int, split: str, seed: int) -> dict[str, object]:
    """The recipe of a trace set of these prompts; the count is left out, so that a set can be extended."""
    recipe = {"source": "reference", "task": task, "tokens": tokens, "continuations": continuations, "split": split}
    return recipe | ({"seed": seed} if split == "train" else {})


def _prompt(context: Context, name: str, split: str, continuations: int) -> Prompt:
    questions = context.questions[:continuations]
    return Prompt(
        id=name,
        context_ids=[word_ids()["<bos>"], *encode(context.words)],
        continuation_ids=[encode((*question.question, *question.answer, ".")) for question in questions],
        task=context.task,
        split=split,
        text_hash=name,
    )
