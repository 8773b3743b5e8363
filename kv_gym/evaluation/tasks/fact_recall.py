"""Facts stated once, and asked for after many compressions of the cache."""

from __future__ import annotations

from kv_gym.errors import UserError
from kv_gym.evaluation.tasks.dialogue import context_facts
from kv_gym.evaluation.tasks.generated import WordEncoder, first_seed, name_with_seed
from kv_gym.evaluation.tasks.registry import register
from kv_gym.evaluation.tasks.scripted import ForkedQuestion, ScriptedTask, Segment, TaskScript
from kv_gym.reference.generator import FIRST_HELD_OUT_SEED, make_context

BLOCK = 64
HELD_OUT_SEED = FIRST_HELD_OUT_SEED + 1_000_000  # away from the pinned contexts


@register("fact:1024", "facts asked for after up to 16 compressions")
def fact_recall(
    tokens: int = 1024, count: int | None = None, tokenizer=None, seed: int | None = None, rows: int = 8
) -> ScriptedTask:
    """A stream of blocks of 64 words, compressed after each; at its end one fact of every block is asked for.

    A block is filler with two askable facts and two look-alikes; only facts whose key stands once in the stream are
    asked for. Every question has a copy of the cache. The part says how many compressions the fact had to survive:
    ``after 1 evictions`` for the last block. Budgets count the slots of a bounded cache: a share is of all words of the
    stream.

    Args:
        tokens: words of a stream, a multiple of 64. The reference model is right about 99 % with the full cache at
            1,024.
        count: number of streams, 32 by default.
        tokenizer: of the model, unless it is the reference model.
        seed: gives other contexts, see :func:`kv_gym.evaluation.tasks.generated.generated_contexts`.
        rows: streams that are run together.

    Raises:
        UserError: another number of words.
    """
    if tokens < BLOCK or tokens % BLOCK:
        raise UserError(f"a stream has blocks of {BLOCK} words, got {tokens} words; give a multiple of {BLOCK}")
    words = WordEncoder.for_tokenizer(tokenizer)
    first = HELD_OUT_SEED if seed is None else first_seed(seed)
    numbers = range(32 if count is None else count)
    # a thousand blocks each: a block of a longer stream is the same as of a shorter one
    scripts = [_script(str(number), first + 1000 * number, tokens // BLOCK, words) for number in numbers]
    return ScriptedTask(name_with_seed(f"fact {tokens}", seed), f"every:{BLOCK}", scripts, rows)


def _script(id: str, first: int, blocks: int, words: WordEncoder) -> TaskScript:
    contexts = [make_context("multi_key", BLOCK, first + index) for index in range(blocks)]
    keys = [key for context in contexts for _, key, _ in context_facts(context)]
    segments, questions = [], []
    for index, context in enumerate(contexts):
        beginning = words.beginning if index == 0 else ()
        segments.append(Segment((*beginning, *words.encode(context.words)), compress=True))
        once = [(key, value) for _, key, value in context_facts(context) if keys.count(key) == 1]
        part = f"after {blocks - index} evictions"
        questions += [
            ForkedQuestion(words.encode(("question", *key)), words.encode(value), part) for key, value in once[:1]
        ]
    length = sum(len(segment.ids) for segment in segments)
    return TaskScript(id, tuple(segments), tuple(questions), length)
