"""The server's routes: what comes in is read and checked here, and replies go out whole or as events."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from time import time
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from kv_gym.errors import UserError
from kv_gym.models.chat_template import ChatTemplate
from kv_gym.serving.api import (
    FAILED,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    ReplyFormat,
    RequestError,
    parse_request,
)
from kv_gym.serving.engine import Engine, Generation, Reply
from kv_gym.serving.metrics import Metrics
from kv_gym.serving.turns import ChatTurn, TextTurn, Turn

_LOOPBACK_NAME = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)
_BODY_SECONDS = 30  # within which a request must have arrived
_SENDING_SECONDS = 10  # that a client has, after the time of a reply, to take the last events


@dataclass(frozen=True)
class AppSettings:
    """What the routes need to know.

    Attributes:
        model: name of the served model.
        seconds: a reply that takes longer, the wait before it included, is ended.
        request_bytes: of a request, at most.
        api_key: that requests must bring; None: none.
        loopback_names_only: answer only requests that were sent to a name of the loopback. Otherwise a page in a
            browser could reach the server by a name that its owner points to this machine (DNS rebinding).
    """

    model: str
    seconds: float
    request_bytes: int
    api_key: str | None
    loopback_names_only: bool


def make_app(
    engine: Engine, metrics: Metrics, tokenizer, template: ChatTemplate | None, settings: AppSettings
) -> FastAPI:
    """The routes over an engine.

    Args:
        engine: that serves the turns.
        metrics: shown under ``/metrics``.
        tokenizer: of the model.
        template: its chat template; None refuses dialogues.
        settings: limits and names.
    """
    # no pages about the routes: they would load scripts from elsewhere
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_CountedRequests, metrics=metrics)  # type: ignore[arg-type]
    routes = APIRouter(dependencies=[Depends(_permission(settings))])
    about = {"id": settings.model, "object": "model", "created": int(time()), "owned_by": "kv-gym"}

    async def respond(request: Request, kind: type[GenerationRequest], make_turn: Callable[[Any], Turn]) -> Response:
        # in a thread, because a large request takes a while to check
        parsed = await asyncio.to_thread(parse_request, kind, await _read_body(request, settings.request_bytes))
        if parsed.model != settings.model:
            raise _unknown_model(parsed.model, settings.model)
        deadline = asyncio.get_running_loop().time() + settings.seconds
        generation = engine.submit(await asyncio.to_thread(make_turn, parsed))
        watcher = asyncio.create_task(_cancel_when_gone(request, generation))
        events = _events(generation, deadline, settings.seconds, watcher)
        form = ReplyFormat(kind is ChatRequest, settings.model)
        first = await anext(events)  # an error so far has a status of its own
        if parsed.stream:
            return _TimedStream(_chunks(first, events, form, parsed.include_usage), deadline + _SENDING_SECONDS)
        reply = first if isinstance(first, Reply) else [event async for event in events][-1]
        assert isinstance(reply, Reply)
        return JSONResponse(form.whole(reply.text, reply.finish_reason, reply.usage))

    @routes.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        if template is None:
            raise RequestError(400, "the served model has no chat template: send a prompt to /v1/completions")
        return await respond(request, ChatRequest, lambda parsed: ChatTurn(parsed, template))

    @routes.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await respond(request, CompletionRequest, lambda parsed: TextTurn(parsed, tokenizer))

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [about]}

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != settings.model:
            raise _unknown_model(name, settings.model)
        return about

    @routes.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/health")
    async def health() -> Response:
        if engine.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> Response:
        return _error(error)

    @app.exception_handler(UserError)
    async def refuse_mistake(_: Request, error: UserError) -> Response:
        return _error(RequestError(400, str(error)))

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        return _error(RequestError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}"))

    @app.exception_handler(Exception)
    async def fail(_: Request, __: Exception) -> Response:
        return _error(RequestError(500, FAILED))  # uvicorn logs what it was

    @app.exception_handler(ClientDisconnect)
    async def leave(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it; it is what proxies log for this

    app.include_router(routes)
    return app


def _permission(settings: AppSettings) -> Callable[[Request], Awaitable[None]]:
    """What refuses requests without the key, or to another name of this machine."""

    async def check(request: Request) -> None:
        host = request.headers.get("host", "")
        if settings.loopback_names_only and not _LOOPBACK_NAME.fullmatch(host):
            raise RequestError(
                403, "this server answers to localhost, 127.0.0.1 and [::1] alone, unless it asks for an API key"
            )
        if settings.api_key is not None:
            kind, _, given = request.headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.encode("latin-1"), settings.api_key.encode()):
                raise RequestError(401, "the API key is missing or wrong", "invalid_api_key")

    return check


async def _read_body(request: Request, most: int) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # a page in a browser may send any other kind to any server without asking
        raise RequestError(415, "the request is no JSON by its header; expected Content-Type: application/json")
    too_large = RequestError(413, f"the request is larger than {most:,} bytes; send a shorter one")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > most:
                    raise too_large
    except TimeoutError:
        raise RequestError(408, f"the request did not arrive within {_BODY_SECONDS} seconds") from None
    return b"".join(parts)


async def _cancel_when_gone(request: Request, generation: Generation) -> None:
    """Cancel a generation when the client disconnects; a whole body has been read, so that nothing else comes."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    generation.cancel("disconnect")


async def _events(
    generation: Generation, deadline: float, seconds: float, watcher: asyncio.Task
) -> AsyncIterator[str | Reply]:
    """Parts of the text and then the reply.

    Raises:
        RequestError: the generation failed, or did not end in time.
    """
    try:
        while True:
            async with asyncio.timeout_at(deadline):
                event = await generation.events.get()
            if isinstance(event, RequestError):
                raise event
            yield event
            if isinstance(event, Reply):
                return
    except TimeoutError:
        generation.cancel("timeout")
        raise RequestError(504, f"the reply took longer than {seconds:g} seconds", "timeout") from None
    finally:
        generation.cancel("disconnect")
        watcher.cancel()


async def _chunks(
    first: str | Reply, events: AsyncIterator[str | Reply], form: ReplyFormat, include_usage: bool
) -> AsyncIterator[str]:
    """The events of a stream as server-sent ones."""
    for chunk in form.first_chunk():
        yield _sent(chunk)
    event: str | Reply = first
    try:
        while isinstance(event, str):
            yield _sent(form.chunk(event))
            event = await anext(events)
    except RequestError as error:  # the status has gone out
        yield _sent(error.body)
        return
    yield _sent(form.chunk("", event.finish_reason))
    if include_usage:
        yield _sent(form.usage_chunk(event.usage))
    yield "data: [DONE]\n\n"


def _sent(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _error(error: RequestError) -> Response:
    return JSONResponse(error.body, error.status, {"Retry-After": "1"} if error.status == 429 else None)


def _unknown_model(wanted: str, served: str) -> RequestError:
    return RequestError(
        404, f"there is no model {wanted[:100]!r} here; expected {served!r}", "model_not_found", "model"
    )


class _TimedStream(StreamingResponse):
    """Server-sent events to a client that must take them in time; else the connection is closed."""

    def __init__(self, content: AsyncIterator[str], deadline: float):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._deadline = deadline

    async def __call__(self, scope, receive, send) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._deadline):
                await super().__call__(scope, receive, send)


class _CountedRequests:
    """Counts requests by route and status."""

    _ROUTES = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics", "/health"}

    def __init__(self, app, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = "none"

        async def note_status(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        finally:
            route = scope["path"] if scope["path"] in self._ROUTES else "other"
            self._metrics.requests.labels(route, status).inc()
