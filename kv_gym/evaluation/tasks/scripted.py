"""Tasks written as scripts: tokens to feed, where to compress, which tokens are answers, which questions to ask.

Contexts of equal shape run as rows of one cache, which is read once for all configurations.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from kv_gym.budgets import slots_after
from kv_gym.evaluation.configurations import Configuration, cache_for, fork_all, fork_for
from kv_gym.evaluation.outcomes import Outcome
from kv_gym.evaluation.tasks.base import Task
from kv_gym.live import EpisodicCache, EvictingCache
from kv_gym.live.selection import SelectAll
from kv_gym.models.cache_name import with_cache
from kv_gym.models.loading import token_rows

LARGEST_GROUP = 64  # questions asked together: each holds a copy of its context's cache
PADDED = 1.25  # the longest of them is at most so many times as long as the shortest


@dataclass(frozen=True)
class AnswerSpan:
    """Tokens `start` to `stop` of a segment, judged as one answer; the tokens before them are its prompt.

    Attributes:
        start, stop: places in the segment.
        part: which part of the context it belongs to, see :attr:`kv_gym.evaluation.outcomes.Outcome.part`.
    """

    start: int
    stop: int
    part: str = ""


@dataclass(frozen=True)
class Segment:
    """Tokens that are fed in one forward pass and stay in the cache.

    Attributes:
        ids: the tokens.
        answers: which of them are judged. An answer may begin with the segment's first token, which the last token
            of the segment before predicts.
        compress: compress the cache when the segment has been read.
    """

    ids: tuple[int, ...]
    answers: tuple[AnswerSpan, ...] = ()
    compress: bool = False


@dataclass(frozen=True)
class ForkedQuestion:
    """A question asked on a copy of the cache when all segments have been read, so that no other question sees it.

    Attributes:
        question_ids: what follows the context.
        answer_ids: the whole answer.
        part: which part of the context it belongs to, see :attr:`kv_gym.evaluation.outcomes.Outcome.part`.
    """

    question_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    part: str = ""


@dataclass(frozen=True)
class TaskScript:
    """One context of a task.

    Attributes:
        id: the same for all configurations.
        segments: fed one after another; at least one.
        questions: asked at the end, each on a copy of the cache.
        length: tokens of which a budget that is a share takes its share at every compression, so that the cache is
            bounded in slots; None means the tokens seen so far.
        utterances: of a conversation that is one segment, how many tokens lie before the end of each utterance, for
            whoever divides it into episodes; empty: not known.
    """

    id: str
    segments: tuple[Segment, ...]
    questions: tuple[ForkedQuestion, ...] = ()
    length: int | None = None
    utterances: tuple[int, ...] = ()

    @classmethod
    def of_one_context(
        cls, number: int, ids: Sequence[int], questions: Iterable[ForkedQuestion], utterances: Sequence[int] = ()
    ) -> TaskScript:
        """A context that is read and compressed at once, before its questions are known."""
        return cls(str(number), (Segment(tuple(ids), compress=True),), tuple(questions), utterances=tuple(utterances))

    @property
    def shape(self) -> tuple:
        """Scripts of equal shape can be fed together as rows of one cache; forked questions do not matter."""
        return self.length, tuple((len(each.ids), each.answers, each.compress) for each in self.segments)


@dataclass(frozen=True)
class ScriptedTask(Task):
    """A task whose contexts are scripts.

    Greedy answers are judged in one pass: decoding greedily gives the expected answer exactly when the most likely
    token after each of its prefixes is the next one, so the answer is fed whole and every argmax must be right. Where
    an answer stays in the cache it is the right one, whatever the configuration would have generated.

    The first segment is read once for all configurations, with nothing evicted; then the cache is forked for every
    configuration, compressed where the script says so, and fed the rest. It is compressed nowhere else: the segments of
    a task with the trigger ``every:16`` or ``block:64`` have that size, and a configuration keeps what a cache of that
    trigger keeps.

    Attributes:
        name, trigger: see :class:`~kv_gym.evaluation.tasks.base.Task`.
        scripts: the contexts.
        rows: how many of equal shape are read together.
        by_token: whether each token of a forked question's answer is judged as an answer of its own.
        list_answers: whether outcomes list the answers to forked questions one by one.
    """

    name: str
    trigger: str
    scripts: Sequence[TaskScript]
    rows: int = 8
    by_token: bool = False
    list_answers: bool = False

    @cached_property
    def hash(self) -> str:  # type: ignore[override]
        """SHA-256 of everything that is fed, compressed and asked."""
        digest = hashlib.sha256()
        for script in self.scripts:
            digest.update(json.dumps(astuple(script)[:-1]).encode())  # all but the utterances, which are not asked
        if self.by_token:
            digest.update(b"by token")
        return digest.hexdigest()

    @property
    def longest(self) -> int:
        """See :attr:`kv_gym.evaluation.tasks.base.Task.longest`; a stream may be longer than the model's positions."""
        return max(map(_script_length, self.scripts), default=0) if self.trigger == "prefill" else 0

    def batches(self) -> list[Sequence[TaskScript]]:
        """Groups of at most `rows` scripts of one shape, ordered by the first of each shape."""
        shapes: dict[tuple, list[TaskScript]] = defaultdict(list)
        for script in self.scripts:
            shapes[script.shape].append(script)
        return [same[start : start + self.rows] for same in shapes.values() for start in range(0, len(same), self.rows)]

    def measure(
        self, model, batch: Sequence[TaskScript], configurations: Sequence[Configuration]
    ) -> Iterator[tuple[Configuration, list[Outcome]]]:
        """See :meth:`kv_gym.evaluation.tasks.base.Task.measure`."""
        divides = self.trigger == "prefill" and all(len(script.segments) == 1 for script in batch)
        sharing = [each for each in configurations if each.episodes is None or not divides]
        with cache_for(model, sharing) as shared, ExitStack() as stack:
            prefill = _BatchReader(batch)
            if sharing:
                prefill.feed(model, shared, 0)
            bases: dict[int, tuple[EvictingCache, float]] = {}  # of each policy with a second reading
            for policy in (each.policy for each in sharing):
                if batch[0].segments[0].compress and policy.repetition is not None and id(policy) not in bases:
                    same = [each for each in sharing if each.policy is policy]
                    bases[id(policy)] = _second_reading(shared, same, stack)
            for configuration in configurations:
                if divides and configuration.episodes is not None:
                    yield configuration, self._measure_episodes(model, batch, configuration)
                    continue
                cache, seconds = bases.get(id(configuration.policy), (shared, 0.0))
                yield configuration, self._measure_one(model, cache, seconds, prefill, configuration)

    @torch.no_grad()
    def _measure_one(
        self, model, shared: EvictingCache, seconds: float, prefill: _BatchReader, configuration: Configuration
    ) -> list[Outcome]:
        """Outcomes of one configuration; `seconds` were spent on it before."""
        batch = prefill.batch
        length, segments = batch[0].length, batch[0].segments
        budget = configuration.budget if length is None else slots_after(configuration.budget, length)
        reader = _BatchReader(batch, list(prefill.answers), prefill.last_logits)
        nbytes, slots, started = 0, None, time.thread_time() - seconds
        read: dict[int, list[float]] = defaultdict(list)
        last_compression = max((index for index, segment in enumerate(segments) if segment.compress), default=None)
        with fork_for(shared, configuration, budget) as cache:
            for index, segment in enumerate(segments):
                if index:
                    reader.feed(model, cache, index)
                if segment.compress:
                    cache.compress()
                if index == last_compression:
                    paused = time.thread_time()
                    nbytes, slots = bytes_held(cache), cache.kept().double().cpu()
                    started += time.thread_time() - paused
            questions = [(row, question) for row, script in enumerate(batch) for question in script.questions]
            reader.answers += self._ask(model, cache, questions, read)
        seconds = (time.thread_time() - started) / len(batch)
        return _outcomes(reader, nbytes // len(batch), slots, seconds, read)

    @torch.no_grad()
    def _measure_episodes(self, model, batch: Sequence[TaskScript], configuration: Configuration) -> list[Outcome]:
        """Outcomes of one configuration that divides contexts into episodes, context by context.

        The seconds are those of everything: nothing of the reading is shared.
        """
        assert configuration.episodes is not None
        outcomes = []
        for script in batch:
            started, reader, read = time.thread_time(), _BatchReader([script]), dict[int, list[float]]()
            read[0] = []
            ids, division = script.segments[0].ids, configuration.episodes
            cache = EpisodicCache(
                model, division.find(model, ids, script.utterances), configuration.policy, configuration.budget,
                configuration.allocation, division.block, configuration.sinks, configuration.recent,
                configuration.evicted, configuration.select,
            )  # fmt: skip
            cache.read(ids)
            asked: dict[int, list[tuple[int, ForkedQuestion]]] = defaultdict(list)
            for question in script.questions:
                asked[cache.choose(question.question_ids)].append((0, question))
            for episode, questions in asked.items():
                with cache.of_episode(episode) as chosen:
                    reader.answers += self._ask(model, chosen, questions, read)
            seconds, slots = time.thread_time() - started, cache.kept().double().mean(0)
            found = _outcomes(reader, cache.nbytes(), slots, seconds, read)
            outcomes += [replace(outcome, tokens_read=cache.tokens_read) for outcome in found]
        return outcomes

    def _ask(
        self,
        model,
        cache: EvictingCache,
        questions: Sequence[tuple[int, ForkedQuestion]],
        read: dict[int, list[float]],
    ) -> Iterator[_Answer]:
        """Ask each question on a copy of its row of the cache, questions of similar size together.

        Args:
            model: that answers.
            cache: of all rows.
            questions: each with its row.
            read: takes, by row, how many slots of a KV head the queries of each question read.
        """
        # padding behind a question is one more query, which must not choose what the others read
        spread = PADDED if isinstance(cache.config.select, SelectAll) else 1.0
        for group in _similar(questions, spread):
            sizes = [len(question.question_ids) + len(question.answer_ids) for _, question in group]
            longest, first = max(sizes), min(len(question.question_ids) for _, question in group)
            rows = [
                (*question.question_ids, *question.answer_ids, *[0] * (longest - size))
                for (_, question), size in zip(group, sizes, strict=True)
            ]
            ids = token_rows(model, rows)
            with cache.fork() as fork, torch.no_grad():
                fork.batch_select_indices(torch.tensor([row for row, _ in group], device=model.device))
                logits = model(
                    input_ids=ids[:, :-1], **with_cache(fork), use_cache=True, logits_to_keep=longest - first
                ).logits
                counts = fork.slots_read().double().mean((0, 2)).tolist()
            for i, (row, question) in enumerate(group):
                read[row].append(counts[i] - (longest - sizes[i]))
                start = len(question.question_ids)
                likelihood = logits[i, start - first : sizes[i] - first].float().log_softmax(-1)
                for answer in self._judged(likelihood, ids[i, start : sizes[i]]):
                    yield _Answer(row, question.part, *answer)

    def _judged(self, likelihood: Tensor, expected: Tensor) -> list[tuple]:
        """Whether an answer is right, its nll and what is listed of it; with `by_token`, of each of its tokens."""
        if self.by_token:
            return list(zip(*judge_answers(likelihood[:, None], expected[:, None]), strict=True))
        ((right,), (nll,)) = judge_answers(likelihood[None], expected[None])
        begun = int(likelihood[0].argmax() == expected[0]) if self.list_answers else 0
        return [(right, nll, (begun + int(right), round(nll * len(expected), 3)) if self.list_answers else None)]


def _similar(
    questions: Sequence[tuple[int, ForkedQuestion]], spread: float
) -> Iterator[list[tuple[int, ForkedQuestion]]]:
    """Questions of similar size, each with its row, in groups that are asked together.

    Args:
        questions: each with its row.
        spread: the longest of a group is at most so many times as long as its shortest.
    """

    def size(item: tuple[int, ForkedQuestion]) -> tuple[int, int]:
        return len(item[1].question_ids) + len(item[1].answer_ids), len(item[1].answer_ids)

    group: list[tuple[int, ForkedQuestion]] = []
    for item in sorted(questions, key=size):
        if group and (len(group) == LARGEST_GROUP or size(item)[0] > spread * size(group[0])[0]):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _script_length(script: TaskScript) -> int:
    asked = max((len(each.question_ids) + len(each.answer_ids) for each in script.questions), default=0)
    return sum(len(segment.ids) for segment in script.segments) + asked


def _second_reading(
    shared: EvictingCache, configurations: Sequence[Configuration], stack: ExitStack
) -> tuple[EvictingCache, float]:
    """The context after the second reading of one policy, for all its configurations, and its CPU seconds."""
    started = time.thread_time()
    cache = stack.enter_context(fork_all(shared, configurations))
    cache.run_second_reading()
    return cache, time.thread_time() - started


class _Answer(NamedTuple):
    """One answer that was judged.

    Attributes:
        row: of the batch.
        part: of the context.
        right: whether greedy decoding would have given it.
        nll: mean over its tokens of -log p, nats.
        listed: what an outcome lists of it, see :attr:`kv_gym.evaluation.outcomes.Outcome.answers`; None: nothing.
    """

    row: int
    part: str
    right: bool
    nll: float
    listed: tuple[int, float] | None = None


@dataclass
class _BatchReader:
    """Feeds a batch of scripts and judges their answers.

    Attributes:
        batch: scripts of one shape.
        answers: every answer so far.
        last_logits: `[rows, vocabulary]` after the last token fed; None before the first.
    """

    batch: Sequence[TaskScript]
    answers: list[_Answer] = field(default_factory=list)
    last_logits: Tensor | None = None

    @torch.no_grad()
    def feed(self, model, cache: EvictingCache, index: int) -> None:
        """Feed segment `index` of every row, and judge its answers."""
        ids = token_rows(model, [script.segments[index].ids for script in self.batch])
        spans = self.batch[0].segments[index].answers
        keep = 0 if spans else 1  # transformers: 0 means the logits of all tokens
        logits = model(input_ids=ids, **with_cache(cache), use_cache=True, logits_to_keep=keep).logits
        if spans:
            before = torch.zeros_like(logits[:, :1]) if self.last_logits is None else self.last_logits[:, None]
            likelihood = torch.cat((before, logits[:, :-1]), 1).float().log_softmax(-1)
            for span in spans:
                tokens = slice(span.start, span.stop)
                right, nll = judge_answers(likelihood[:, tokens], ids[:, tokens])
                self.answers += [
                    _Answer(row, span.part, *both) for row, both in enumerate(zip(right, nll, strict=True))
                ]
        self.last_logits = logits[:, -1]


def judge_answers(likelihood: Tensor, expected: Tensor) -> tuple[list[bool], list[float]]:
    """Whether each answer is the greedy one, and the mean over its tokens of -log p in nats.

    Args:
        likelihood: `[answers, tokens, vocabulary]`, log p of the token at each place given those before it.
        expected: `[answers, tokens]` int64.
    """
    right = (likelihood.argmax(-1) == expected).all(-1)
    nll = -likelihood.gather(-1, expected[..., None])[..., 0].mean(-1)
    return right.tolist(), nll.tolist()


def bytes_held(cache: EvictingCache) -> int:
    """Bytes of a copy, which has no room for tokens to come: configurations grow their buffers by different steps."""
    with cache.fork() as copy:
        return copy.nbytes()


def _outcomes(
    reader: _BatchReader, nbytes: int, slots: Tensor | None, seconds: float, read: dict[int, list[float]]
) -> list[Outcome]:
    parts: dict[tuple[int, str], list[_Answer]] = defaultdict(list)
    for answer in reader.answers:
        parts[answer.row, answer.part].append(answer)
    parts_of_row = [sum(1 for other, _ in parts if other == row) for row in range(len(reader.batch))]
    return [
        Outcome(
            reader.batch[row].id,
            part,
            len(answers),
            float(sum(answer.right for answer in answers)),
            math.fsum(answer.nll for answer in answers),
            nbytes,
            None if slots is None else slots[:, row],
            seconds / parts_of_row[row],
            tuple(answer.listed for answer in answers if answer.listed is not None),
            fmean(read[row]) if read[row] else None,
        )
        for (row, part), answers in sorted(parts.items(), key=lambda item: item[0][0])
    ]
