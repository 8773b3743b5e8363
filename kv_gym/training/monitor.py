"""Watching a training run: TensorBoard and a progress bar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor


class Monitor:
    """Writes under ``<out>/tensorboard`` and shows a bar; use as a context manager.

    Yardsticks (oracle, heuristics) are runs of their own in folders below, so that they lie as flat lines in the
    same charts as the policy's utility.
    """

    def __init__(self, out: Path, label: str, steps: int, done: int = 0, progress: bool = True):
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._steps = out / "tensorboard", steps
        self._writer = SummaryWriter(str(self._folder), purge_step=done)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), disable=not progress)
        self._task = self._bar.add_task(label, total=steps, completed=done, note="")

    def __enter__(self) -> Monitor:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._writer.close()

    def describe(self, identity: Mapping[str, Any], lines: Mapping[str, Mapping[str, float]]) -> None:
        """Write what is trained, as text, and the flat lines: yardstick -> budget -> utility kept."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer.add_text("settings", f"```json\n{json.dumps(identity, indent=1)}\n```")
        for name, kept in lines.items():
            with SummaryWriter(str(self._folder / name)) as line:
                for step in (0, self._steps):
                    line.add_scalar("validation/utility_kept", sum(kept.values()) / len(kept), step)
                    for budget, share in kept.items():
                        line.add_scalar(_at("utility_kept", budget), share, step)

    def log(self, step: int, group: str, told: Mapping[str, Tensor | float]) -> None:
        """Write scalars as ``group/name``."""
        for name, value in told.items():
            self._writer.add_scalar(f"{group}/{name}", float(value), step)

    def validated(self, step: int, reward: float, kept: Mapping[str, float], oracle: Mapping[str, float]) -> None:
        """Write the held-out reward, the utility kept per budget and what the oracle keeps beyond it."""
        self._writer.add_scalar("validation/utility_kept", reward, step)
        for budget, share in kept.items():
            self._writer.add_scalar(_at("utility_kept", budget), share, step)
            self._writer.add_scalar(_at("regret_to_oracle", budget), oracle[budget] - share, step)
        self._bar.update(self._task, note=f"held-out reward {reward:.3f}")

    def picture(self, step: int, image: np.ndarray) -> None:
        """Write the retention picture `[1, height, width]` uint8."""
        self._writer.add_image("retention at 1/8 (heads x positions)", image, step)

    def result(self, identity: Mapping[str, Any], reward: float) -> None:
        """Write the settings and the best held-out reward where TensorBoard compares runs by them."""
        from torch.utils.tensorboard.summary import hparams

        flat = {k: v for k, v in identity.items() if isinstance(v, int | float | str)}
        flat |= {k: v if isinstance(v, int | float | str) else str(v) for k, v in identity["settings"].items()}
        # add_hparams would open a second log file beside this one
        for summary in hparams(flat, {"held_out_reward": reward}):
            self._writer._get_file_writer().add_summary(summary)
        self._writer.add_scalar("held_out_reward", reward, self._steps)

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        self._bar.update(self._task, completed=step)


def _at(what: str, budget: str) -> str:
    return f"{what}/at_{budget.replace('/', '_')}"
