"""Watching a training run: TensorBoard scalars and a progress bar."""

from __future__ import annotations

from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Monitor:
    """Writes scalars under ``<out>/tensorboard`` and shows a bar; use as a context manager."""

    def __init__(self, out: Path, label: str, steps: int, done: int = 0, progress: bool = True):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=done)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), disable=not progress)
        self._task = self._bar.add_task(label, total=steps, completed=done, note="")

    def __enter__(self) -> Monitor:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._writer.close()

    def log(self, step: int, **scalars: float) -> None:
        """Write scalars; a double underscore in a name stands for a slash."""
        for name, value in scalars.items():
            self._writer.add_scalar(name.replace("__", "/"), value, step)

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        self._bar.update(self._task, completed=step)

    def note(self, text: str) -> None:
        """Show a few words beside the bar."""
        self._bar.update(self._task, note=text)
