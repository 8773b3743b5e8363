"""The model's side of a server: one generation at a time, in a thread of its own, over the conversations' caches."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch
import transformers

from kv_gym.errors import UserError
from kv_gym.live.cache import EvictingCache
from kv_gym.live.conversation import TextSession
from kv_gym.models.loading import plain_ids
from kv_gym.serving.api import FAILED, RequestError
from kv_gym.serving.conversations import Conversations, held_slots
from kv_gym.serving.metrics import Metrics
from kv_gym.serving.reply_stream import ReplyStream
from kv_gym.serving.turns import Turn, most_new_tokens, sampling_options

_log = logging.getLogger("kv_gym.serving")

_CHUNK = 512  # tokens of a prompt that are read at a time, because a reply can be ended before each forward
# transformers gave every chunk the positions of the last one before 5.4
_CHUNKS_WORK = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 4)


@dataclass(frozen=True)
class Reply:
    """A whole reply.

    Attributes:
        text: without the stop string that ended it.
        finish_reason: ``stop`` (a stop token or string) or ``length``.
        prompt_tokens: of the whole prompt.
        cached_tokens: those of them that the conversation's cache had read before.
        completion_tokens: generated.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    @property
    def usage(self) -> dict[str, Any]:
        """The counts as clients read them."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Generation:
    """A turn that waits for the model or is served by it; made by :meth:`Engine.submit`.

    Attributes:
        turn: what is asked.
        events: parts of the text, then a :class:`Reply` or a :class:`RequestError`.
        cancelled_by: why nobody waits for the reply, once that is so.
    """

    def __init__(self, turn: Turn):
        self.turn = turn
        self.events: asyncio.Queue[str | Reply | RequestError] = asyncio.Queue()
        self.cancelled_by: str | None = None
        self._loop = asyncio.get_running_loop()
        self.future: Future | None = None

    def cancel(self, reason: str) -> None:
        """Nobody waits for the reply any more: the conversation becomes what it was before."""
        self.cancelled_by = self.cancelled_by or reason
        self.events.put_nowait(RequestError(499, f"the request was cancelled ({reason})"))
        if self.future is not None:
            self.future.cancel()  # it leaves the queue, unless it is being served

    def emit(self, event: str | Reply | RequestError) -> None:
        """Hand on an event, from the model's thread."""
        with suppress(RuntimeError):  # the server has ended
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class _CancelledError(Exception):
    """Whoever asked for a reply does not wait for it any more."""


