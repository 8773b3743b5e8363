"""Long dialogue: several topics, questions that reach back, and a cut at every turn."""

from __future__ import annotations

from collections.abc import Sequence

from kv_gym.errors import UserError
from kv_gym.evaluation.tasks.draw import some
from kv_gym.evaluation.tasks.generated import generated, titled
from kv_gym.evaluation.tasks.script import Answer, Script, Segment
from kv_gym.evaluation.tasks.scripted import ScriptedTask
from kv_gym.evaluation.tasks.wording import Wording
from kv_gym.reference.generator import Context

TURN = 128  # words of a turn, of two topics
QUESTIONS = 2  # of a turn


def dialogue(
    tokens: int = 512, count: int | None = None, tokenizer=None, seed: int | None = None, rows: int = 8
) -> ScriptedTask:
    """The pinned held-out dialogues, told in turns of 128 words, with questions after each of them.

    A turn: its text is read, the cache is cut, two questions are asked one after the other. They are about facts of
    earlier turns (in the first turn about its own), never twice about the same; question and right answer stay in
    the cache, whatever the configuration would have answered. A budget that is a share is of all tokens seen when the
    cut is made. Parts are ``turn 1``, ``turn 2`` ...

    Args:
        tokens: words of a dialogue, a multiple of 128; questions come on top. The reference model is right about 97 %
            with the full cache at 512 and at 1,024: it was trained on questions behind the text, not within it.
        count: how many dialogues; None means all 64.
        tokenizer: of the model, unless it is the reference model.
        seed: names other contexts than the held-out ones, see :func:`kv_gym.evaluation.tasks.generated.generated`.
        rows: dialogues that are run together.

    Raises:
        UserError: another number of words.
    """
    if tokens < TURN or tokens % TURN:
        raise UserError(f"a dialogue has turns of {TURN} words, got {tokens} words; give a multiple of {TURN}")
    wording, made = Wording.of(tokenizer), generated("dialogue", tokens, count, seed)
    scripts = [_script(str(number), context, wording) for number, context in enumerate(made)]
    return ScriptedTask(titled(f"dialogue turns {tokens}", seed), "turn", scripts, rows)


def facts(context: Context) -> list[tuple[int, Sequence[str], Sequence[str]]]:
    """The askable facts of a generated context: where the value ends, in words, and the words of key and value."""
    words = context.words
    return [(at + 2, words[at - 2 : at], words[at : at + 2]) for at in context.fact_values[::2]]


def _script(id: str, context: Context, wording: Wording) -> Script:
    # turns have equal lengths, so that dialogues run together; a fact that one ends in is torn apart, and not asked for
    open_facts = [fact for fact in facts(context) if (fact[0] - 4) // TURN == (fact[0] - 1) // TURN]
    segments: list[Segment] = []
    for turn, start in enumerate(range(0, len(context.words), TURN)):
        beginning = wording.beginning if turn == 0 else ()
        segments.append(Segment((*beginning, *wording.ids(context.words[start : start + TURN])), cut=True))
        told = [fact for fact in open_facts if fact[0] <= start] or [f for f in open_facts if f[0] <= start + TURN]
        for fact in some(told, QUESTIONS, f"dialogue {len(context.words)} {id} {turn}"):
            open_facts.remove(fact)
            question, answer = wording.ids(("question", *fact[1])), wording.ids(fact[2])
            span = Answer(len(question), len(question) + len(answer), f"turn {turn + 1}")
            segments.append(Segment((*question, *answer, *wording.ids(".")), (span,)))
    return Script(id, tuple(segments))
