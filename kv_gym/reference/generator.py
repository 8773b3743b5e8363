"""The task generator: contexts of facts, distractors and filler, and questions about the facts.

A context of n tokens always holds n/32 facts ("code Alice 4 7 ."), as many distractors ("size Bob 81 5 .": their
relations are never asked for), and filler sentences in which the same names, numbers and relation words occur.
Questions repeat a key and expect its values. All randomness is ``random.Random(seed).random()``, whose stream is the
same in every version of Python, so that a seed always gives the same text.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from kv_gym.errors import UserError
from kv_gym.reference import tokenizer as w

TASKS = ("single", "multi_key", "multi_value", "multi_query", "variable_tracking", "most_common", "dialogue")
TOKENS_PER_FACT = 32  # the frozen density: one fact and one distractor per 32 context tokens
FIRST_HELD_OUT_SEED = 10**9  # training, of the model or of a policy, uses seeds below

_FACT, _DISTRACTOR, _FILLER = range(3)  # kinds of sentences


@dataclass(frozen=True)
class Question:
    """A question after the context, and the words that answer it."""

    question: tuple[str, ...]
    answer: tuple[str, ...]


@dataclass(frozen=True)
class Context:
    """One generated text.

    Attributes:
        task: one of `TASKS`.
        words: of the text.
        questions: about it.
        fact_values, distractor_values: indices in `words` of the values of facts and of distractors.
    """

    task: str
    words: tuple[str, ...]
    questions: tuple[Question, ...]
    fact_values: tuple[int, ...]
    distractor_values: tuple[int, ...]


class _Random:
    """Choices made from ``random()`` alone: the only method whose stream is guaranteed across versions."""

    def __init__(self, seed: int):
        self._random = random.Random(seed).random

    def integer(self, n: int) -> int:
        """From 0 to below `n`."""
        return int(self._random() * n)

    def choice(self, items):
        return items[self.integer(len(items))]

    def sample(self, items, k: int) -> list:
        """Up to `k` distinct items, in random order."""
        return self.shuffled(items)[:k]

    def shuffled(self, items) -> list:
        return [items[i] for _, i in sorted((self._random(), i) for i in range(len(items)))]


_SLOTS = {
    "N": w.NAMES, "#": w.NUMBERS, "R": w.FACT_RELATIONS + w.DISTRACTOR_RELATIONS, "T": w.THINGS, "P": w.PLACES,
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
        questions: how many questions, at most (a short context has fewer distinct ones).

    Raises:
        UserError: an unknown task or a length that the density does not divide.
    """
    refuse_unknown(task, tokens)
    rng = _Random(seed * len(TASKS) + TASKS.index(task))
    n_facts = tokens // TOKENS_PER_FACT
    facts, distractors = _facts(rng, task, n_facts)
    sentences = [([*key, *value, "."], _FACT) for key, value in facts]
    sentences += [([*key, *value, "."], _DISTRACTOR) for key, value in distractors]
    used = sum(len(sentence) for sentence, _ in sentences)
    frequent = rng.choice(w.THINGS) if task == "most_common" else None
    if frequent is not None:
        repeats = [[rng.choice(w.NAMES), rng.choice(w.ACTIONS), "the", frequent, "."] for _ in range(tokens // 64 + 3)]
        repeats = repeats[: max(2, (tokens - used) // 12)]
        sentences += [(sentence, _FILLER) for sentence in repeats]
        used += sum(map(len, repeats))
    sentences += [(sentence, _FILLER) for sentence in _filler(rng, tokens - used)]
    sentences = rng.shuffled(sentences)
    if task == "dialogue":
        sentences = _as_dialogue(rng, sentences, topics=tokens // 64)
    return _assemble(rng, task, sentences, frequent, questions)


def refuse_unknown(task: str, tokens: int) -> None:
    """Raise a UserError for a task or a context length that the generator does not know."""
    if task not in TASKS:
        raise UserError(f"unknown reference task {task!r}; choose one of {', '.join(TASKS)}")
    if tokens % TOKENS_PER_FACT or tokens < 2 * TOKENS_PER_FACT:
        raise UserError(f"reference contexts have a multiple of {TOKENS_PER_FACT} tokens from 64 on, got {tokens}")


def _facts(rng: _Random, task: str, n: int):
    """`n` facts and `n` distractors, each a (key, value) pair of word tuples."""
    if task == "single":  # every fact has a name of its own: the name alone finds it
        names = rng.sample(w.NAMES, 2 * n)
        keys = [(rng.choice(w.FACT_RELATIONS), name) for name in names[:n]]
        other_keys = [(rng.choice(w.DISTRACTOR_RELATIONS), name) for name in names[n:]]
    else:  # names are shared: only relation and name together find a fact
        names = rng.sample(w.NAMES, max(2, n // 2))
        keys = rng.sample([(relation, name) for relation in w.FACT_RELATIONS for name in names], n)
        other_keys = rng.sample([(relation, name) for relation in w.DISTRACTOR_RELATIONS for name in names], n)
    if task == "multi_value":  # half the keys have two values
        keys = keys[: (n + 1) // 2] + keys[: n // 2]
        other_keys = other_keys[: (n + 1) // 2] + other_keys[: n // 2]

    facts, others = ([(key, tuple(rng.sample(w.NUMBERS, 2))) for key in group] for group in (keys, other_keys))
    if task == "variable_tracking":  # half the facts point to another fact instead of holding numbers
        facts, others = _chained(rng, facts), _chained(rng, others)
    return facts, others


def _chained(rng: _Random, facts):
    half = len(facts) // 2
    return facts[:half] + [(key, rng.choice(facts[:half])[0]) for key, _ in facts[half:]]


def _filler(rng: _Random, tokens: int) -> list[list[str]]:
    """Sentences of exactly `tokens` words in all."""
    sentences = []
    while tokens:
        fitting = [t for t in _TEMPLATES if len(t) == tokens or len(t) <= tokens - _SHORTEST]
        sentence = [rng.choice(_SLOTS[word]) if word in _SLOTS else word for word in rng.choice(fitting)]
        sentences.append(sentence)
        tokens -= len(sentence)
    return sentences


def _as_dialogue(rng: _Random, sentences, topics: int):
    """The same sentences as turns of two speakers about one topic after another.

    A speaker stands in place of every other full stop; filler about things speaks of the topic's own thing.
    """
    speakers = ("user", "assistant")
    things = rng.sample(w.THINGS, topics)
    turns = []
    for i, (sentence, kind) in enumerate(sentences):
        if kind == _FILLER:
            thing = things[i * topics // len(sentences)]
            sentence = [thing if word in _THINGS else word for word in sentence]
        turns.append(([*sentence[:-1], speakers[i // 2 % 2]] if i % 2 else sentence, kind))
    return turns


def _assemble(rng: _Random, task: str, sentences, frequent: str | None, n_questions: int) -> Context:
    words: list[str] = []
    values: tuple[list[int], list[int]] = ([], [])
    facts = []  # as they appear: two values of one key are expected in this order
    for sentence, kind in sentences:
        if kind != _FILLER:
            values[kind].extend((len(words) + 2, len(words) + 3))
        if kind == _FACT:
            facts.append((tuple(sentence[:2]), tuple(sentence[2:4])))
        words += sentence
    if task == "dialogue":  # questions reach back to earlier topics: none asks about the last one
        facts = [
            fact for fact, start in zip(facts, values[_FACT][::2], strict=True) if start < len(words) - 64
        ] or facts
    all_questions = _questions(rng, task, facts, frequent)
    return Context(
        task, tuple(words), tuple(all_questions[:n_questions]), tuple(values[_FACT]), tuple(values[_DISTRACTOR])
    )


def _questions(rng: _Random, task: str, facts, frequent: str | None) -> list[Question]:
    if task == "most_common":
        return [Question(("question", "common"), (str(frequent),))]
    by_key: dict[tuple[str, ...], tuple[str, ...]] = {}
    for key, value in facts:
        by_key[key] = by_key.get(key, ()) + value
    keys = rng.shuffled(list(by_key))
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
