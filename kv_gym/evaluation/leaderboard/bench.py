"""Where configurations are measured: a model and its tasks in one process, asked for one batch at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kv_gym.errors import UserError
from kv_gym.evaluation.leaderboard.cells import Cell, Contender
from kv_gym.evaluation.leaderboard.identity import model_folder
from kv_gym.evaluation.leaderboard.replaying import Replayed
from kv_gym.evaluation.leaderboard.rows import batch_line, write_batch
from kv_gym.evaluation.leaderboard.spec import Spec
from kv_gym.evaluation.leaderboard.subjects import Subject, task_of
from kv_gym.evaluation.tasks import Task
from kv_gym.live import CacheConfig
from kv_gym.policies import Policy


@dataclass(frozen=True)
class Job:
    """All that is missing of one batch of one task.

    Attributes:
        subject: which task.
        number: of the batch.
        cells: whose configurations to measure, all of this task.
    """

    subject: Subject
    number: int
    cells: tuple[Cell, ...]


@dataclass
class Done:
    """What became of a job.

    Attributes:
        file: what was measured, or None where nothing was.
        failed: by cell, what went wrong in configurations that neither answered nor refused.
    """

    file: Path | None
    failed: dict[str, str] = field(default_factory=dict)


class Bench:
    """One process's model, tasks and policies, each made when first needed.

    Args:
        spec: what is compared.
        out: folder of the results.
    """

    def __init__(self, spec: Spec, out: Path):
        self.spec, self.out = spec, out
        self._tasks: dict[Subject, Task | Replayed] = {}
        self._policies: dict[Contender, Policy] = {}
        self._refusals: dict[tuple, str] = {}

    @cached_property
    def model(self) -> Any:
        """The decoding model."""
        from kv_gym.traces import load_model

        return load_model(model_folder(self.spec.model), dtype=self.spec.dtype)[0]

    def task(self, subject: Subject) -> Task | Replayed:
        """The task that a subject names."""
        if subject not in self._tasks:
            self._tasks[subject] = task_of(subject, self.spec)
        return self._tasks[subject]

    def measure(self, job: Job) -> Done:
        """Measure a batch, and write what it gave."""
        task = self.task(job.subject)
        batch = task.batches()[job.number]
        lines: list[dict] = []
        failed: dict[str, str] = {}
        able: list[tuple[Cell, Policy]] = []
        for cell in job.cells:
            sentence = self._refusal(task, cell)
            if sentence:
                lines.append(_refused(cell, job.number, sentence))
            else:
                able.append((cell, self._policies[cell.contender]))
        with warnings.catch_warnings():  # other lengths than a policy was trained on are what some tasks are about
            warnings.filterwarnings("ignore", message=".* was trained on contexts of")
            self._measure(task, batch, able, job.number, lines, failed)
        return Done(write_batch(self.out, job.number, lines) if lines else None, failed)

    def _refusal(self, task: Task | Replayed, cell: Cell) -> str:
        """The sentence with which a configuration is refused before anything is read, or ""."""
        held = cell.setting
        place = (cell.contender, held.allocation, held.evicted, isinstance(task, Replayed))
        if place not in self._refusals:
            self._refusals[place] = _sentence(lambda: self._check(task, cell))
        return self._refusals[place]

    def _check(self, task: Task | Replayed, cell: Cell) -> None:
        if cell.contender not in self._policies:
            self._policies[cell.contender] = cell.contender.make()
        configuration = cell.configuration(self._policies[cell.contender])
        if isinstance(task, Replayed):
            task.refuse_unfit(configuration)
        else:
            CacheConfig.parse(
                self.model,
                configuration.policy,
                configuration.budget,
                configuration.allocation,
                "prefill",
                configuration.sinks,
                configuration.recent,
                configuration.evicted,
            )

    def _measure(
        self, task: Task | Replayed, batch: Sequence, able: Sequence[tuple[Cell, Policy]], number: int,
        lines: list[dict], failed: dict[str, str],
    ) -> None:  # fmt: skip
        """Measure configurations together; where that raises, in halves, until the one that raises stands alone."""
        if not able:
            return
        found = []
        try:
            configurations = [cell.configuration(policy) for cell, policy in able]
            model = None if isinstance(task, Replayed) else self.model
            for (cell, policy), (_, outcomes) in zip(able, task.measure(model, batch, configurations), strict=True):
                weights = getattr(policy, "nbytes", int)()
                found.append(batch_line(cell.id, number, outcomes, weights))
        except Exception as error:  # one configuration must not cost the others their results
            rest = able[len(found) :]
            if len(able) == 1:
                cell = able[0][0]
                if isinstance(error, UserError):
                    lines.append(_refused(cell, number, str(error)))
                else:
                    failed[cell.id] = f"{type(error).__name__}: {error}"
                return
            middle = (len(rest) + 1) // 2
            lines += found
            self._measure(task, batch, rest[:middle], number, lines, failed)
            self._measure(task, batch, rest[middle:], number, lines, failed)
            return
        lines += found


def _refused(cell: Cell, number: int, sentence: str) -> dict:
    return {"cell": cell.id, "batch": number, "refused": sentence, "outcomes": []}


def _sentence(check: Callable[[], None]) -> str:
    try:
        check()
    except UserError as error:
        return str(error)
    return ""
