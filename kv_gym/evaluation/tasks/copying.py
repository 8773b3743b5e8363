"""Long generation: a list of words copied three times, while the cache is compressed every 16 tokens."""

from __future__ import annotations

from kv_gym.errors import UserError
from kv_gym.evaluation.tasks.generated import WordEncoder, name_with_seed, sample
from kv_gym.evaluation.tasks.registry import register
from kv_gym.evaluation.tasks.scripted import AnswerSpan, ScriptedTask, Segment, TaskScript
from kv_gym.reference.tokenizer import vocabulary

INTERVAL, SPAN = 16, 8  # tokens between compressions, and of an answer
COPIES = 3


@register("copy:128", "a list of 128 words to copy, compressed every 16 tokens")
def copying(
    tokens: int = 128, count: int | None = None, tokenizer=None, seed: int | None = None, rows: int = 8
) -> ScriptedTask:
    """A list of distinct random words is the prompt; the model goes on with the list, three times over.

    The cache is compressed at the end of the prompt and then after every 16 generated tokens. Answers are spans of 8
    tokens, each right when greedy decoding would generate all of it after a right beginning; parts are ``copy 1`` to
    ``copy 3``. Budgets count the slots of a bounded cache: a share is of all tokens of prompt and copies, so that a
    quarter has room for the list once.

    Args:
        tokens: length of the list, a multiple of 16. The reference model has 98 % of the spans right with the full
            cache at 128, 96 % at 256.
        count: number of lists, 16 by default.
        tokenizer: of the model, unless it is the reference model.
        seed: gives other lists than the ones that results are reported on.
        rows: lists that are run together.

    Raises:
        UserError: another length.
    """
    longest = len(vocabulary()) // INTERVAL * INTERVAL
    if tokens % INTERVAL or not 0 < tokens <= longest:
        raise UserError(f"a list has a multiple of {INTERVAL} tokens up to {longest} (one word each), got {tokens}")
    words = WordEncoder.for_tokenizer(tokenizer)
    scripts = [_script(str(number), tokens, words, seed) for number in range(16 if count is None else count)]
    return ScriptedTask(name_with_seed(f"copy {tokens}", seed), f"every:{INTERVAL}", scripts, rows)


def _script(id: str, tokens: int, words: WordEncoder, seed: int | None) -> TaskScript:
    listed = sample(vocabulary(), tokens, name_with_seed(f"copying {tokens} {id}", seed))
    ids = words.encode(listed)[:tokens]  # another model has several tokens for some words
    segments = [Segment((*words.beginning, *ids), compress=True)]
    for start in range(0, COPIES * tokens, INTERVAL):
        part = f"copy {start // tokens + 1}"
        spans = [AnswerSpan(first, first + SPAN, part) for first in range(0, INTERVAL, SPAN)]
        if start == 0:  # nothing says that the list begins anew
            spans[0] = AnswerSpan(1, SPAN, part)
        place = start % tokens
        segments.append(Segment(ids[place : place + INTERVAL], tuple(spans), compress=True))
    return TaskScript(id, tuple(segments), length=sum(len(segment.ids) for segment in segments))
