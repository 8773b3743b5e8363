"""One turn of a conversation: the tokens of a request, as a new prompt or behind what a cache has read before."""

from __future__ import annotations

from typing import Any, Protocol

from kv_gym.errors import UserError
from kv_gym.models.chat_template import ChatTemplate
from kv_gym.models.loading import beginning_ids, plain_ids
from kv_gym.serving.api import ChatRequest, CompletionRequest

_COLDEST = 0.01  # below, logits overflow, and the most probable token has all of the probability


class Turn(Protocol):
    """What the model is asked.

    Attributes:
        request: of which the turn is.
        transcript: all that was said so far.
    """

    request: Any
    transcript: str

    def prompt_ids(self) -> list[int]:
        """The whole prompt."""

    def new_ids(self, known: str) -> list[int]:
        """What stands behind a transcript with which this one begins."""

    def with_reply(self, text: str) -> str:
        """The transcript after the reply."""


class ChatTurn:
    """A dialogue to reply to. See :class:`Turn`.

    What follows a known dialogue is rendered apart from it, as `kv-gym chat` does: a template may write earlier
    replies otherwise than they were generated, and the cache keeps them as they were.
    """

    def __init__(self, request: ChatRequest, template: ChatTemplate):
        self.request, self._template = request, template
        self._messages = request.dialogue()
        self.transcript = request.transcript(self._messages)

    def prompt_ids(self) -> list[int]:
        """The whole dialogue by the template."""
        return self._template.ids(self._template.render(self._messages))

    def new_ids(self, known: str) -> list[int]:
        """The messages behind those that are known, which end with a reply."""
        system = next((each["content"] for each in self._messages if each["role"] == "system"), "")
        _, reply, between = self._template.frame(system)
        new = self._messages[known.count("\n") - 1 :]  # a line each, behind the first
        text = "".join((between if each["role"] == "user" else reply) + each["content"] for each in new)
        return self._template.ids(text + reply)

    def with_reply(self, text: str) -> str:
        """The transcript with the reply as the assistant's message."""
        return self.request.transcript([*self._messages, {"role": "assistant", "content": text}])


class TextTurn:
    """A text to go on with. See :class:`Turn`."""

    def __init__(self, request: CompletionRequest, tokenizer):
        self.request, self._tokenizer, self._text = request, tokenizer, request.text
        self.transcript = request.transcript(self._text)

    def prompt_ids(self) -> list[int]:
        """The text behind the tokenizer's beginning token."""
        return beginning_ids(self._tokenizer) + plain_ids(self._tokenizer, self._text)

    def new_ids(self, known: str) -> list[int]:
        """The text behind the known one."""
        return plain_ids(self._tokenizer, self.transcript[len(known) :])

    def with_reply(self, text: str) -> str:
        """The transcript and the reply."""
        return self.transcript + text


def sampling_options(request: ChatRequest | CompletionRequest, config: Any) -> dict[str, Any]:
    """What the model's ``generate`` is told about sampling.

    Args:
        request: without a temperature and top_p, the model's own settings hold, as they do in transformers.
        config: the model's generation configuration.
    """
    if request.temperature is not None and request.temperature < _COLDEST:
        return {"do_sample": False}
    if request.temperature is None and request.top_p is None and not config.do_sample:
        return {"do_sample": False}

    def chosen(given: float | None, usual: float | None) -> float:
        return given if given is not None else usual if usual is not None else 1.0

    return {
        "do_sample": True,
        "temperature": chosen(request.temperature, config.temperature),
        "top_p": chosen(request.top_p, config.top_p),
        "top_k": config.top_k or 0,  # OpenAI's API knows none; transformers' own default is 50
    }


def most_new_tokens(request: ChatRequest | CompletionRequest, limit: int, room: int | None, prompt: int) -> int:
    """How many tokens a reply may have.

    Args:
        request: which may ask for fewer.
        limit: of the server.
        room: positions that the model has left behind the prompt; None: any number.
        prompt: tokens of the prompt, for the error.

    Raises:
        UserError: more than the server or the model allows.
    """
    wanted = request.most_tokens
    if wanted is not None and wanted > limit:
        raise UserError(f"max_tokens is {wanted} and this server writes at most {limit} tokens: ask for fewer")
    if room is not None and room < (wanted or 1):
        raise UserError(
            f"the prompt has {prompt} tokens and the model {prompt + room} positions, so {wanted or 1} more do not "
            "fit: send a shorter one, or ask for fewer tokens"
        )
    return min(filter(None, (wanted, limit, room)))
