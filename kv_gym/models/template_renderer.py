"""Chat templates rendered in a process of their own, with limits on time and memory.

A chat template is a program that comes with a model. Jinja's sandbox keeps it from files and from Python's internals,
but not from looping for ever or from making a text that fills the memory.

The process renders with the settings of ``transformers.utils.chat_template_utils``, and reads no more of this package
than this file.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

SECONDS = 10.0  # for one dialogue; a template takes milliseconds
BYTES = 1 << 30  # of address space of the process, which needs 30 MiB itself


class TemplateRefusal(Exception):
    """The template did not render the messages; the text says why."""


class TemplateRenderer:
    """One chat template in a process that ends with this one.

    The process starts with the first dialogue, and again after a dialogue that it did not survive. Threads take turns.

    Args:
        template: in Jinja's language.
    """

    def __init__(self, template: str):
        self._template = template
        self._process: subprocess.Popen | None = None
        self._turn = threading.Lock()
        atexit.register(self.close)

    def render(self, messages: Sequence[Mapping[str, str]], reply: bool, special_tokens: Mapping[str, Any]) -> str:
        """A dialogue as text.

        Args:
            messages: the turns.
            reply: end with what stands before a reply of the assistant.
            special_tokens: of the tokenizer, by name, such as ``bos_token``.

        Raises:
            TemplateRefusal: an error of the template or of Jinja, more than 10 seconds, or more than 1 GiB of memory
                (which is limited where the operating system allows it).
        """
        request = {"messages": list(messages), "add_generation_prompt": reply, "special_tokens": dict(special_tokens)}
        with self._turn:
            answer = self._ask(_line(request))
        if "refused" in answer:
            raise TemplateRefusal(answer["refused"])
        return answer["text"]

    def _ask(self, line: bytes) -> dict[str, str]:
        process = self._process
        if process is None:
            process, line = self._start(), _line(self._template) + line
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(SECONDS, end)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(line)  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            answer = process.stdout.readline()  # type: ignore[union-attr]
        except BrokenPipeError:  # the process has ended
            answer = b""
        except BaseException:  # an interrupted wait: the next answer would be that of this request
            self.close()
            raise
        finally:
            timer.cancel()
        if answer.endswith(b"\n"):
            return json.loads(answer)
        self.close()
        return {"refused": f"it took more than {SECONDS:g} seconds" if late.is_set() else "its process ended"}

    def _start(self) -> subprocess.Popen:
        folders = {str(Path(importlib.util.find_spec(name).origin).parent.parent) for name in ("jinja2", "markupsafe")}  # type: ignore[union-attr, arg-type]
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__, *folders], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, start_new_session=True,  # Ctrl-C is for this process, which ends the other one
        )  # fmt: skip
        return self._process

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def _line(value: Any) -> bytes:
    return json.dumps(value, default=str).encode() + b"\n"


@functools.lru_cache(maxsize=8)
def _renderer(template: str, process_id: int) -> TemplateRenderer:
    return TemplateRenderer(template)


def renderer(template: str) -> TemplateRenderer:
    """The renderer of a template, shared by all who render it in this process."""
    return _renderer(template, os.getpid())  # a fork must not share its parent's pipes


def _serve(folders: list[str]) -> None:
    """Render what comes as lines of JSON, until there is no more."""
    sys.path += folders
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """``{% generation %}`` marks what the assistant says, for training; its text is rendered as it is."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    try:
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    except (ImportError, ValueError, OSError):
        pass
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    template, source = None, json.loads(sys.stdin.buffer.readline())
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            if template is None:
                template = environment.from_string(source)
            text = template.render(
                messages=request["messages"], tools=None, documents=None,
                add_generation_prompt=request["add_generation_prompt"], **request["special_tokens"],
            )  # fmt: skip
            answer = json.dumps({"text": text})
        except MemoryError:
            answer = json.dumps({"refused": f"it needs more than {BYTES >> 30} GiB of memory"})
        except Exception as error:  # a template raises whatever Jinja does, or errors of its own
            answer = json.dumps({"refused": f"{error or type(error).__name__}"[:1000]})
        sys.stdout.buffer.write(answer.encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve(sys.argv[1:])
