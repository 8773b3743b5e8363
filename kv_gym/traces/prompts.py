"""What to record: contexts and the continuations that follow them, from records or from running text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kv_gym.errors import UserError
from kv_gym.files import read_text
from kv_gym.models.chat_template import ChatTemplate, Messages, check_messages, context_messages
from kv_gym.models.loading import beginning_ids, text_ids
from kv_gym.records import Source, read_records
from kv_gym.traces.schema import CONTROL, ID


@dataclass(frozen=True)
class Prompt:
    """One context and what may follow it.

    Attributes:
        id: unique in a trace set; letters, digits, ``.``, ``_`` and ``-``.
        context_ids: token ids of the context, at least two.
        continuation_ids: token ids of each continuation, none empty; no continuation gives an unlabelled trace.
        task: name of the task, or ""; no control characters.
        split: ``train`` or ``test``.
        text_hash: names the document that the text was taken from; a document belongs to one split.
    """

    id: str
    context_ids: list[int]
    continuation_ids: list[list[int]]
    task: str = ""
    split: str = "train"
    text_hash: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of the context with its longest continuation."""
        return len(self.context_ids) + max(map(len, self.continuation_ids), default=0)

    def __post_init__(self):
        if not ID.fullmatch(self.id):
            raise UserError(f"prompt id {self.id[:100]!r} is not usable; expected up to 100 letters, digits and . _ -")
        if CONTROL.search(self.task):
            raise UserError(f"prompt {self.id} has control characters in its task; expected a name")
        if self.split not in ("train", "test"):
            raise UserError(f"prompt {self.id} has split {self.split!r}; expected train or test")
        if len(self.context_ids) < 2:
            raise UserError(f"prompt {self.id} has a context of {len(self.context_ids)} tokens; expected at least 2")
        if not all(self.continuation_ids):
            raise UserError(f"prompt {self.id} has an empty continuation; expected at least one token in each")


def read_prompts(source: Source, tokenizer=None, chat: bool = False) -> Iterator[Prompt]:
    """Read prompts, one a record, checked as they are read.

    A record is ``{"context": str, "continuations": [str, ...]}``, or ``{"context_ids": [int, ...],
    "continuation_ids": [[int, ...], ...]}``; optional are ``task``, ``split`` (train or test) and ``id``.
    The context gets the tokenizer's beginning token where it has one, continuations get none.

    With `chat`, text is rendered by the model's chat template: the context is what the user says first, or it is a
    dialogue ``messages``. A continuation is what the other side says next, as a text, or the messages that follow.
    Messages without continuations are continued by their last question and its answer.

    Args:
        source: JSON lines, or a dataset, see :mod:`kv_gym.records`.
        tokenizer: a transformers tokenizer; needed for text.
        chat: render text by the tokenizer's chat template.

    Raises:
        UserError: no such source, no record in it, or one that is no such prompt, with its number.
    """
    places: dict[str, str] = {}
    for where, data in read_records(source, "context and continuations"):
        prompt = _parse_prompt(data, tokenizer, chat, where, len(places))
        if prompt.id in places:
            raise UserError(f"{where} has the id {prompt.id!r} of {places[prompt.id]}; expected every id once")
        places[prompt.id] = where.rpartition(", ")[2]
        yield prompt


