"""Long generation: a list of words copied out again and again, while the cache is cut every 16 tokens."""

from __future__ import annotations

from kv_gym.errors import UserError
from kv_gym.evaluation.tasks.draw import some
from kv_gym.evaluation.tasks.generated import titled
from kv_gym.evaluation.tasks.script import Answer, Script, Segment
from kv_gym.evaluation.tasks.scripted import ScriptedTask
from kv_gym.evaluation.tasks.wording import Wording
from kv_gym.reference.tokenizer import vocabulary

STEP, SPAN = 16, 8  # tokens between cuts, and of an answer
COPIES = 3


def copying(
    tokens: int = 128, count: int | None = None, tokenizer=None, seed: int | None = None, rows: int = 8
) -> ScriptedTask:
    """A list of distinct random words is the prompt; the model goes on with the list, three times over.

    The cache is cut at the end of the prompt and then after every 16 generated tokens. Judged are spans of 8 tokens,
    each right when greedy decoding would say all of it after a right beginning; parts are ``copy 1`` to ``copy 3``.
    Budgets count the slots of a bounded cache: a share is of all tokens of prompt and copies, so that a quarter has
    room for the list once.

    Args:
        tokens: length of the list, a multiple of 16. The reference model says 98 % of the spans right with the full
            cache at 128, 96 % at 256.
        count: how many lists; None means 16.
        tokenizer: of the model, unless it is the reference model.
        seed: names other lists than the ones that results are reported on.
        rows: lists that are run together.

    Raises:
        UserError: another length.
    """
    longest = len(vocabulary()) // STEP * STEP
    if tokens % STEP or not 0 < tokens <= longest:
        raise UserError(f"a list has a multiple of {STEP} tokens up to {longest} (one word each), got {tokens}")
    wording = Wording.of(tokenizer)
    scripts = [_script(str(number), tokens, wording, seed) for number in range(16 if count is None else count)]
    return ScriptedTask(titled(f"copy {tokens}", seed), f"every:{STEP}", scripts, rows)


def _script(id: str, tokens: int, wording: Wording, seed: int | None) -> Script:
    words = some(vocabulary(), tokens, titled(f"copying {tokens} {id}", seed))
    listed = wording.ids(words)[:tokens]  # another model has several tokens for some words
    segments = [Segment((*wording.beginning, *listed), cut=True)]
    for start in range(0, COPIES * tokens, STEP):
        part = f"copy {start // tokens + 1}"
        spans = [Answer(first, first + SPAN, part) for first in range(0, STEP, SPAN)]
        if start == 0:  # nothing says that the list begins anew
            spans[0] = Answer(1, SPAN, part)
        place = start % tokens
        segments.append(Segment(listed[place : place + STEP], tuple(spans), cut=True))
    return Script(id, tuple(segments), length=sum(len(segment.ids) for segment in segments))
