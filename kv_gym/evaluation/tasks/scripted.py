"""Tasks that are scripts: contexts of equal shape run as rows of one cache, which is read once."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from kv_gym.budgets import slots_after
from kv_gym.evaluation.configurations import Configuration, cache_for, fork_all, fork_for
from kv_gym.evaluation.outcomes import Outcome
from kv_gym.evaluation.tasks.base import Task
from kv_gym.evaluation.tasks.script import Aside, Script, alike, scripts_hash
from kv_gym.live import EvictingCache
from kv_gym.models.loading import token_rows

AT_ONCE = 64  # questions asked together: each holds a copy of its context's cache


@dataclass(frozen=True)
class ScriptedTask(Task):
    """A task whose contexts are :class:`~kv_gym.evaluation.tasks.script.Script`.

    Greedy answers are judged in one pass: decoding greedily gives the expected answer exactly when the most likely
    token after each of its prefixes is the next one, so the answer is fed whole and every argmax must be right. Where
    an answer stays in the cache it is the right one, whatever the configuration would have said.

    The first segment is read once for all configurations, with nothing evicted; then the cache is forked for every
    configuration, cut where the script says so, and fed the rest. Configurations are cut only then: where a stream is
    said to be cut ``every:16`` or ``block:64`` tokens, its segments have that size, and a configuration keeps what a
    cache of that trigger keeps.

    Attributes:
        name, trigger: see :class:`~kv_gym.evaluation.tasks.base.Task`.
        scripts: the contexts.
        rows: how many of equal shape are read together.
    """

    name: str
    trigger: str
    scripts: Sequence[Script]
    rows: int = 8

    @cached_property
    def hash(self) -> str:  # type: ignore[override]
        """SHA-256 over everything that is fed, cut and asked."""
        return scripts_hash(self.scripts)

    def batches(self) -> list[Sequence[Script]]:
        """Groups of at most `rows` scripts of one shape."""
        return alike(self.scripts, self.rows)

    def measure(
        self, model, batch: Sequence[Script], configurations: Sequence[Configuration]
    ) -> Iterator[tuple[Configuration, list[Outcome]]]:
        """See :meth:`kv_gym.evaluation.tasks.base.Task.measure`."""
        with cache_for(model, configurations) as shared, ExitStack() as reread:
            opening = _Reading(batch)
            opening.feed(model, shared, 0)
            rereading = {
                id(configuration.policy): configuration.policy
                for configuration in configurations
                if configuration.policy.repetition is not None
            }
            bases = {
                key: _read_again(
                    shared,
                    [configuration for configuration in configurations if configuration.policy is policy],
                    reread,
                )
                for key, policy in rereading.items()
                if batch[0].segments[0].cut
            }
            for configuration in configurations:
                yield (
                    configuration,
                    _measured(model, *bases.get(id(configuration.policy), (shared, 0.0)), opening, configuration),
                )


def _read_again(shared: EvictingCache, same: Sequence[Configuration], until: ExitStack) -> tuple[EvictingCache, float]:
    """The context after one policy's second reading, for all its configurations, and the CPU seconds that it took."""
    started = time.thread_time()
    base = until.enter_context(fork_all(shared, same))
    base.run_second_reading()
    return base, time.thread_time() - started


@dataclass
class _Reading:
    """How far a batch of scripts was read, and what was judged so far.

    Attributes:
        batch: scripts of one shape.
        judged: (row, part, right, nll) of every answer.
        last: `[rows, vocabulary]` logits after the last token fed; None before the first.
    """

    batch: Sequence[Script]
    judged: list[tuple[int, str, bool, float]] = field(default_factory=list)
    last: Tensor | None = None

    @torch.no_grad()
    def feed(self, model, cache: EvictingCache, index: int) -> None:
        """Feed segment `index` of every row, and judge its answers."""
        ids = token_rows(model, [script.segments[index].ids for script in self.batch])
        answers = self.batch[0].segments[index].answers
        keep = 0 if answers else 1  # transformers: 0 means the logits of all tokens
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
        if answers:
            before = torch.zeros_like(logits[:, :1]) if self.last is None else self.last[:, None]
            likelihood = torch.cat((before, logits[:, :-1]), 1).float().log_softmax(-1)
            for answer in answers:
                span = slice(answer.start, answer.stop)
                right, nll = judged(likelihood[:, span], ids[:, span])
                self.judged += [(row, answer.part, *both) for row, both in enumerate(zip(right, nll, strict=True))]
        self.last = logits[:, -1]


