"""`kv-gym generate`: text from a prompt through an evicting cache, word by word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import TextStreamer

from kv_gym.errors import UserError
from kv_gym.live.cache import EvictingCache
from kv_gym.policies import Policy


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


class _Streamer(TextStreamer):
    def __init__(self, tokenizer, write: Callable[[str], object]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


def generate(
    model,
    tokenizer,
    prompt: str,
    policy: str | Path | Policy = "keydiff",
    budget: str | int | float = 0.25,
    trigger: str = "prefill",
    allocation: str = "uniform",
    max_new_tokens: int = 64,
    write: Callable[[str], object] = lambda _: None,
    evicted: str = "drop",
) -> Generated:
    """Generate text with an evicting cache.

    The prompt is continued greedily with an :class:`~kv_gym.live.EvictingCache`.

    Args:
        model: transformers decoder.
        tokenizer: of the model.
        prompt: text to continue.
        policy: name, class path such as ``my_policy:Peak``, or folder of a trained policy.
        budget: slots per head or share of the tokens, such as ``64``, ``0.25`` or ``1/8``.
        trigger: when to evict: ``prefill``, ``every:K``, ``block:K`` or ``lagged:K``.
        allocation: who gets the slots: ``uniform``, ``global``, ``global:NORMALISATION`` ...
        max_new_tokens: how many tokens to generate, at most.
        write: is called with the text as it comes.
        evicted: what becomes of evicted pairs: ``drop``, ``merge``, ``merge:values``, ``bits:4`` ...

    Returns:
        The text, and what the cache held at the end.

    Raises:
        UserError: an empty prompt, no token to generate, or whatever the cache refuses.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; expected a number from 1")
    if not prompt.strip():
        raise UserError("the prompt is empty; give some text to go on with")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    with EvictingCache(model, policy, budget, allocation, trigger, evicted=evicted) as cache:
        tokens = model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=_Streamer(tokenizer, write),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
        kept = cache.kept()
        text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        spread = int(kept.min()), int(kept.max())
        return Generated(text, cache.seen, float(kept.double().mean()), spread, cache.nbytes())
