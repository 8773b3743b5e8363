"""Progress of long work on stderr: a bar on a terminal, plain lines now and then in a log."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 30.0  # between two plain lines, at least


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
        self._lines = shown and not console.is_terminal
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = Progress(
            *columns, TextColumn("{task.fields[note]}"), console=console, transient=transient,
            disable=not shown or self._lines,
        )  # fmt: skip
        self._task = self._bar.add_task(label, total=total, completed=done, note="")
        self._began = self._written = time.monotonic()

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._written > self._began:  # a log that shows the work shows its end
            self._write()

    def advance(self, steps: int = 1) -> None:
        """Count `steps` more as done."""
        self.update(self._done + steps)

    def update(self, done: int, note: str | None = None) -> None:
        """Show that `done` steps are done, and a note behind them (None: the same as before)."""
        self._done, self._note = done, self._note if note is None else note
        self._bar.update(self._task, completed=done, note=self._note)
        if time.monotonic() - self._written >= LINE_SECONDS:
            self._write()

    def _write(self) -> None:
        if not self._lines:
            return
        self._written = now = time.monotonic()
        done, left = self._done - self._first, self._total - self._done
        remaining = f"about {duration(left * (now - self._began) / done)} left" if done and left > 0 else ""
        parts = [f"{self._label}: {self._done} of {self._total}", self._note, remaining]
        print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as people say them, such as ``40 s``, ``12 min`` or ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