class Engine:
    """Serves turns one after the other.

    Args:
        model: transformers decoder.
        tokenizer: of the model.
        conversations: remembered ones; used by the engine's thread alone.
        metrics: what is counted.
        max_tokens: of a reply, at most.
        most_waiting: turns that may wait while another one is served.

    Attributes:
        stopping: no turn is served any more. A plain attribute, because a signal's handler sets it.
    """

    def __init__(
        self, model, tokenizer, conversations: Conversations, metrics: Metrics, max_tokens: int, most_waiting: int
    ):
        self._model, self._tokenizer = model, tokenizer
        self._conversations, self._metrics = conversations, metrics
        self._max_tokens, self._most_waiting = max_tokens, most_waiting
        self._thread = ThreadPoolExecutor(1, "kv-gym-model")
        self._pending, self._lock = 0, threading.Lock()
        self.stopping = False

    def submit(self, turn: Turn) -> Generation:
        """Queue a turn.

        Raises:
            RequestError: too many wait already, or the server stops.
        """
        with self._lock:
            if self.stopping:
                raise _stopping()
            if self._pending > self._most_waiting:
                raise RequestError(
                    429, f"{self._most_waiting} requests wait for the model already; try again later", "queue_full"
                )
            self._count_pending(1)
        generation = Generation(turn)
        generation.future = self._thread.submit(self._run, generation)
        generation.future.add_done_callback(self._finished)
        return generation

    def close(self) -> None:
        """End the generation under way, refuse those that wait, and forget all conversations."""
        self.stopping = True
        self._thread.shutdown(wait=True)  # those that wait are served, with a refusal
        self._conversations.close()

    def _finished(self, _: Future) -> None:
        with self._lock:
            self._count_pending(-1)

    def _count_pending(self, change: int) -> None:
        self._pending += change
        self._metrics.waiting.set(self._pending)

    def _run(self, generation: Generation) -> None:
        try:
            generation.emit(self._serve(generation))
        except _CancelledError:
            self._metrics.interrupted.labels(generation.cancelled_by).inc()
        except RequestError as error:
            generation.emit(error)
        except UserError as error:
            generation.emit(RequestError(400, str(error)))
        except (MemoryError, torch.OutOfMemoryError):
            self._metrics.interrupted.labels("memory").inc()
            generation.emit(RequestError(503, "the server is out of memory for this conversation; send a shorter one"))
        except Exception:
            _log.exception("a generation failed")
            self._metrics.interrupted.labels("failure").inc()
            generation.emit(RequestError(500, FAILED))
        finally:
            self._metrics.show(self._conversations)

    def _serve(self, generation: Generation) -> Reply:
        turn = generation.turn
        self._check(generation)
        known = self._conversations.take(turn.transcript)
        new = [] if known is None else turn.new_ids(known[0])
        if known is not None and len(known[1].ids) + len(new) == known[1].cache.seen:  # nothing is left to read
            self._conversations.put(*known)
            known = None
        try:
            before = self._conversations.new() if known is None else known[1]
            reply, session = self._reply(generation, before, turn.prompt_ids() if known is None else new)
        except BaseException:
            if known is not None:
                self._conversations.put(*known)
            raise
        self._conversations.put(turn.with_reply(reply.text), session)
        return reply

    def _reply(self, generation: Generation, before: TextSession, new: list[int]) -> tuple[Reply, TextSession]:
        """Generate behind a session, which stays as it is, and give the one to go on with."""
        request, counts = generation.turn.request, self._metrics
        cached, prompt = before.cache.seen, len(before.ids) + len(new)
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        room = None if positions is None or before.cache.config.rope_shift is not None else positions - prompt
        most = most_new_tokens(request, self._max_tokens, room, prompt)
        stream = ReplyStream(self._tokenizer, request.stops, generation.emit)
        options = sampling_options(request, self._model.generation_config) | {"stopping_criteria": [stream]}
        trigger = before.cache.config.trigger
        if _CHUNKS_WORK and (trigger.every is None or trigger.within_forward):  # others would evict between chunks
            options["prefill_chunk_size"] = _CHUNK
        session, began = before.fork(), monotonic()
        with self._interruptible(generation), _seeded(self._model.device, request.seed):
            kept = session.reply(new, most, **options)
        stream.finish()
        ended = stream.stopped or len(kept) < len(stream.tokens)
        if stream.stopped:
            session = self._without_stop(session, before, new, stream)
        session.cut()
        counts.tokens_read.inc(prompt - cached)
        counts.tokens_reused.inc(cached)
        counts.tokens_generated.inc(len(stream.tokens))
        counts.evicted_slots.inc(max(0, _evicted_slots(session.cache) - _evicted_slots(before.cache)))
        counts.alarms.inc(_alarms(session.cache) - _alarms(before.cache))
        first, last = stream.times[0], stream.times[-1]
        counts.reading.observe(first - began)
        counts.generating.observe(monotonic() - began)
        if last > first:
            counts.tokens_per_second.set((len(stream.times) - 1) / (last - first))
        reason = "stop" if ended else "length"
        return Reply(stream.text, reason, prompt, cached, len(stream.tokens)), session

    def _without_stop(
        self, session: TextSession, before: TextSession, new: list[int], stream: ReplyStream
    ) -> TextSession:
        """The session as if the reply had ended before its stop string."""
        tokens = stream.tokens_of_text()
        beginning = self._tokenizer.decode(tokens, skip_special_tokens=True)
        ids = [*before.ids, *new, *tokens]
        try:
            if session.cache.seen > len(ids):
                session.cache.crop(len(ids) - session.cache.seen)
        except UserError:  # it was evicted or remembered: the turn is read again with the next one
            session = before.fork()
        session.ids = ids + plain_ids(self._tokenizer, stream.text[len(beginning) :])
        return session

    @contextmanager
    def _interruptible(self, generation: Generation) -> Iterator[None]:
        """Within the block, every forward of the model begins with :meth:`_check`."""
        hook = self._model.register_forward_pre_hook(lambda *_: self._check(generation))
        try:
            yield
        finally:
            hook.remove()

    def _check(self, generation: Generation) -> None:
        if self.stopping:
            raise _stopping()
        if generation.cancelled_by is not None:
            raise _CancelledError


@contextmanager
def _seeded(device: torch.device, seed: int | None) -> Iterator[None]:
    """Draw random numbers from a seed, or from a new one; the process's own generator goes on as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(secrets.randbits(63) if seed is None else seed)
        yield


def _stopping() -> RequestError:
    return RequestError(503, "the server is shutting down; try again later")


def _evicted_slots(cache: EvictingCache) -> int:
    return cache.seen * cache.kept().numel() - held_slots(cache) if cache.seen else 0


def _alarms(cache: EvictingCache) -> int:
    return 0 if cache.monitor is None else cache.monitor.alarms
