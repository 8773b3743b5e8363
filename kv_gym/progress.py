"""Progress of long work: a bar on a terminal or in a notebook, plain lines now and then in a log."""

from __future__ import annotations

import sys
import time
from html import escape
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 30.0  # between two plain lines, at least
_DRAW_SECONDS = 0.5  # between two drawings in a notebook, at least


class ProgressBar:
    """How far some work is; use as a context manager.

    Where stderr is no terminal, a line such as ``train joint: 100 of 600, held-out reward 0.812, about 3 min left`` is
    written every half minute, and nothing for work that ends sooner.

    Args:
        label: what is done.
        total: how many steps there are.
        done: how many of them are done already.
        shown: write anything at all.
        transient: take the bar away at the end.
    """

    def __init__(self, label: str, total: int, done: int = 0, shown: bool = True, transient: bool = False):
        console = Console(stderr=True)
        self._label, self._total, self._first, self._done, self._note = label, total, done, done, ""
        self._notebook = _NotebookBar() if shown and console.is_jupyter else None
        self._lines = shown and not console.is_terminal and self._notebook is None
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._transient = transient
        self._bar = Progress(
            *columns, TextColumn("{task.fields[note]}"), console=console, transient=transient,
            disable=not shown or self._lines or self._notebook is not None,
        )  # fmt: skip
        self._task = self._bar.add_task(label, total=total, completed=done, note="")
        self._began = self._written = time.monotonic()

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._notebook is not None:
            self._notebook.end("" if self._transient else self._line())
        if self._written > self._began:  # a log that shows the work shows its end
            self._write()

    def advance(self, steps: int = 1) -> None:
        """Count `steps` more as done."""
        self.update(self._done + steps)

    def update(self, done: int, note: str | None = None) -> None:
        """Show that `done` steps are done, and a note behind them (None: the same as before)."""
        self._done, self._note = done, self._note if note is None else note
        self._bar.update(self._task, completed=done, note=self._note)
        if self._notebook is not None:
            self._notebook.draw(done, self._total, self._line())
        if time.monotonic() - self._written >= LINE_SECONDS:
            self._write()

    def _write(self) -> None:
        if not self._lines:
            return
        self._written = time.monotonic()
        print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        now = time.monotonic()
        done, left = self._done - self._first, self._total - self._done
        remaining = f"about {duration(left * (now - self._began) / done)} left" if done and left > 0 else ""
        parts = [f"{self._label}: {self._done} of {self._total}", self._note, remaining]
        return ", ".join(filter(None, parts))


class _NotebookBar:
    """A bar below a notebook's cell, drawn again in its place."""

    def __init__(self) -> None:
        from IPython.display import HTML, display

        self._html: Any = HTML
        self._place: Any = display(HTML(""), display_id=True)
        self._drawn = 0.0

    def draw(self, done: int, total: int, line: str) -> None:
        if time.monotonic() - self._drawn >= _DRAW_SECONDS:
            self._drawn = time.monotonic()
            self._place.update(self._html(f'<progress value="{done}" max="{total}"></progress> {escape(line)}'))

    def end(self, line: str) -> None:
        self._place.update(self._html(escape(line)))


def duration(seconds: float) -> str:
    """Seconds as people say them, such as ``40 s``, ``12 min`` or ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
