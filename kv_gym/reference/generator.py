"""The task generator: contexts of facts, look-alike facts and filler, and the questions asked of them.

A context of n tokens always holds n/32 askable facts ("code Alice 4 7 ."), as many look-alikes
("size Bob 81 5 .": relations that nobody ever asks for), and filler sentences in which the same names,
numbers and relation words occur. Questions repeat a key and expect its values. Everything is drawn with
``random.Random(seed).random()``, whose stream Python guarantees, so that a seed names one text for ever.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from kv_gym.errors import UserError
from kv_gym.reference import words as w

TASKS = ("single", "multi_key", "multi_value", "multi_query", "variable_tracking", "most_common", "dialogue")
TOKENS_PER_FACT = 32  # the frozen density: one askable fact, and one look-alike, per 32 context tokens
FIRST_HELD_OUT_SEED = 10**9  # training, of the model or of a policy, never draws a seed from here on


@dataclass(frozen=True)
class Question:
    """What is asked after the context, and the words that answer it."""

    question: tuple[str, ...]
    answer: tuple[str, ...]


@dataclass(frozen=True)
class Context:
    """One generated text: its words, the questions, and where the values of both kinds of fact stand."""

    task: str
    words: tuple[str, ...]
    questions: tuple[Question, ...]
    asked_values: tuple[int, ...]
    look_alike_values: tuple[int, ...]


class _Draw:
    """Choices made from ``random()`` alone: the only method whose stream is guaranteed across versions."""

    def __init__(self, seed: int):
        self._random = random.Random(seed).random

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def one(self, items):
        return items[self.below(len(items))]

    def some(self, items, k: int) -> list:
        """Up to `k` distinct items, in random order."""
        return self.shuffled(items)[:k]

    def shuffled(self, items) -> list:
        return [items[i] for _, i in sorted((self._random(), i) for i in range(len(items)))]


_SLOTS = {
    "N": w.NAMES, "#": w.NUMBERS, "R": w.ASKED_RELATIONS + w.UNASKED_RELATIONS, "T": w.THINGS, "P": w.PLACES,
    "A": w.ADJECTIVES, "V": w.ACTIONS, "G": w.TRAVELS, "D": w.ADVERBS,
}  # fmt: skip
_TEMPLATES = [
    template.split()
    for template in (
        "N V D .",
        "N V the T .",
        "N G the P D .",
        "the R was A .",
        "N V # A T .",
        "N and N V the T .",
        "N G the A P with N .",
        "D N V a T for N .",
        "the T in the P was A .",
        "N V the R of the A T .",
        "N had # T and N had # .",
        "after the P N V # T for N .",
        "the A T near the P was not A .",
        "N who V the R was in the P with N .",
        "when N G the P she V # T and a T .",
    )
]
_SHORTEST = min(map(len, _TEMPLATES))
_THINGS = frozenset(w.THINGS)


def make_context(task: str, tokens: int, seed: int, questions: int = 4) -> Context:
    """One context of exactly `tokens` words and at most `questions` distinct questions about it.

    Args:
        task: one of `TASKS`.
        tokens: context length, a multiple of 32 and at least 64.
        seed: names the text; the same arguments give the same text on every machine.
        questions: how many questions to draw (a short context has fewer distinct ones).

    Raises:
        UserError: an unknown task or a length that the density does not divide.
    """
    refuse_unmade(task, tokens)
    draw = _Draw(seed * len(TASKS) + TASKS.index(task))
    n_facts = tokens // TOKENS_PER_FACT
    asked, look_alikes = _facts(draw, task, n_facts)
    sentences = [([*key, *value, "."], kind) for kind, facts in enumerate((asked, look_alikes)) for key, value in facts]
    used = sum(len(sentence) for sentence, _ in sentences)
    frequent = draw.one(w.THINGS) if task == "most_common" else None
    if frequent is not None:
        repeats = [[draw.one(w.NAMES), draw.one(w.ACTIONS), "the", frequent, "."] for _ in range(tokens // 64 + 3)]
        repeats = repeats[: max(2, (tokens - used) // 12)]
        sentences += [(sentence, 2) for sentence in repeats]
        used += sum(map(len, repeats))
    sentences += [(sentence, 2) for sentence in _filler(draw, tokens - used)]
    sentences = draw.shuffled(sentences)
    if task == "dialogue":
        sentences = _as_dialogue(draw, sentences, topics=tokens // 64)
    return _assemble(draw, task, sentences, asked, frequent, questions)


def refuse_unmade(task: str, tokens: int) -> None:
    """Raise a UserError for a task or a context length that is not made here."""
    if task not in TASKS:
        raise UserError(f"unknown reference task {task!r}; choose one of {', '.join(TASKS)}")
    if tokens % TOKENS_PER_FACT or tokens < 2 * TOKENS_PER_FACT:
        raise UserError(f"reference contexts have a multiple of {TOKENS_PER_FACT} tokens from 64 on, got {tokens}")


def _facts(draw: _Draw, task: str, n: int):
    """`n` askable facts and `n` look-alikes, each a (key, value) pair of word tuples."""
    if task == "single":  # every fact has a name of its own: the name alone finds it
        names = draw.some(w.NAMES, 2 * n)
        keys = [(draw.one(w.ASKED_RELATIONS), name) for name in names[:n]]
        other_keys = [(draw.one(w.UNASKED_RELATIONS), name) for name in names[n:]]
    else:  # names are shared: only relation and name together find a fact
        names = draw.some(w.NAMES, max(2, n // 2))
        keys = draw.some([(relation, name) for relation in w.ASKED_RELATIONS for name in names], n)
        other_keys = draw.some([(relation, name) for relation in w.UNASKED_RELATIONS for name in names], n)
    if task == "multi_value":  # half the keys have two values
        keys = keys[: (n + 1) // 2] + keys[: n // 2]
        other_keys = other_keys[: (n + 1) // 2] + other_keys[: n // 2]

    def with_values(keys):
        return [(key, tuple(draw.some(w.NUMBERS, 2))) for key in keys]

    facts, others = with_values(keys), with_values(other_keys)
    if task == "variable_tracking":  # half the facts point to another fact instead of holding numbers
        facts, others = _chained(draw, facts), _chained(draw, others)
    return facts, others


def _chained(draw: _Draw, facts):
    half = len(facts) // 2
    return facts[:half] + [(key, draw.one(facts[:half])[0]) for key, _ in facts[half:]]


def _filler(draw: _Draw, room: int) -> list[list[str]]:
    """Sentences that fill exactly `room` words."""
    sentences = []
    while room:
        fitting = [t for t in _TEMPLATES if len(t) == room or len(t) <= room - _SHORTEST]
        sentence = [draw.one(_SLOTS[word]) if word in _SLOTS else word for word in draw.one(fitting)]
        sentences.append(sentence)
        room -= len(sentence)
    return sentences


def _as_dialogue(draw: _Draw, sentences, topics: int):
    """The same sentences as turns of two speakers about one topic after another.

    A speaker stands in place of every other full stop; filler about things speaks of the topic's own thing.
    """
    speakers = ("user", "assistant")
    things = draw.some(w.THINGS, topics)
    turns = []
    for i, (sentence, kind) in enumerate(sentences):
        if kind == 2:
            thing = things[i * topics // len(sentences)]
            sentence = [thing if word in _THINGS else word for word in sentence]
        turns.append(([*sentence[:-1], speakers[i // 2 % 2]] if i % 2 else sentence, kind))
    return turns


def _assemble(draw: _Draw, task: str, sentences, asked, frequent: str | None, n_questions: int) -> Context:
    words: list[str] = []
    values: tuple[list[int], list[int]] = ([], [])
    order = []  # askable facts as they appear: the order in which two values of one key are expected
    for sentence, kind in sentences:
        if kind < 2:
            values[kind].extend((len(words) + 2, len(words) + 3))
        if kind == 0:
            order.append((tuple(sentence[:2]), tuple(sentence[2:4])))
        words += sentence
    if task == "dialogue":  # questions reach back to earlier topics: none asks about the last one
        order = [fact for fact, start in zip(order, values[0][::2], strict=True) if start < len(words) - 64] or order
    found = _questions(draw, task, order, frequent)
    return Context(task, tuple(words), tuple(found[:n_questions]), tuple(values[0]), tuple(values[1]))


def _questions(draw: _Draw, task: str, facts, frequent: str | None) -> list[Question]:
    if task == "most_common":
        return [Question(("question", "common"), (str(frequent),))]
    by_key: dict[tuple[str, ...], tuple[str, ...]] = {}
    for key, value in facts:
        by_key[key] = by_key.get(key, ()) + value
    keys = draw.shuffled(list(by_key))
    if task == "multi_value":
        keys = [key for key in keys if len(by_key[key]) == 4]
        return [Question(("question", "all", *key), by_key[key]) for key in keys]
    if task == "multi_query":
        return [
            Question(("question", *first, "and", *second, "?"), (*first, *by_key[first], *second, *by_key[second]))
            for first, second in zip(keys[::2], keys[1::2], strict=False)
        ]
    if task == "variable_tracking":  # the answer spells the whole chain
        keys = [key for key in keys if by_key[key] in by_key]
        return [Question(("question", *key), (*by_key[key], *by_key[by_key[key]])) for key in keys]
    return [Question(("question", *key), by_key[key]) for key in keys]
