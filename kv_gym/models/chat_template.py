"""Dialogues by the model's own chat template, cut where the context ends and what follows it begins.

A rendered dialogue is cut at a marker inside a user's turn, and the two sides are tokenised apart: so the tokens of a
context are the same whatever is asked of it, and a cache that has read them serves every question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kv_gym.errors import UserError, short_reason
from kv_gym.models.loading import plain_ids
from kv_gym.models.template_renderer import TemplateRefusal, renderer

Messages = Sequence[Mapping[str, str]]
"""Turns of a dialogue, each with ``role`` and ``content``: at most one ``system`` message, then ``user`` and
``assistant`` in turn."""

_MARKER = "[[kv-gym:{}]]"


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: of the model.
        name: what to call the model in errors.

    Raises:
        UserError: the tokenizer has no chat template, or there is no tokenizer.
    """

    def __init__(self, tokenizer: Any, name: str = "the model"):
        if tokenizer is None or not getattr(tokenizer, "chat_template", None):
            what = "no tokenizer" if tokenizer is None else "a tokenizer without a chat template"
            raise UserError(f"{name} comes with {what}, so it cannot chat: take a chat model, or leave --chat out")
        self.tokenizer = tokenizer

    def render(self, messages: Messages, reply: bool = True) -> str:
        """The whole dialogue as text.

        Args:
            messages: the turns.
            reply: end with what stands before a reply of the assistant.

        Raises:
            UserError: the template refuses the messages, or takes more time or memory than a template may (see
                :mod:`kv_gym.models.template_renderer`).
        """
        template = self.tokenizer.chat_template
        if not isinstance(template, str):  # several, by name
            template = self.tokenizer.get_chat_template()
        try:
            return renderer(template).render(messages, reply, self.tokenizer.special_tokens_map)
        except TemplateRefusal as refusal:
            raise UserError(f"the model's chat template refuses the messages: {short_reason(refusal)}") from None

    def split(
        self, messages: Messages, more: str = "", following: Messages = (), reply: bool = True
    ) -> tuple[str, str]:
        """Render a context and what follows it, apart; see the module.

        Args:
            messages: the context. Where its last message is the user's, `more` goes on with it, on a line of its own
                unless white space stands between; otherwise `more` is the user's next message.
            more: what the user says after the context, such as a question.
            following: messages after that.
            reply: end with what stands before a reply of the assistant.

        Returns:
            The text of the context and the text behind it.

        Raises:
            UserError: messages that do not alternate, or a template that renders the context otherwise when something
                follows it.
        """
        before, said = list(messages), ""
        if before and before[-1]["role"] == "user":
            said = before.pop()["content"]
            if more.strip() and not more[0].isspace() and not said[-1:].isspace():
                more = f"\n{more}"
        whole = check_messages([*before, {"role": "user", "content": said + more}, *following])
        marker = unused_marker(whole)
        turns = [*before, {"role": "user", "content": said + marker + more}, *following]
        alone = [*before, {"role": "user", "content": said + marker}]
        context, found, behind = self.render(turns, reply).partition(marker)
        if not found or marker in behind or self.render(alone).partition(marker)[0] != context:
            raise UserError(
                "the model's chat template renders a context otherwise when something follows it, so that no cache of "
                "the context serves several questions: leave --chat out and write the turns into the text"
            )
        return context, behind

    def frame(self, system: str = "") -> tuple[str, str, str]:
        """What stands around the messages of a conversation that goes on and on.

        Args:
            system: content of the system message; "" for none.

        Returns:
            Text before the first message of the user, between a message of the user and the reply, and between a reply
            and the user's next message.

        Raises:
            UserError: the template refuses such messages, or does not repeat them as they are.
        """
        marks = [_MARKER.format(name) for name in ("first", "reply", "last")]
        turns = [
            {"role": role, "content": mark} for role, mark in zip(("user", "assistant", "user"), marks, strict=True)
        ]
        rest = self.render([{"role": "system", "content": system}] * bool(system) + turns)
        parts = []
        for mark in marks:
            part, found, rest = rest.partition(mark)
            if found:
                parts.append(part)
        if len(parts) < len(marks):
            raise UserError("the model's chat template leaves messages out, so that a cache cannot go on with them")
        before, _, between = parts
        return before, rest, between

    def ask(self, messages: Messages, question: str, answer_prefix: str = "") -> tuple[str, str]:
        """A context, and a question with the beginning of the assistant's reply, as texts.

        Args:
            messages: as for :meth:`split`.
            question: of the user.
            answer_prefix: with which the reply begins.
        """
        context, behind = self.split(messages, question)
        return context, behind + answer_prefix.strip()

    def ids(self, text: str) -> list[int]:
        """Token ids of rendered text: the template has put in what stands at its beginning."""
        return plain_ids(self.tokenizer, text)


def answer_after(answer_prefix: str, answer: str) -> str:
    """An answer as it follows a reply's beginning: behind a space where there is one, else without leading space."""
    return f" {answer.strip()}" if answer_prefix.strip() else answer.strip()


def check_messages(messages: Any, where: str = "") -> Messages:
    """Messages with a role and a text each, that alternate.

    Args:
        messages: of a file, or a caller's.
        where: names them in errors.

    Raises:
        UserError: anything else.
    """
    place = f"{where}: " if where else ""
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError(f"{place}messages are no list; expected objects with role and content")
    expected: tuple[str, ...] = ("system", "user")
    for number, message in enumerate(messages, 1):
        role, content = (message.get(key) if isinstance(message, Mapping) else None for key in ("role", "content"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"{place}message {number} has no text under role or content; expected both")
        if role not in expected:
            known = " or ".join(expected)
            raise UserError(
                f"{place}message {number} has the role {role[:40]!r} where {known} was expected: user and assistant "
                "take turns, after at most one system message"
            )
        expected = ("assistant",) if role == "user" else ("user",)
    return messages


def unused_marker(messages: Messages) -> str:
    """A text that stands in none of the messages."""
    number = 0
    while any(_MARKER.format(number) in message["content"] for message in messages):
        number += 1
    return _MARKER.format(number)


def context_messages(data: Mapping[str, Any], where: str) -> list[Mapping[str, str]]:
    """The dialogue of a record: its ``messages``, or its ``context`` as what the user says first.

    Raises:
        UserError: neither of them, or messages that do not alternate.
    """
    if data.get("messages") is not None:
        return list(check_messages(data["messages"], where))
    text = data.get("context")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where} has no context; expected a text 'context', or 'messages' with role and content")
    return [{"role": "user", "content": text}]
