"""Tasks whose answers are free text: greedy generation from the compressed context, and a score of the text."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kv_gym.errors import UserError
from kv_gym.evaluation.configurations import Configuration, cache_for, fork_for
from kv_gym.evaluation.outcomes import Outcome
from kv_gym.evaluation.tasks.base import Task
from kv_gym.evaluation.tasks.scripted import bytes_held
from kv_gym.evaluation.tasks.task_files import encode_text
from kv_gym.models.cache_name import with_cache
from kv_gym.models.chat_template import ChatTemplate
from kv_gym.models.loading import end_tokens, token_rows


@dataclass(frozen=True)
class FreeTextPrompt:
    """One context and its question.

    Attributes:
        id: the same for all configurations.
        context_ids: read before the compression.
        question_ids: read after it; none where the question stands at the end of the context.
        answers: texts that are right.
        max_new_tokens: how many may be generated.
        classes: all class names, where one is to be named.
        score: which of the task's scores.
    """

    id: str
    context_ids: tuple[int, ...]
    question_ids: tuple[int, ...]
    answers: tuple[str, ...]
    max_new_tokens: int
    classes: tuple[str, ...] = ()
    score: str = ""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens (new) is {self.max_new_tokens}, and an answer has 1 token or more")


@dataclass(frozen=True)
class FreeTextTask(Task):
    """Each context is read and compressed once; every configuration generates its own answer, greedily.

    Generation ends at the model's end token or after the prompt's number of new tokens. Where the question was seen,
    the first token of an answer comes from the forward pass that read the context, as in any deployment.

    Attributes:
        name: see :class:`~kv_gym.evaluation.tasks.base.Task`.
        prompts: the contexts.
        score: score of a text, from 0 to 1.
        tokenizer: the model's.
    """

    name: str
    prompts: Sequence[FreeTextPrompt]
    score: Callable[[str, FreeTextPrompt], float]
    tokenizer: Any
    trigger = "prefill"

    @cached_property
    def hash(self) -> str:  # type: ignore[override]
        """SHA-256 of all prompts, their answers and how they are scored."""
        return hashlib.sha256(json.dumps([astuple(prompt) for prompt in self.prompts]).encode()).hexdigest()

    @property
    def longest(self) -> int:
        """See :attr:`kv_gym.evaluation.tasks.base.Task.longest`."""
        lengths = (len(p.context_ids) + len(p.question_ids) + p.max_new_tokens for p in self.prompts)
        return max(lengths, default=0)

    def batches(self) -> list[Sequence[FreeTextPrompt]]:
        """One prompt each: they differ in length, and answers even more so."""
        return [[prompt] for prompt in self.prompts]

    def measure(
        self, model, batch: Sequence[FreeTextPrompt], configurations: Sequence[Configuration]
    ) -> Iterator[tuple[Configuration, list[Outcome]]]:
        """See :meth:`kv_gym.evaluation.tasks.base.Task.measure`; `correct` is the score, `nll` NaN."""
        outcomes: list[list[Outcome]] = [[] for _ in configurations]
        for prompt in batch:
            with cache_for(model, configurations) as shared:
                logits = _feed(model, shared, prompt.context_ids)
                for measured, configuration in zip(outcomes, configurations, strict=True):
                    measured.append(self._outcome(model, shared, logits, prompt, configuration))
        yield from zip(configurations, outcomes, strict=True)

    @torch.no_grad()
    def _outcome(self, model, shared, logits: Tensor, prompt: FreeTextPrompt, configuration: Configuration) -> Outcome:
        started = time.thread_time()
        with fork_for(shared, configuration) as cache:
            cache.compress()
            paused = time.thread_time()
            nbytes, slots = bytes_held(cache), cache.kept()[:, 0].double().cpu()
            started += time.thread_time() - paused
            if prompt.question_ids:
                logits = _feed(model, cache, prompt.question_ids)
            generated: list[int] = []
            ends = end_tokens(model)
            while True:
                generated.append(int(logits.argmax()))
                if generated[-1] in ends or len(generated) == prompt.max_new_tokens:
                    break
                logits = _feed(model, cache, generated[-1:])
        seconds = time.thread_time() - started
        score = self.score(self.tokenizer.decode(generated, skip_special_tokens=True), prompt)
        return Outcome(prompt.id, "", 1, score, math.nan, nbytes, slots, seconds)


def encode_prompt(
    tokenizer,
    context: str,
    question: str,
    answer_prefix: str = "",
    seen: bool = False,
    max_tokens: int | None = None,
    chat: bool = False,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of a context and of a question.

    Args:
        tokenizer: the model's; its beginning token stands before the context alone.
        context: read before the compression.
        question: read after it.
        answer_prefix: with which the answer begins.
        seen: put the question at the end of the context, and leave none.
        max_tokens: of the context; the middle of a longer one is left out.
        chat: context and question are a user's message, rendered by the tokenizer's chat template.
    """
    if chat:
        template = ChatTemplate(tokenizer)
        texts = template.ask([{"role": "user", "content": context}], question, answer_prefix)
        whole, asked = map(template.ids, texts)
    else:
        whole = encode_text(tokenizer, context, is_context=True)
        asked = encode_text(tokenizer, question + answer_prefix)
    context_ids, question_ids = without_middle(whole, max_tokens), tuple(asked)
    return (context_ids + question_ids, ()) if seen else (context_ids, question_ids)


def without_middle(ids: Sequence[int], max_tokens: int | None) -> tuple[int, ...]:
    """At most `max_tokens` tokens, the first and the last half of them, as LongBench shortens long contexts.

    Raises:
        UserError: fewer than one token.
    """
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens (most) is {max_tokens}, and a context has 1 token or more")
    if max_tokens is None or len(ids) <= max_tokens:
        return tuple(ids)
    return (*ids[: max_tokens - max_tokens // 2], *ids[len(ids) - max_tokens // 2 :])


@torch.no_grad()
def _feed(model, cache, ids: Sequence[int]) -> Tensor:
    """Logits `[vocabulary]` after the last of some tokens."""
    tokens = token_rows(model, [ids])
    return model(input_ids=tokens, **with_cache(cache), use_cache=True, logits_to_keep=1).logits[0, -1]
