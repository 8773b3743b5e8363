"""Tasks whose answers are written freely: greedy generation from the cut context, and a score of the text."""

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

from kv_gym.evaluation.configurations import Configuration, cache_for, fork_for
from kv_gym.evaluation.outcomes import Outcome
from kv_gym.evaluation.tasks.base import Task
from kv_gym.evaluation.tasks.scripted import bytes_held
from kv_gym.models.loading import token_rows


@dataclass(frozen=True)
class Prompt:
    """One context and its question.

    Attributes:
        id: the same for all configurations.
        context_ids: read before the cut.
        question_ids: read after it; none where the question stands at the end of the context.
        answers: texts that would be right.
        new_tokens: how many may be written.
        classes: all that could be an answer, where one class is to be named.
        score: which of the task's scores.
    """

    id: str
    context_ids: tuple[int, ...]
    question_ids: tuple[int, ...]
    answers: tuple[str, ...]
    new_tokens: int
    classes: tuple[str, ...] = ()
    score: str = ""


@dataclass(frozen=True)
class WrittenTask(Task):
    """Each context is read and cut once; every configuration writes its own answer until it ends or is long enough.

    Where the question was seen, the first token of an answer comes from the forward that read the context, as in any
    deployment.

    Attributes:
        name: see :class:`~kv_gym.evaluation.tasks.base.Task`.
        prompts: the contexts.
        score: what a text is worth, from 0 to 1.
        tokenizer: the model's.
    """

    name: str
    prompts: Sequence[Prompt]
    score: Callable[[str, Prompt], float]
    tokenizer: Any
    trigger = "prefill"

    @cached_property
    def hash(self) -> str:  # type: ignore[override]
        """SHA-256 over all prompts, their answers and how they are scored."""
        return hashlib.sha256(json.dumps([astuple(prompt) for prompt in self.prompts]).encode()).hexdigest()

    def batches(self) -> list[Sequence[Prompt]]:
        """One prompt each: they differ in length, and answers even more so."""
        return [[prompt] for prompt in self.prompts]

    def measure(
        self, model, batch: Sequence[Prompt], configurations: Sequence[Configuration]
    ) -> Iterator[tuple[Configuration, list[Outcome]]]:
        """See :meth:`kv_gym.evaluation.tasks.base.Task.measure`; `right` is the score, `nll` NaN."""
        for configuration in configurations:
            configuration.allocation.refuse_unfit(configuration.policy)
        found: list[list[Outcome]] = [[] for _ in configurations]
        for prompt in batch:
            with cache_for(model, configurations) as shared:
                last = _fed(model, shared, prompt.context_ids)
                for place, configuration in enumerate(configurations):
                    found[place].append(self._outcome(model, shared, last, prompt, configuration))
        yield from zip(configurations, found, strict=True)

    @torch.no_grad()
    def _outcome(self, model, shared, last: Tensor, prompt: Prompt, configuration: Configuration) -> Outcome:
        started = time.thread_time()
        with fork_for(shared, configuration) as cache:
            cache.compress()
            weighing = time.thread_time()
            held, slots = bytes_held(cache), cache.kept()[:, 0].double().cpu()
            started += time.thread_time() - weighing
            if prompt.question_ids:
                last = _fed(model, cache, prompt.question_ids)
            said: list[int] = []
            ends = ending_tokens(model)
            while len(said) < prompt.new_tokens:
                said.append(int(last.argmax()))
                if said[-1] in ends or len(said) == prompt.new_tokens:
                    break
                last = _fed(model, cache, said[-1:])
        seconds = time.thread_time() - started
        right = self.score(self.tokenizer.decode(said, skip_special_tokens=True), prompt)
        return Outcome(prompt.id, "", 1, right, math.nan, held, slots, seconds)


def ending_tokens(model) -> set[int]:
    """The tokens at which the model's generation ends."""
    ends = model.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


@torch.no_grad()
def _fed(model, cache, ids: Sequence[int]) -> Tensor:
    """Logits `[vocabulary]` after the last of some tokens."""
    tokens = token_rows(model, [ids])
    return model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]


def without_middle(ids: Sequence[int], most: int | None) -> tuple[int, ...]:
    """At most so many tokens, the first and the last half of them: how LongBench shortens what a model cannot hold."""
    if most is None or len(ids) <= most:
        return tuple(ids)
    return (*ids[: most - most // 2], *ids[len(ids) - most // 2 :])
