"""A text that grows over one cache, cut after every turn; and `kv-gym chat`, such a conversation in the terminal."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from kv_gym.errors import UserError, printable
from kv_gym.files import read_text
from kv_gym.live.cache import EvictingCache
from kv_gym.live.generate import Generated, Write, generate_ids
from kv_gym.live.guard import Guard
from kv_gym.models.cache_name import with_cache
from kv_gym.models.chat_template import ChatTemplate
from kv_gym.models.loading import end_tokens, refuse_too_long, token_rows
from kv_gym.policies import Policy, make_policy

QUIT = "/quit"


class TextSession:
    """A text that grows over one cache: what is new is read, the model goes on with it, and the cache is cut.

    With the trigger ``turn`` the cache holds a whole turn while that lasts, and is cut to the budget when it is
    complete, before what follows is known. A share is of all tokens seen so far.

    Args:
        model: transformers decoder.
        tokenizer: of the model.
        policy, budget, allocation, evicted, guard: see :class:`~kv_gym.live.EvictingCache`. A guard that restores
            evicted pairs gets the copies that it needs.
        trigger: ``turn``, or one of the cache's.

    Attributes:
        cache: the cache.
        ids: all tokens so far; the cache may not have read the last ones yet.
        settings: names of policy, budget, allocation, trigger and tier.

    Raises:
        UserError: what the cache refuses.
    """

    def __init__(
        self,
        model,
        tokenizer,
        policy: str | Path | Policy = "keydiff",
        budget: str | int | float = 0.25,
        allocation: str = "uniform",
        trigger: str = "turn",
        evicted: str = "drop",
        guard: Guard | None = None,
    ):
        self._model, self._tokenizer = model, tokenizer
        self._ends = end_tokens(model)
        self.ids: list[int] = []
        if trigger == "turn" and guard is not None and guard.then == "enlarge":
            raise UserError(
                "a guard that enlarges the budget changes nothing with the trigger 'turn', which cuts to the given "
                "one: choose another trigger or another reaction"
            )
        policy = make_policy(policy).with_tokenizer(tokenizer)
        offload = guard is not None and guard.then == "restore"
        self.cache = EvictingCache(
            model, policy, budget, allocation, "prefill" if trigger == "turn" else trigger, evicted=evicted,
            guard=guard, offload=offload,
        )  # fmt: skip
        config = self.cache.config
        self.settings = [config.policy.name, str(config.budget), config.allocation.name, trigger, config.evicted.name]
        self._budget = config.budget if trigger == "turn" else None
        if self._budget is not None:
            self.cache.set_budget(1.0)

    def fork(self) -> TextSession:
        """An independent copy, with a cache of its own."""
        twin = copy.copy(self)
        twin.ids, twin.cache = list(self.ids), self.cache.fork()
        return twin

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> None:
        """Read tokens behind those before, and generate none.

        Raises:
            UserError: more tokens than the model has positions.
        """
        self.ids += ids
        refuse_too_long(self._model, len(self.ids), "the text to talk about")
        new = self.ids[self.cache.seen :]
        self._model(input_ids=token_rows(self._model, [new]), **with_cache(self.cache), logits_to_keep=1)

    def reply(self, ids: Sequence[int], max_new_tokens: int, write: Write | None = None, **options: Any) -> list[int]:
        """Read tokens behind those before and go on, until a stop token of the model, which is left out.

        Args:
            ids: the new tokens.
            max_new_tokens: of the reply, at most.
            write: is called with the reply as it comes.
            options: of the model's ``generate``, such as ``temperature``; none: the most probable tokens.

        Raises:
            UserError: more tokens than the model has positions.
        """
        self.ids += ids
        reply = generate_ids(self._model, self._tokenizer, self.ids, self.cache, max_new_tokens, write, **options)
        if reply and reply[-1] in self._ends:  # a template writes it, and the cache has not read it yet
            del reply[-1]
        self.ids += reply
        return reply

    def cut(self) -> None:
        """Cut the cache to the budget: a turn is complete. Another trigger than ``turn`` cuts by itself."""
        if self._budget is not None and self.cache.seen:
            self.cache.set_budget(self._budget)
            self.cache.compress()
            self.cache.set_budget(1.0)


class Conversation:
    """A dialogue with a chat model over one cache, of which every turn reads what is new.

    Args:
        model: transformers decoder.
        tokenizer: of the model, with a chat template.
        policy, budget, allocation, trigger, evicted: see :class:`TextSession`.
        system: a system message; "" leaves it to the template.
        max_new_tokens: of a reply, at most.

    Attributes:
        cache: the cache.

    Raises:
        UserError: no chat template, or what the cache refuses.
    """

    def __init__(
        self,
        model,
        tokenizer,
        policy: str | Path | Policy = "keydiff",
        budget: str | int | float = 0.25,
        allocation: str = "uniform",
        trigger: str = "turn",
        evicted: str = "drop",
        system: str = "",
        max_new_tokens: int = 256,
    ):
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; expected a number from 1")
        self._tokenizer, self._max_new_tokens = tokenizer, max_new_tokens
        self._template = ChatTemplate(tokenizer)
        before, self._reply, self._between = self._template.frame(system)
        self._pending = before  # text that stands before the user's next message and was not read yet
        self._session = TextSession(model, tokenizer, policy, budget, allocation, trigger, evicted)
        self.cache = self._session.cache

    def read(self, context: str) -> Generated:
        """Read the beginning of the user's next message, such as a document to talk about, and cut the cache.

        Raises:
            UserError: an empty text, or one longer than the model's positions.
        """
        if not context.strip():
            raise UserError("the text to talk about is empty; give one with content")
        self._session.read(self._template.ids(f"{self._pending}{context.strip()}"))
        self._pending = "\n\n"
        return self._cut("")

    def say(self, message: str, write: Write = lambda _: None) -> Generated:
        """The reply to a message of the user, and what the cache holds after the turn.

        Args:
            message: of the user.
            write: is called with the reply as it comes.

        Raises:
            UserError: more tokens than the model has positions.
        """
        ids = self._template.ids(f"{self._pending}{message.strip()}{self._reply}")
        reply = self._session.reply(ids, self._max_new_tokens, write)
        self._pending = self._between
        return self._cut(self._tokenizer.decode(reply, skip_special_tokens=True))

    def _cut(self, text: str) -> Generated:
        self._session.cut()
        return Generated.of(text, self.cache)


def chat(
    model,
    tokenizer,
    policy: str | Path | Policy = "keydiff",
    budget: str | int | float = 0.25,
    *,
    allocation: str = "uniform",
    trigger: str = "turn",
    evicted: str = "drop",
    system: str = "",
    context: str | Path | None = None,
    max_new_tokens: int = 256,
    lines: Iterable[str] | None = None,
    write: Write = lambda text: print(printable(text, kept="\n\t"), end="", flush=True),
    note: Callable[[str], object] = lambda text: print(text, file=sys.stderr, flush=True),
) -> list[Generated]:
    """Talk with a chat model whose cache is cut after every turn.

    Each line is a message. Replies are greedy and appear as they come; after each, what the cache holds is shown.
    ``/quit``, the end of the input or Ctrl-C ends the conversation.

    Args:
        model: transformers decoder.
        tokenizer: of the model, with a chat template.
        policy: name, class path such as ``my_policy:Peak``, or folder of a trained policy.
        budget: slots per head or share of the tokens seen so far, such as ``64``, ``0.25`` or ``1/8``.
        allocation: who gets the slots: ``uniform``, ``global``, ``global:NORMALISATION`` ...
        trigger: when to evict: ``turn`` (when a reply is complete), ``prefill``, ``every:K``, ``block:K`` or
            ``lagged:K``.
        evicted: what becomes of evicted pairs: ``drop``, ``merge``, ``merge:values``, ``bits:4``, ``less:FOLDER`` ...
        system: a system message; by default what the template writes without one.
        context: a text file to talk about, which is read and cut before the first message.
        max_new_tokens: of a reply, at most.
        lines: messages; by default they are asked for.
        write: is called with each part of a reply.
        note: is called with what the cache holds.

    Returns:
        The turns: replies, and what the cache held after each.

    Raises:
        UserError: no chat template, a conversation longer than the model's positions, or what the cache refuses.
    """
    talk = Conversation(model, tokenizer, policy, budget, allocation, trigger, evicted, system, max_new_tokens)
    turns: list[Generated] = []
    with talk.cache:
        if context is not None:
            note(f"[read {context}: {talk.read(read_text(context)).cache_held}]")
        try:
            for line in _asked_lines() if lines is None else lines:
                if line.strip() == QUIT:
                    break
                if line.strip():
                    turns.append(talk.say(line, write))
                    write("\n")
                    note(f"[turn {len(turns)}: {turns[-1].cache_held}]")
        except UnicodeDecodeError:
            raise UserError("a line of the input is no UTF-8 text; expected messages in UTF-8") from None
        except KeyboardInterrupt:
            write("\n")
    return turns


def _asked_lines() -> Iterator[str]:
    """Lines of the standard input; a terminal shows a prompt and lets a line be edited."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(ImportError):
        import readline  # noqa: F401 (input() has a history then)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
