"""`kv-gym generate`: text from a prompt through an evicting cache, word by word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from kv_gym.errors import UserError
from kv_gym.live.cache import EvictingCache
from kv_gym.models.cache_name import with_cache
from kv_gym.models.chat_template import ChatTemplate, Messages, check_messages
from kv_gym.models.loading import beginning_ids, plain_ids, refuse_too_long, token_rows
from kv_gym.policies import Policy, make_policy

Write = Callable[[str], object]
"""Takes the parts of a text as they come."""


@dataclass(frozen=True)
class Generated:
    """What was generated, and what the cache held at the end.

    Attributes:
        text: the new text.
        seen: tokens that went through the cache.
        kept: tokens that the KV heads still held, on average.
        spread: fewest and most tokens that a head held.
        nbytes: bytes of the whole cache.
    """

    text: str
    seen: int
    kept: float
    spread: tuple[int, int]
    nbytes: int

    @classmethod
    def of(cls, text: str, cache: EvictingCache) -> Generated:
        """Some text and what a cache holds now."""
        kept = cache.kept()
        return cls(text, cache.seen, float(kept.double().mean()), (int(kept.min()), int(kept.max())), cache.nbytes())

    @property
    def cache_held(self) -> str:
        """What the cache held, in words."""
        fewest, most = self.spread
        heads = "each head" if fewest == most else f"a head on average ({fewest:,} to {most:,})"
        return f"{self.kept:,.6g} of {self.seen:,} tokens in {heads}, {self.nbytes:,} bytes"


def generate_ids(
    model,
    tokenizer,
    ids: list[int],
    cache: EvictingCache,
    max_new_tokens: int,
    write: Write | None = None,
    **options: Any,
) -> list[int]:
    """The tokens that follow some others, until a stop token of the model's generation configuration.

    Args:
        model: transformers decoder.
        tokenizer: of the model.
        ids: all tokens so far; the cache may have seen the first of them.
        cache: that reads the rest.
        max_new_tokens: how many to generate, at most.
        write: is called with the text as it comes.
        options: of the model's ``generate``; none: the most probable tokens.

    Raises:
        UserError: more tokens than the model has positions, unless the cache keeps them within.
    """
    if cache.config.rope_shift is None:
        refuse_too_long(model, len(ids), "the text so far")
    tokens = token_rows(model, [ids])
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        **with_cache(cache),
        max_new_tokens=max_new_tokens,
        streamer=None if write is None else _Streamer(tokenizer, write),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **(options or {"do_sample": False}),
    )
    return output[0, len(ids) :].tolist()


class _Streamer(TextStreamer):
    def __init__(self, tokenizer, write: Write):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


def generate(
    model,
    tokenizer,
    prompt: str | Messages,
    policy: str | Path | Policy = "keydiff",
    budget: str | int | float = 0.25,
    trigger: str = "prefill",
    allocation: str = "uniform",
    max_new_tokens: int = 64,
    write: Write = lambda _: None,
    evicted: str = "drop",
    select: str = "all",
    chat: bool = False,
) -> Generated:
    """Generate text with an evicting cache.

    The prompt is continued greedily with an :class:`~kv_gym.live.EvictingCache`.

    Args:
        model: transformers decoder.
        tokenizer: of the model.
        prompt: text to continue. In Python, also a dialogue to reply to, as messages with role and content.
        policy: name, class path such as ``my_policy:Peak``, or folder of a trained policy.
        budget: slots per head or share of the tokens, such as ``64``, ``0.25`` or ``1/8``.
        trigger: when to evict: ``prefill``, ``every:K``, ``block:K`` or ``lagged:K``.
        allocation: who gets the slots: ``uniform``, ``global``, ``global:NORMALISATION`` ...
        max_new_tokens: how many tokens to generate, at most.
        write: is called with the text as it comes.
        evicted: what becomes of evicted pairs: ``drop``, ``merge``, ``merge:values``, ``bits:4``, ``less:FOLDER`` ...
        select: which of the held slots a query reads: ``all``, ``mpcache:0.2``, ``quest:0.2`` ...
        chat: reply to the prompt as a user's message, by the model's chat template.

    Returns:
        The text, and what the cache held at the end.

    Raises:
        UserError: an empty prompt, no token to generate, a prompt longer than the model's positions, no chat template,
            or whatever the cache refuses.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; expected a number from 1")
    if not isinstance(prompt, str) or chat:
        template = ChatTemplate(tokenizer)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else check_messages(prompt)
        if not messages[-1]["content"].strip():
            raise UserError("the prompt is empty; give some text to reply to")
        ids = template.ids(template.render(messages))
    elif prompt.strip():
        ids = beginning_ids(tokenizer) + plain_ids(tokenizer, prompt)
    else:
        raise UserError("the prompt is empty; give some text to go on with")
    policy = make_policy(policy).with_tokenizer(tokenizer)
    with EvictingCache(model, policy, budget, allocation, trigger, evicted=evicted, select=select) as cache:
        new = generate_ids(model, tokenizer, ids, cache, max_new_tokens, write)
        return Generated.of(tokenizer.decode(new, skip_special_tokens=True), cache)
