"""Prose: passages of a context are quoted word by word, or what comes next in it is predicted."""

from __future__ import annotations

from kv_gym.errors import UserError
from kv_gym.evaluation.tasks.natural_language import ChatFrame, Filler, check_split, numbered_streams, title
from kv_gym.evaluation.tasks.registry import register
from kv_gym.evaluation.tasks.scripted import ForkedQuestion, ScriptedTask, TaskScript

GIVEN, EXPECTED = 24, 16  # tokens of a quotation
QUESTIONS = 8
AHEAD = 128  # tokens that follow a context of `continue`


@register("quote:1024", "passages of a prose context, continued word by word: each token counts")
def quotation(
    tokens: int = 1024,
    tokenizer=None,
    split: str = "test",
    text: str | None = None,
    count: int | None = None,
    first: int | None = None,
    seed: int = 0,
    rows: int = 4,
) -> ScriptedTask:
    """Contexts of plain prose; of eight passages 24 tokens are given again, and the next 16 are expected.

    Every token of an answer is an answer of its own (``accuracy`` is the share of tokens that were the most likely
    ones). Passages are spread evenly, so that little of a context can be spared: a control, on which no policy should
    gain much. There is no chat template: the passage stands behind the context.

    Args:
        tokens: length of a context.
        tokenizer: of the model.
        split: ``test``, ``validation`` or ``train``: the filler of each is its own.
        text: instead of the bundled filler: a text file, or a folder of them.
        count: number of contexts, 100 by default.
        first: number of the first context, so that a set can be measured in portions.
        seed: gives other contexts of the same split.
        rows: contexts that are read together.

    Raises:
        UserError: no tokenizer, an unknown split, or a context that is too short.
    """
    check_split(split, tokenizer)
    if tokens < QUESTIONS * (GIVEN + EXPECTED) + 2:
        raise UserError(f"{QUESTIONS} passages of {GIVEN + EXPECTED} tokens do not fit into {tokens} tokens")
    filler, before = Filler(tokenizer, split, text), ChatFrame.plain(tokenizer).before
    scripts = []
    for number, stream in numbered_streams(f"quote {split} {seed}", count, first):
        ids = filler.fill(stream, tokens, before, [])
        part = (tokens - len(before)) // QUESTIONS
        questions = []
        for place in range(QUESTIONS):
            start = len(before) + place * part + int(stream.random() * (part - GIVEN - EXPECTED))
            passage = ids[start : start + GIVEN + EXPECTED]
            questions.append(ForkedQuestion(passage[:GIVEN], passage[GIVEN:], f"depth {place // 2 + 1}"))
        scripts.append(TaskScript.of_one_context(number, ids, questions))
    return ScriptedTask(title(f"quote {tokens}", split, text, seed), "prefill", scripts, rows, by_token=True)


@register("continue:1024", "the next 128 tokens of prose, each judged alone: likelihood")
def continuation(
    tokens: int = 1024,
    tokenizer=None,
    split: str = "test",
    text: str | None = None,
    count: int | None = None,
    first: int | None = None,
    seed: int = 0,
    rows: int = 4,
) -> ScriptedTask:
    """Contexts of plain prose, and the 128 tokens that follow each; ``nll`` is in nats per token.

    Most of what a model predicts in prose it predicts from the last sentences, so that little is lost by eviction.

    Args:
        tokens: length of a context.
        tokenizer: of the model.
        split: ``test``, ``validation`` or ``train``: the filler of each is its own.
        text: instead of the bundled filler: a text file, or a folder of them.
        count: number of contexts, 100 by default.
        first: number of the first context, so that a set can be measured in portions.
        seed: gives other contexts of the same split.
        rows: contexts that are read together.

    Raises:
        UserError: no tokenizer, or an unknown split.
    """
    check_split(split, tokenizer)
    filler, before = Filler(tokenizer, split, text), ChatFrame.plain(tokenizer).before
    scripts = []
    for number, stream in numbered_streams(f"continue {split} {seed}", count, first):
        ids = filler.fill(stream, tokens + AHEAD, before, [])
        asked = ForkedQuestion(ids[tokens : tokens + 1], ids[tokens + 1 :])
        scripts.append(TaskScript.of_one_context(number, ids[:tokens], [asked]))
    return ScriptedTask(title(f"continue {tokens}", split, text, seed), "prefill", scripts, rows, by_token=True)