prompts_from_jsonl = read_prompts  # the former name


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
    text = read_text(path)
    document = _hash(text)
    prefix = beginning_ids(tokenizer)
    body = context_tokens - len(prefix)
    step = body + continuation_tokens
    # no tokenizer packs 40 characters into a token on average: the rest of a long text need not be encoded
    ids = text_ids(tokenizer, text[: 40 * step * count])
    if len(ids) < step:
        raise UserError(f"{path} has {len(ids)} tokens, and one window takes {step}: ask for shorter windows")
    for i in range(min(count, len(ids) // step)):
        window = ids[i * step : (i + 1) * step]
        context = prefix + window[:body]
        yield Prompt(f"{document}-{i:05d}", context, [window[body:]], Path(path).stem, split, document)


def _parse_prompt(data: dict[str, Any], tokenizer, chat: bool, where: str, ordinal: int) -> Prompt:
    if chat and "context_ids" not in data:
        context, continuations, content = _chat_texts(data, tokenizer, where)
        template = ChatTemplate(tokenizer)
        context_ids, continuation_ids = template.ids(context), [template.ids(text) for text in continuations]
    else:
        context_ids, continuation_ids, content = _plain_ids(data, tokenizer, where)
    content_hash, text_hash = _hash(json.dumps(content)), _hash(json.dumps(content[0]))
    try:
        return Prompt(
            id=str(data.get("id", f"{ordinal:06d}-{content_hash}")),
            context_ids=context_ids,
            continuation_ids=continuation_ids,
            task=str(data.get("task", "")),
            split=str(data.get("split", "train")),
            text_hash=text_hash,
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _plain_ids(data: dict[str, Any], tokenizer, where: str) -> tuple[list[int], list[list[int]], list]:
    """Tokens of the context and of each continuation, and both as they were written."""
    as_ids = "context_ids" in data
    names = ("context_ids", "continuation_ids") if as_ids else ("context", "continuations")
    if "messages" in data and not as_ids:
        raise UserError(f"{where} holds messages, which the model's chat template renders: ask for it with --chat")
    for name in names:
        if name not in data:
            raise UserError(f"{where} has no {name!r}; expected {names[0]!r} and {names[1]!r}")
    context, continuations = data[names[0]], data[names[1]]
    parts = [context, *continuations] if isinstance(continuations, list) else [None]
    if not all(_are_token_ids(part) if as_ids else isinstance(part, str) for part in parts):
        kinds = "lists of token ids from 0" if as_ids else "text"
        raise UserError(f"{where} holds something else than {kinds} under {names[0]!r} or in the list {names[1]!r}")
    if not (context if as_ids else context.strip()):
        raise UserError(f"{where} has an empty context; expected some text to cache")
    if not all(continuations):
        raise UserError(f"{where} has an empty continuation; expected at least one token in each")
    if as_ids:
        return context, continuations, [context, continuations]
    if tokenizer is None:
        raise UserError(f"{where} holds text and the model came without a tokenizer; give context_ids instead")
    context_ids = beginning_ids(tokenizer) + text_ids(tokenizer, context)
    return context_ids, [text_ids(tokenizer, text) for text in continuations], [context, continuations]


def _chat_texts(data: dict[str, Any], tokenizer, where: str) -> tuple[str, list[str], list]:
    """The context and what follows it as rendered texts, and both as they were written."""
    template, messages = ChatTemplate(tokenizer), context_messages(data, where)
    continuations = data.get("continuations")
    if continuations is None and "messages" in data:
        end = -2 if len(messages) > 2 and messages[-2]["role"] == "user" and messages[-3]["role"] != "system" else -1
        messages, continuations = messages[:end], [messages[end:]]
    if not isinstance(continuations, list):
        raise UserError(f"{where} has no list 'continuations'; expected texts, or lists of messages")
    content = [list(map(dict, messages)), continuations]
    try:
        parts = [template.split(messages, **_following(messages, each, where)) for each in continuations]
        return (parts[0] if parts else template.split(messages))[0], [text for _, text in parts], content
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def _following(messages: Messages, continuation: Any, where: str) -> dict[str, Any]:
    """What follows a dialogue, as arguments of :meth:`ChatTemplate.split`."""
    asked = bool(messages) and messages[-1]["role"] == "user"
    if isinstance(continuation, str):
        if not continuation.strip():
            raise UserError(f"{where} has an empty continuation; expected some text in each")
        continuation = [{"role": "assistant" if asked else "user", "content": continuation}]
    following = list(check_messages([*messages, *continuation], where))[len(messages) :]
    more = "" if asked else following.pop(0)["content"]
    return {"more": more, "following": following, "reply": not following or following[-1]["role"] == "user"}


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
