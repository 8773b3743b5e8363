"""`kv-gym serve`: the server as a process, or in a thread of the caller's."""

from __future__ import annotations

import ipaddress
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from kv_gym.errors import UserError, printable
from kv_gym.files import make_folder
from kv_gym.live.conversation import TextSession
from kv_gym.live.guard import Guard
from kv_gym.live.saving import refuse_unsavable
from kv_gym.models.chat_template import ChatTemplate
from kv_gym.policies import Policy

try:
    import uvicorn

    from kv_gym.serving.app import AppSettings, make_app
    from kv_gym.serving.conversations import Conversations
    from kv_gym.serving.engine import Engine
    from kv_gym.serving.metrics import Metrics
except ImportError as error:
    raise UserError(f"the server needs the package {error.name}: pip install 'kv-gym[serve]'") from None

KEY_VARIABLE = "KV_GYM_API_KEY"
"""Environment variable with the API key of `kv-gym serve`."""

_MOST_CONNECTIONS = 512
_GRACE = 10  # seconds that open connections have when the server stops


class Server:
    """A bound server: :meth:`run` serves until a signal, ``with server:`` while the block lasts, in another thread.

    Attributes:
        url: of the API, such as ``http://127.0.0.1:8000/v1``.
    """

    def __init__(self, app, engine: Engine, bound: socket.socket, temporary: tempfile.TemporaryDirectory | None):
        """Serve an app on a bound socket; the temporary folder is removed at the end."""
        self._engine, self._socket, self._temporary = engine, bound, temporary
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", server_header=False,
            limit_concurrency=_MOST_CONNECTIONS, timeout_graceful_shutdown=_GRACE,
        )  # fmt: skip
        self._uvicorn = _StoppableServer(config, engine)
        self._thread: threading.Thread | None = None
        host, port = bound.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    def run(self) -> None:
        """Serve until the process is interrupted or terminated."""
        try:
            self._uvicorn.run([self._socket])
        finally:
            self._engine.close()
            if self._temporary is not None:
                self._temporary.cleanup()

    def __enter__(self) -> Server:
        self._thread = threading.Thread(target=self.run, name="kv-gym-server", daemon=True)
        self._thread.start()
        while not self._uvicorn.started and self._thread.is_alive():
            time.sleep(0.01)
        return self

    def __exit__(self, *exception) -> None:
        assert self._thread is not None
        self._uvicorn.stop()
        self._thread.join()


class _StoppableServer(uvicorn.Server):
    """Ends the generation under way when it shall stop, so that open connections end soon."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self._engine = engine

    def stop(self) -> None:
        """Stop soon; once more: at once."""
        self._engine.stopping = True
        self.force_exit = self.should_exit
        self.should_exit = True

    def handle_exit(self, sig, frame) -> None:
        """A signal came. It is not raised again after the shutdown, as uvicorn's own method would have it."""
        self.stop()


