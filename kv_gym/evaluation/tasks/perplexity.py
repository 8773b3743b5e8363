"""Perplexity of any text under a bounded cache."""

from __future__ import annotations

from pathlib import Path

from kv_gym.errors import UserError
from kv_gym.evaluation.tasks.registry import register
from kv_gym.evaluation.tasks.scripted import AnswerSpan, ScriptedTask, Segment, TaskScript
from kv_gym.evaluation.tasks.task_files import encode_text, require_tokenizer
from kv_gym.files import read_text

QUARTERS = 4


@register("text:FILE", "perplexity of a text under a bounded cache, in windows of 1,024 tokens")
def perplexity(
    file: str | Path, tokenizer, tokens: int = 1024, block: int = 64, count: int = 8, rows: int = 8
) -> ScriptedTask:
    """Windows of a text, read in blocks; the cache is compressed after each and never holds more than budget + block.

    Every token but the first is an answer of its own: ``nll`` is in nats per token (its exponential is the
    perplexity), ``accuracy`` the share of tokens that were the most likely ones. Parts are ``quarter 1`` to
    ``quarter 4`` of the window. Budgets count the slots of a bounded cache: a share is of the window's tokens.

    Args:
        file: any text in UTF-8, with or without a byte order mark.
        tokenizer: the model's; its beginning-of-text token, if it has one, stands before every window.
        tokens: of a window, a multiple of 4 x `block`.
        block: tokens between compressions.
        count: number of windows, evenly spaced and without overlap; fewer where the text is short.
        rows: windows that are run together.

    Raises:
        UserError: no such file, no UTF-8, a text shorter than a window, or lengths that do not divide.
    """
    file = Path(file)
    require_tokenizer(tokenizer, file)
    if block < 1 or count < 1 or tokens < 1 or tokens % (QUARTERS * block):
        raise UserError(
            f"a window has a multiple of {QUARTERS} blocks of {block} tokens, got {tokens} tokens and {count} windows"
        )
    beginning = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    ids = encode_text(tokenizer, read_text(file, "expected a text file in UTF-8"))
    needed = tokens - len(beginning)
    if len(ids) < needed:
        raise UserError(
            f"text {file} has {len(ids)} tokens and a window needs {needed}; give a longer text or fewer tokens"
        )
    count = min(count, len(ids) // needed)
    starts = [len(ids) * number // count for number in range(count)]
    scripts = [window_script((*beginning, *ids[start : start + needed]), start, block) for start in starts]
    return ScriptedTask(f"text {file.name} {tokens}", f"block:{block}", scripts, rows)


def window_script(ids: tuple[int, ...], first: int, block: int) -> TaskScript:
    """A window of which every token but the first is an answer; `first` names it, `block` tokens are read at a time."""
    quarter = len(ids) // QUARTERS
    segments = [
        Segment(
            ids[start : start + block],
            tuple(
                AnswerSpan(place, place + 1, f"quarter {(start + place) // quarter + 1}")
                for place in range(0 if start else 1, block)
            ),
            compress=start + block < len(ids),
        )
        for start in range(0, len(ids), block)
    ]
    return TaskScript(f"token {first}", tuple(segments), length=len(ids))
