"""`kv-gym chat`: a conversation in the terminal, with a cache that is cut after every turn."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

from kv_gym.errors import UserError, printable
from kv_gym.files import read_text
from kv_gym.live.cache import EvictingCache
from kv_gym.live.generate import Generated, generate_ids
from kv_gym.models.chat_template import ChatTemplate
from kv_gym.models.loading import end_tokens, refuse_too_long, token_rows
from kv_gym.policies import Policy, make_policy

QUIT = "/quit"


class Conversation:
    """A dialogue with a chat model over one cache, of which every turn reads what is new.

    With the trigger ``turn`` the cache holds a whole turn while that lasts, and is cut to the budget when the reply is
    complete, before the next question is known. A share is of all tokens seen so far.

    Args:
        model: transformers decoder.
        tokenizer: of the model, with a chat template.
        policy, budget, allocation, evicted: see :class:`~kv_gym.live.EvictingCache`.
        trigger: ``turn``, or one of the cache's.
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
        self._model, self._tokenizer, self._max_new_tokens = model, tokenizer, max_new_tokens
        self._template = ChatTemplate(tokenizer)
        before, self._reply, self._between = self._template.frame(system)
        self._pending = before  # text that stands before the user's next message and was not read yet
        self._ids: list[int] = []
        self._ends = end_tokens(model)
        policy = make_policy(policy).with_tokenizer(tokenizer)
        self.cache = EvictingCache(
            model, policy, budget, allocation, "prefill" if trigger == "turn" else trigger, evicted=evicted
        )
        self._budget = self.cache.config.budget if trigger == "turn" else None
        if self._budget is not None:
            self.cache.set_budget(1.0)

    @torch.no_grad()
    def read(self, context: str) -> Generated:
        """Read the beginning of the user's next message, such as a document to talk about, and cut the cache.

        Raises:
            UserError: an empty text, or one longer than the model's positions.
        """
        if not context.strip():
            raise UserError("the text to talk about is empty; give one with content")
        self._ids += self._template.ids(f"{self._pending}{context.strip()}")
        self._pending = "\n\n"
        refuse_too_long(self._model, len(self._ids), "the text to talk about")
        new = self._ids[self.cache.seen :]
        self._model(input_ids=token_rows(self._model, [new]), past_key_values=self.cache, logits_to_keep=1)
        return self._cut("")

    def say(self, message: str, write: Callable[[str], object] = lambda _: None) -> Generated:
        """The reply to a message of the user, and what the cache holds after the turn.

        Args:
            message: of the user.
            write: is called with the reply as it comes.

        Raises:
            UserError: more tokens than the model has positions.
        """
        self._ids += self._template.ids(f"{self._pending}{message.strip()}{self._reply}")
        reply = generate_ids(self._model, self._tokenizer, self._ids, self.cache, self._max_new_tokens, write)
        if reply[-1] in self._ends:  # the template writes it, and the cache has not read it yet
            del reply[-1]
        self._ids += reply
        self._pending = self._between
        return self._cut(self._tokenizer.decode(reply, skip_special_tokens=True))

    def _cut(self, text: str) -> Generated:
        if self._budget is not None:
            self.cache.set_budget(self._budget)
            self.cache.compress()
            self.cache.set_budget(1.0)
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
    write: Callable[[str], object] = lambda text: print(printable(text, kept="\n\t"), end="", flush=True),
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