def make_server(
    model,
    tokenizer,
    policy: str | Path | Policy = "keydiff",
    budget: str | int | float = 0.25,
    *,
    allocation: str = "uniform",
    trigger: str = "turn",
    evicted: str = "drop",
    guard: str | Guard | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str = "",
    max_tokens: int = 1024,
    conversations: int = 8,
    parked: int = 64,
    parked_megabytes: int = 4096,
    folder: str | Path | None = None,
    queue: int = 16,
    timeout: float = 300.0,
    request_kilobytes: int = 1024,
    api_key: str | None = None,
    note: Callable[[str], object] = lambda text: print(printable(text), file=sys.stderr, flush=True),
) -> Server:
    """Serve a model with evicting caches to clients of OpenAI's API.

    Every conversation has a cache of its own. A request whose messages go on from a reply of the server reads only
    what is new; the cache is cut when a reply is complete. One reply is generated at a time. Serves
    /v1/chat/completions, /v1/completions, /v1/models, /metrics (Prometheus) and /health.

    Args:
        model: transformers decoder.
        tokenizer: of the model; without a chat template /v1/completions alone is served.
        policy: name, class path such as ``my_policy:Peak``, or folder of a trained policy.
        budget: slots per head or share of the tokens seen so far, such as ``64``, ``0.25`` or ``1/8``.
        allocation: who gets the slots: ``uniform``, ``global``, ``global:NORMALISATION`` ...
        trigger: when to evict: ``turn`` (when a reply is complete), ``prefill``, ``every:K``, ``block:K`` or
            ``lagged:K``.
        evicted: what becomes of evicted pairs: ``drop``, ``merge``, ``merge:values``, ``bits:4``, ``less:FOLDER`` ...
        guard: a signal with its threshold and what follows, such as ``entropy:3.5`` or ``missing:0.05:restore``.
        host: address to listen on. Others than the loopback's let other machines in.
        port: to listen on; 0 takes a free one.
        name: of the model in requests; by default its folder's.
        max_tokens: of a reply, at most.
        conversations: so many stay in memory.
        parked: so many more, the least recently used ones, wait on disk; older ones are read anew when they go on.
        parked_megabytes: of their files, at most.
        folder: where conversations are parked, those in memory too at the end: the next server with the same
            settings goes on with them. By default a private temporary folder, which is removed at the end.
        queue: requests that may wait while another one is served; more are refused with status 429.
        timeout: seconds that a reply may take, the wait before it included.
        request_kilobytes: of a request, at most.
        api_key: that requests must bring; None: none.
        note: is called with what the user should know.

    Returns:
        The server, which listens already. Call ``run()``, or write ``with server:``.

    Raises:
        UserError: a port that cannot be used, numbers out of range, packages that are missing, or what the cache
            refuses.
    """
    numbers = {
        "max_tokens": (max_tokens, 1), "conversations": (conversations, 1), "parked": (parked, 0), "queue": (queue, 0),
        "parked_megabytes": (parked_megabytes, 0), "timeout": (timeout, 1), "request_kilobytes": (request_kilobytes, 1),
    }  # fmt: skip
    for what, (number, least) in numbers.items():
        if not number >= least:
            raise UserError(f"{what} is {number}; expected a number from {least}")
    if tokenizer is None:
        raise UserError("the model has no tokenizer, so it cannot be served: give a folder that holds one")
    guard = Guard.parse(guard) if isinstance(guard, str) else guard
    empty = TextSession(model, tokenizer, policy, budget, allocation, trigger, evicted, guard)
    try:
        template: ChatTemplate | None = ChatTemplate(tokenizer)
    except UserError:
        template = None
        note("the model has no chat template: /v1/completions is served and dialogues are refused")
    place: Path | None = None
    temporary: tempfile.TemporaryDirectory | None = None
    if parked:
        try:
            refuse_unsavable(empty.cache.config)
        except UserError as error:
            note(f"conversations that leave the memory are forgotten: {error}")
        else:
            if folder is None:
                temporary = tempfile.TemporaryDirectory(prefix="kv-gym-", ignore_cleanup_errors=True)
            place = Path(temporary.name) if temporary is not None else make_folder(folder or "", 0o700)
    bound = _listen(host, port)
    loopback = ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback
    if not loopback and api_key is None:
        note(f"anybody who reaches {host} can use this server; set {KEY_VARIABLE} to ask for a key")
    metrics = Metrics()
    most_bytes = parked_megabytes * 2**20
    remembered = Conversations(empty, conversations, parked, most_bytes, place, keep=folder is not None)
    engine = Engine(model, tokenizer, remembered, metrics, max_tokens, queue)
    name = name or Path(model.config.name_or_path).name or "model"
    settings = AppSettings(name, timeout, request_kilobytes * 2**10, api_key, loopback and api_key is None)
    server = Server(make_app(engine, metrics, tokenizer, template, settings), engine, bound, temporary)
    note(f"{name} at {server.url}, policy {empty.cache.config.policy.name}, budget {budget}")
    return server


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}, port {port} ({reason}); choose others by host and port") from None
