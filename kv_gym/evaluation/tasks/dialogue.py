"""Long dialogue: several topics, questions about earlier turns, and a compression at every turn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise

from kv_gym.errors import UserError
from kv_gym.evaluation.tasks.generated import WordEncoder, generated_contexts, name_with_seed, sample
from kv_gym.evaluation.tasks.questions import reference_questions
from kv_gym.evaluation.tasks.registry import register
from kv_gym.evaluation.tasks.scripted import AnswerSpan, ForkedQuestion, ScriptedTask, Segment, TaskScript
from kv_gym.reference.generator import Context
from kv_gym.reference.tokenizer import NAMES, THINGS

WORDS_PER_TURN = 128  # of two topics
QUESTIONS_PER_TURN = 2  # and of a topic
PEOPLE_PER_TOPIC = 2
UTTERANCE_ENDS = frozenset((".", "user", "assistant"))
_NAMES, _THINGS = frozenset(NAMES), frozenset(THINGS)


def dialogue(
    tokens: int = 512, count: int | None = None, tokenizer=None, seed: int | None = None, rows: int = 8
) -> ScriptedTask:
    """The pinned held-out dialogues in turns of 128 words, with questions after each turn.

    In a turn its text is read, the cache is compressed, and two questions are asked one after the other. They are about
    facts of earlier turns (in the first turn about its own), never twice about the same; question and right answer stay
    in the cache, whatever the configuration would have answered. A budget that is a share is of all tokens seen so far.
    Parts are ``turn 1``, ``turn 2`` ...

    Args:
        tokens: words of a dialogue, a multiple of 128, without the questions. The reference model is right about 97 %
            with the full cache at 512 and at 1,024: it was trained on questions behind the text, not within it.
        count: number of dialogues, all 64 by default.
        tokenizer: of the model, unless it is the reference model.
        seed: gives other contexts, see :func:`kv_gym.evaluation.tasks.generated.generated_contexts`.
        rows: dialogues that are run together.

    Raises:
        UserError: another number of words.
    """
    if tokens < WORDS_PER_TURN or tokens % WORDS_PER_TURN:
        raise UserError(
            f"a dialogue has turns of {WORDS_PER_TURN} words, got {tokens} words; give a multiple of {WORDS_PER_TURN}"
        )
    words, contexts = WordEncoder.for_tokenizer(tokenizer), generated_contexts("dialogue", tokens, count, seed)
    scripts = [_script(str(number), context, words) for number, context in enumerate(contexts)]
    return ScriptedTask(name_with_seed(f"dialogue turns {tokens}", seed), "turn", scripts, rows)


@register("dialogue:512", "a conversation, compressed at each turn, with questions about earlier turns")
def dialogue_or_questions(
    tokens: int = 512,
    turns: bool = False,
    seen: bool = False,
    unseen: bool = False,
    topics: int | None = None,
    count: int | None = None,
    seed: int | None = None,
    tokenizer=None,
) -> ScriptedTask:
    """:func:`dialogue`, or with `seen` or `unseen` (and without `turns`) questions at the end of the same text.

    With `topics`, :func:`topical_dialogue`.
    """
    if topics is not None:
        return topical_dialogue(tokens, topics, count, tokenizer, seed)
    if turns or not (seen or unseen):
        return dialogue(tokens, count, tokenizer, seed)
    return reference_questions("dialogue", tokens, seen, unseen, count, seed, tokenizer)


def topical_dialogue(
    tokens: int = 512, topics: int = 4, count: int | None = None, tokenizer=None, seed: int | None = None, rows: int = 8
) -> ScriptedTask:
    """The pinned held-out dialogues with people and a thing of their own for each topic, and questions at the end.

    A dialogue is divided into `topics` parts of equal length. Names of a part become those of two people (more where
    the same is said of both) who are spoken of there alone, and things its own thing, so that a question names its
    topic by the person that it asks about. Two questions are about each topic; the compression does not see them.
    Parts are ``topic 1``, ``topic 2`` ... What ends an utterance is known, so that a cache may divide the dialogue into
    episodes.

    Args:
        tokens: words of a dialogue.
        topics: of a dialogue.
        count: number of dialogues, all 64 by default.
        tokenizer: of the model, unless it is the reference model.
        seed: gives other contexts, see :func:`kv_gym.evaluation.tasks.generated.generated_contexts`.
        rows: dialogues that are run together.

    Raises:
        UserError: topics of less than 64 words.
    """
    if topics < 1 or tokens < 64 * topics:
        raise UserError(f"{topics} topics are asked for in {tokens} words; expected from 1 to {tokens // 64} for these")
    encoder, contexts = WordEncoder.for_tokenizer(tokenizer), generated_contexts("dialogue", tokens, count, seed)
    scripts = [_topical_script(number, context, topics, encoder) for number, context in enumerate(contexts)]
    return ScriptedTask(name_with_seed(f"dialogue {tokens} {topics} topics", seed), "prefill", scripts, rows)


def _topical_script(number: int, context: Context, topics: int, encoder: WordEncoder) -> TaskScript:
    words = list(context.words)
    stream = random.Random(f"topics {len(words)} {topics} {number}")
    names, things = sample(NAMES, len(NAMES), stream), sample(THINGS, topics, stream)
    people = [[names.pop() for _ in range(PEOPLE_PER_TOPIC)] for _ in range(topics)]
    ends = [place + 1 for place, word in enumerate(words) if word in UTTERANCE_ENDS]
    topic_of, topic = [], 0
    for place in range(len(words)):
        if place in {0, *ends}:  # a sentence belongs to one topic
            topic = place * topics // len(words)
        topic_of.append(topic)
    keys = {start - 1 for start in (*context.fact_values[::2], *context.distractor_values[::2])}
    known: set[tuple[str, str]] = set()
    for place, word in enumerate(words):
        own = people[topic_of[place]]
        if place in keys:  # a relation is of every person once, or a question would have two answers
            free = [person for person in own if (words[place - 1], person) not in known]
            if not free:
                own.append(names.pop())
            words[place] = sample(free or own[-1:], 1, stream)[0]
            known.add((words[place - 1], words[place]))
        elif word in _NAMES:
            words[place] = sample(own, 1, stream)[0]
        elif word in _THINGS:
            words[place] = things[topic_of[place]]
    questions = []
    for topic in range(topics):
        facts = [start for start in context.fact_values[::2] if topic_of[start] == topic]
        for start in sample(facts, QUESTIONS_PER_TURN, stream):
            question = encoder.encode(("question", *words[start - 2 : start]))
            questions.append(ForkedQuestion(question, encoder.encode(words[start : start + 2]), f"topic {topic + 1}"))
    bounds = [0, *ends, *([len(words)] if ends[-1] < len(words) else [])]
    spoken = [encoder.encode(words[start:stop]) for start, stop in pairwise(bounds)]
    ids = (*encoder.beginning, *chain.from_iterable(spoken))
    utterances = [len(encoder.beginning) + length for length in accumulate(map(len, spoken))]
    return TaskScript.of_one_context(number, ids, questions, utterances)


def context_facts(context: Context) -> list[tuple[int, Sequence[str], Sequence[str]]]:
    """The askable facts of a generated context: where the value ends, in words, and the words of key and value."""
    words = context.words
    return [(start + 2, words[start - 2 : start], words[start : start + 2]) for start in context.fact_values[::2]]


def _script(id: str, context: Context, words: WordEncoder) -> TaskScript:
    # turns have equal lengths, so that dialogues run together; a fact that a turn ends within is not asked for
    facts = [
        fact for fact in context_facts(context) if (fact[0] - 4) // WORDS_PER_TURN == (fact[0] - 1) // WORDS_PER_TURN
    ]
    segments: list[Segment] = []
    for turn, start in enumerate(range(0, len(context.words), WORDS_PER_TURN)):
        stop = start + WORDS_PER_TURN
        beginning = words.beginning if turn == 0 else ()
        segments.append(Segment((*beginning, *words.encode(context.words[start:stop])), compress=True))
        candidates = [fact for fact in facts if fact[0] <= start] or [fact for fact in facts if fact[0] <= stop]
        for fact in sample(candidates, QUESTIONS_PER_TURN, f"dialogue {len(context.words)} {id} {turn}"):
            facts.remove(fact)
            question, answer = words.encode(("question", *fact[1])), words.encode(fact[2])
            span = AnswerSpan(len(question), len(question) + len(answer), f"turn {turn + 1}")
            segments.append(Segment((*question, *answer, *words.encode(".")), (span,)))
    return TaskScript(id, tuple(segments))
