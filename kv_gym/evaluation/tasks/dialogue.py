"""Long dialogue: several topics, questions about earlier turns, and a compression at every turn."""

from __future__ import annotations

from collections.abc import Sequence

from kv_gym.errors import UserError
from kv_gym.evaluation.tasks.generated import WordEncoder, generated_contexts, name_with_seed, sample
from kv_gym.evaluation.tasks.questions import reference_questions
from kv_gym.evaluation.tasks.registry import register
from kv_gym.evaluation.tasks.scripted import AnswerSpan, ScriptedTask, Segment, TaskScript
from kv_gym.reference.generator import Context

WORDS_PER_TURN = 128  # of two topics
QUESTIONS_PER_TURN = 2


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
    count: int | None = None,
    seed: int | None = None,
    tokenizer=None,
) -> ScriptedTask:
    """:func:`dialogue`, or with `seen` or `unseen` (and without `turns`) questions at the end of the same text."""
    if turns or not (seen or unseen):
        return dialogue(tokens, count, tokenizer, seed)
    return reference_questions("dialogue", tokens, seen, unseen, count, seed, tokenizer)


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
