"""The part of OpenAI's API that is served: requests as they come in, replies and errors as they go out.

A field that would change the reply and is not served is refused, so that no client takes an ordinary reply for what it
asked for. A field of any other name is refused too; those that change nothing are listed here.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from kv_gym.errors import UserError
from kv_gym.files import parse_json, validated
from kv_gym.models.chat_template import check_messages

# what these fields may hold, beside null: then they ask for nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
}
# what clients send beside, and what changes no reply
_IGNORED = {
    "metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store",
}  # fmt: skip
FAILED = "the server failed at this request; its log says why"
_MOST_STOPS, _LONGEST_STOP = 4, 1000


def _as_list(value: Any) -> Any:
    if isinstance(value, list) and len(value) > _MOST_STOPS:
        raise UserError(f"stop holds {len(value)} texts; expected at most {_MOST_STOPS}")
    return [value] if isinstance(value, str) else value


def _as_parts(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise UserError("the content of a message is neither a text nor a list of parts; expected one of them")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _only_one(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


StopString = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]


class RequestError(Exception):
    """A request that gets no reply.

    Attributes:
        status: of HTTP.
        body: an error as OpenAI's clients read it.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class StreamOptions(BaseModel):
    """What a stream holds beside the text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against observers of encrypted traffic; there is none


class GenerationRequest(BaseModel):
    """What both kinds of request share.

    Attributes:
        model: name of the served model.
        max_tokens: of the reply, at most; None leaves it to the server.
        temperature, top_p: of sampling; None leaves it to the model's generation configuration.
        seed: of sampling.
        stop: texts at which the reply ends, without them.
        stream: send the reply as it comes.
        stream_options: what a stream holds beside the text.
        user: whose conversation it is; those of different users are never shared.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[StopString], BeforeValidator(_as_list)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=1000)] | None = None

    @property
    def stops(self) -> list[str]:
        """The texts at which the reply ends."""
        return self.stop or []

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class TextPart(BaseModel):
    """A part of a message's content; only text is served."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a dialogue."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_as_parts)]

    @model_validator(mode="before")
    @classmethod
    def _refuse_tool_calls(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and (data.get("tool_calls") or data.get("function_call")):
            raise UserError("a message calls tools, which are not served; leave it out")
        return data

    def plain(self) -> dict[str, str]:
        """Role and content as chat templates take them."""
        text = "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(GenerationRequest):
    """Of ``/v1/chat/completions``."""

    messages: list[Message]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None

    @property
    def most_tokens(self) -> int | None:
        """The limit of the reply, under its new or its old name."""
        return self.max_completion_tokens or self.max_tokens

    def dialogue(self) -> list[Mapping[str, str]]:
        """The messages, of which the last one is the user's.

        Raises:
            UserError: they do not alternate.
        """
        if not self.messages:
            raise UserError("messages hold nothing; expected at least one of the user")
        messages = list(check_messages([message.plain() for message in self.messages]))
        if messages[-1]["role"] != "user":
            raise UserError(f"the last message is the {messages[-1]['role']}'s; expected one of the user to reply to")
        return messages

    def transcript(self, messages: Iterable[Mapping[str, str]]) -> str:
        """Some messages as a text of which no other dialogue's is the beginning, except that of its own beginning."""
        return _line("chat", self.user) + "".join(_line(each["role"], each["content"]) for each in messages)


class CompletionRequest(GenerationRequest):
    """Of ``/v1/completions``."""

    prompt: Annotated[str, BeforeValidator(_only_one)]

    @property
    def most_tokens(self) -> int | None:
        """The limit of the reply."""
        return self.max_tokens

    @property
    def text(self) -> str:
        """The prompt.

        Raises:
            UserError: it is empty.
        """
        if not self.prompt.strip():
            raise UserError("the prompt is empty; give some text to go on with")
        return self.prompt

    def transcript(self, text: str) -> str:
        """A text with whose it is."""
        return _line("text", self.user) + text


def parse_request(kind: type[GenerationRequest], body: bytes) -> Any:
    """A request of some kind.

    Raises:
        RequestError: no JSON in UTF-8, an unknown or unserved field, or a value out of range.
    """
    try:
        data = parse_json(body.decode("utf-8"), "the request", "expected a JSON object")
        if not isinstance(data, dict):
            raise UserError("the request is no JSON object; expected model and messages or prompt")
        for name in list(data):
            if name in _IGNORED or (name in _NEUTRAL and _asks_for_nothing(data[name], _NEUTRAL[name])):
                del data[name]
            elif name in _NEUTRAL:
                reason = f"this server does not serve {name}={json.dumps(data[name])[:60]}: leave {name} out"
                raise RequestError(400, reason, "unsupported_parameter", name)
        return validated(kind, data, "the request")
    except UnicodeDecodeError:
        raise RequestError(400, "the request is no UTF-8 text; expected a JSON object in UTF-8") from None
    except UserError as error:
        raise RequestError(400, str(error)) from None


class ReplyFormat:
    """The bodies of one reply, whole or in chunks.

    Args:
        chat: a message of a dialogue, or text behind a prompt.
        model: name of the served model.
    """

    def __init__(self, chat: bool, model: str):
        self._chat = chat
        name, prefix = ("chat.completion", "chatcmpl") if chat else ("text_completion", "cmpl")
        self._name = name
        self._common = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, finish_reason: str, usage: Mapping[str, Any]) -> dict[str, Any]:
        """The reply at once."""
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
        return self._common | {"object": self._name, "choices": [choice], "usage": usage}

    def first_chunk(self) -> list[dict[str, Any]]:
        """What stands before the text of a stream."""
        return [self._chunk({"delta": {"role": "assistant", "content": ""}}, None)] if self._chat else []

    def chunk(self, text: str, finish_reason: str | None = None) -> dict[str, Any]:
        """A part of a stream."""
        if self._chat:
            return self._chunk({"delta": {"content": text} if finish_reason is None else {}}, finish_reason)
        return self._chunk({"text": text}, finish_reason)

    def usage_chunk(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """The counts of tokens, at the end of a stream."""
        return self._chunk({}, None) | {"choices": [], "usage": usage}

    def _chunk(self, said: Mapping[str, Any], finish_reason: str | None) -> dict[str, Any]:
        name = f"{self._name}.chunk" if self._chat else self._name
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
        return self._common | {"object": name, "choices": [choice]}


def _asks_for_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    return value is None or any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral)


def _line(*parts: str | None) -> str:
    return json.dumps(parts) + "\n"