def judged(likelihood: Tensor, expected: Tensor) -> tuple[list[bool], list[float]]:
    """Whether each answer is the greedy one, and the mean over its tokens of -log p in nats.

    Args:
        likelihood: `[answers, tokens, vocabulary]`, log p of the token at each place given those before it.
        expected: `[answers, tokens]` int64.
    """
    right = (likelihood.argmax(-1) == expected).all(-1)
    nll = -likelihood.gather(-1, expected[..., None])[..., 0].mean(-1)
    return right.tolist(), nll.tolist()


@torch.no_grad()
def _measured(
    model, shared: EvictingCache, spent: float, opening: _Reading, configuration: Configuration
) -> list[Outcome]:
    batch = opening.batch
    length, segments = batch[0].length, batch[0].segments
    budget = configuration.budget if length is None else slots_after(configuration.budget, length)
    reading = _Reading(batch, list(opening.judged), opening.last)
    held, slots, started = 0, None, time.thread_time() - spent
    last_cut = max((index for index, segment in enumerate(segments) if segment.cut), default=None)
    with fork_for(shared, configuration, budget) as cache:
        for index, segment in enumerate(segments):
            if index:
                reading.feed(model, cache, index)
            if segment.cut:
                cache.compress()
            if index == last_cut:
                weighing = time.thread_time()
                held, slots = bytes_held(cache), cache.kept().double().cpu()
                started += time.thread_time() - weighing
        asked = [(row, aside) for row, script in enumerate(batch) for aside in script.asides]
        reading.judged += answers(model, cache, asked)
    seconds = (time.thread_time() - started) / len(batch)
    return _outcomes(reading, held // len(batch), slots, seconds)


def bytes_held(cache: EvictingCache) -> int:
    """Bytes of a copy, which has no room for tokens to come: configurations grow their buffers by different steps."""
    with cache.fork() as copy:
        return copy.nbytes()


def answers(
    model, cache: EvictingCache, asked: Sequence[tuple[int, Aside]]
) -> Iterator[tuple[int, str, bool, float]]:  # fmt: skip
    """Ask each question on a copy of its row of the cache, questions of equal size together.

    Args:
        model: the cache's.
        cache: stays as it is.
        asked: pairs of the row and the question.

    Yields:
        Row, part, whether the greedy answer is right, and mean -log p of its tokens in nats.
    """
    size = lambda item: (len(item[1].question_ids), len(item[1].answer_ids))  # noqa: E731
    groups = [list(items) for _, items in groupby(sorted(asked, key=size), size)]
    for same in (group[start : start + AT_ONCE] for group in groups for start in range(0, len(group), AT_ONCE)):
        question_size = len(same[0][1].question_ids)
        ids = token_rows(model, [(*aside.question_ids, *aside.answer_ids) for _, aside in same])
        with cache.fork() as fork, torch.no_grad():
            fork.batch_select_indices(torch.tensor([row for row, _ in same], device=model.device))
            logits = model(input_ids=ids[:, :-1], past_key_values=fork, use_cache=True).logits
        likelihood = logits[:, question_size - 1 :].float().log_softmax(-1)
        for (row, aside), right, nll in zip(same, *judged(likelihood, ids[:, question_size:]), strict=True):
            yield row, aside.part, right, nll


def _outcomes(reading: _Reading, held: int, slots: Tensor | None, seconds: float) -> list[Outcome]:
    parts: dict[tuple[int, str], list[tuple[bool, float]]] = defaultdict(list)
    for row, part, right, nll in reading.judged:
        parts[row, part].append((right, nll))
    several = [sum(1 for other, _ in parts if other == row) for row in range(len(reading.batch))]
    return [
        Outcome(
            reading.batch[row].id,
            part,
            len(found),
            float(sum(right for right, _ in found)),
            math.fsum(nll for _, nll in found),
            held,
            None if slots is None else slots[:, row],
            seconds / several[row],
        )
        for (row, part), found in sorted(parts.items(), key=lambda item: item[0][0])
    ]
