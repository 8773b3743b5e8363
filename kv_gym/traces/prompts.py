"""What to record: contexts and the continuations that follow them, from JSON lines or from running text."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kv_gym.errors import UserError

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Prompt:
    """One context and what may follow it.

    Attributes:
        id: unique in a trace set; letters, digits, ``.``, ``_`` and ``-``.
        context_ids: token ids of the context, at least two.
        continuation_ids: token ids of each continuation, none empty; no continuation gives an unlabelled trace.
        task: name of the task, or "".
        split: ``train`` or ``test``.
        text_hash: names the document that the text was taken from; a document belongs to one split.
    """

    id: str
    context_ids: list[int]
    continuation_ids: list[list[int]]
    task: str = ""
    split: str = "train"
    text_hash: str = ""

    def __post_init__(self):
        if not _ID.fullmatch(self.id):
            raise UserError(f"prompt id {self.id!r} is not usable; expected up to 100 letters, digits and . _ -")
        if self.split not in ("train", "test"):
            raise UserError(f"prompt {self.id} has split {self.split!r}; expected train or test")
        if len(self.context_ids) < 2:
            raise UserError(f"prompt {self.id} has a context of {len(self.context_ids)} tokens; expected at least 2")
        if not all(self.continuation_ids):
            raise UserError(f"prompt {self.id} has an empty continuation; expected at least one token in each")


def prompts_from_jsonl(path: str | Path, tokenizer=None) -> Iterator[Prompt]:
    """Read prompts from JSON lines, one prompt a line, checked as they are read.

    A line is ``{"context": str, "continuations": [str, ...]}``, or ``{"context_ids": [int, ...],
    "continuation_ids": [[int, ...], ...]}``; optional are ``task``, ``split`` (train or test) and ``id``.
    The context gets the tokenizer's beginning token where it has one, continuations get none.

    Args:
        path: a UTF-8 file.
        tokenizer: a transformers tokenizer; needed for lines with text.

    Raises:
        UserError: no such file, no line in it, or a line that is no such prompt, with its number.
    """
    seen: dict[str, int] = {}
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        prompt = _prompt_of(_parse(line, where), tokenizer, where, len(seen))
        if prompt.id in seen:
            raise UserError(f"{where} has the id {prompt.id!r} of line {seen[prompt.id]}; expected every id once")
        seen[prompt.id] = number
        yield prompt
    if not seen:
        raise UserError(f"{path} holds no prompt; expected one JSON object a line")


def prompts_from_text(
    path: str | Path,
    tokenizer,
    context_tokens: int = 512,
    continuation_tokens: int = 64,
    count: int = 64,
    split: str = "train",
) -> Iterator[Prompt]:
    """Cut a text into windows that follow one another: a context, and the text after it as its continuation.

    A file is one document: all its windows have one `split`, so that no text stands in both.

    Args:
        path: a UTF-8 text, with or without a byte order mark.
        tokenizer: a transformers tokenizer.
        context_tokens, continuation_tokens: length of each part; the tokenizer's beginning token counts.
        count: how many windows at most; fewer if the text ends.
        split: ``train`` or ``test``.

    Raises:
        UserError: no such file, no tokenizer, or a text shorter than one window.
    """
    if tokenizer is None:
        raise UserError(f"{path} is text and the model came without a tokenizer; give token ids as JSON lines instead")
    if context_tokens < 2 or continuation_tokens < 1 or count < 1:
        raise UserError(
            f"{count} windows of {context_tokens} + {continuation_tokens} tokens were asked for; expected at least "
            "one window of 2 + 1"
        )
    text = _read(path)
    document = _hash(text)
    first = _beginning(tokenizer)
    body = context_tokens - len(first)
    step = body + continuation_tokens
    # no tokenizer packs 40 characters into a token on average: the rest of a long text need not be encoded
    ids = _encode(tokenizer, text[: 40 * step * count])
    if len(ids) < step:
        raise UserError(f"{path} has {len(ids)} tokens, and one window takes {step}: ask for shorter windows")
    for i in range(min(count, len(ids) // step)):
        window = ids[i * step : (i + 1) * step]
        context = first + window[:body]
        yield Prompt(f"{document}-{i:05d}", context, [window[body:]], Path(path).stem, split, document)


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is no JSON ({error}); expected one object a line") from None
    if not isinstance(data, dict):
        raise UserError(f"{where} is no JSON object; expected context and continuations")
    return data


def _prompt_of(data: dict[str, Any], tokenizer, where: str, ordinal: int) -> Prompt:
    as_ids = "context_ids" in data
    names = ("context_ids", "continuation_ids") if as_ids else ("context", "continuations")
    for name in names:
        if name not in data:
            raise UserError(f"{where} has no {name!r}; expected {names[0]!r} and {names[1]!r}")
    context, continuations = data[names[0]], data[names[1]]
    listed = continuations if isinstance(continuations, list) else [None]
    right = _is_ids if as_ids else (lambda text: isinstance(text, str))
    if not right(context) or not all(right(one) for one in listed):
        kinds = "lists of token ids from 0" if as_ids else "text"
        raise UserError(f"{where} holds something else than {kinds} under {names[0]!r} or in the list {names[1]!r}")
    if not (context if as_ids else context.strip()):
        raise UserError(f"{where} has an empty context; expected some text to cache")
    if not all(continuations):
        raise UserError(f"{where} has an empty continuation; expected at least one token in each")
    if not as_ids and tokenizer is None:
        raise UserError(f"{where} holds text and the model came without a tokenizer; give context_ids instead")
    content = _hash(json.dumps([context, continuations]))
    text_hash = _hash(json.dumps(context))
    if not as_ids:
        context = _beginning(tokenizer) + _encode(tokenizer, context)
        continuations = [_encode(tokenizer, text) for text in continuations]
    try:
        return Prompt(
            id=str(data.get("id", f"{ordinal:06d}-{content}")),
            context_ids=context,
            continuation_ids=continuations,
            task=str(data.get("task", "")),
            split=str(data.get("split", "train")),
            text_hash=text_hash,
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _is_ids(value) -> bool:
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)


def _encode(tokenizer, text: str) -> list[int]:
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    unknown = ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
    if unknown > len(ids) / 2:
        raise UserError(
            f"{unknown} of {len(ids)} tokens are unknown to the model's tokenizer; expected text in the words that it "
            "was made for"
        )
    return ids


def _beginning(tokenizer) -> list[int]:
    """The token that the tokenizer sets before a text, if any; an end token that it may add is left out."""
    alone = list(tokenizer("")["input_ids"])
    return alone[:1] if alone[:1] == [tokenizer.bos_token_id] else []


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); expected a text file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no UTF-8 text; convert it first") from None
