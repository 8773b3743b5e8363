"""`kv-gym leaderboard`: policies x budgets x allocations x tasks x seeds, measured once each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.progress import Progress

from kv_gym.errors import UserError
from kv_gym.evaluation.leaderboard.bench import Bench, Job
from kv_gym.evaluation.leaderboard.cells import Cell, Contender, settings, unfit
from kv_gym.evaluation.leaderboard.choosing import candidates, choose
from kv_gym.evaluation.leaderboard.identity import digest, model_folder, model_hash
from kv_gym.evaluation.leaderboard.plan import Choice, Place, cells_of, heuristics, learned
from kv_gym.evaluation.leaderboard.rows import Results, finished
from kv_gym.evaluation.leaderboard.spec import Spec, read_spec
from kv_gym.evaluation.leaderboard.subjects import Subject
from kv_gym.evaluation.leaderboard.workers import Workers
from kv_gym.evaluation.rows import result


def leaderboard(
    spec: str | Path | Mapping | Spec, out: str | Path = "results", workers: int = 1, progress: bool = True
) -> list[dict]:
    """Measure all that a specification asks for and that `out` does not hold yet.

    Each context is read once and forked for every configuration. An interruption loses at most the batches under way;
    the same call goes on. A cell that is finished is never measured again, until something changes that its result
    depends on (:mod:`kv_gym.evaluation.leaderboard.identity`).

    Args:
        spec: a YAML file, or the same as plain data, see :mod:`kv_gym.evaluation.leaderboard.spec`.
        out: folder for ``rows.jsonl`` and what is needed to go on.
        workers: processes, each with one thread for tensors.
        progress: show bars.

    Returns:
        Rows (:class:`kv_gym.evaluation.rows.Row`), one per configuration and task. Rows of replay have ``utility_kept``
        and no accuracy. A configuration that the model or the task refuses has ``refused``, the sentence, and no
        numbers.

    Raises:
        UserError: a specification that cannot be used, or configurations that failed: all others are kept.
    """
    chosen = read_spec(spec)
    if workers < 1:
        raise UserError(f"workers is {workers}; expected a number from 1")
    with Progress(transient=True, disable=not progress) as bar:
        return Run(chosen, Path(out), workers, bar).rows()


class Run:
    """One call of :func:`leaderboard`.

    Args:
        spec: what is compared.
        out: folder of the results.
        workers: how many processes.
        bar: shows how far it is.
    """

    def __init__(self, spec: Spec, out: Path, workers: int, bar: Progress):
        self.spec, self.bar, self.count = spec, bar, workers
        self.plain, self.trained = heuristics(spec), learned(spec)
        self.model_hash = digest([model_hash(model_folder(spec.model)), spec.dtype]) if spec.tasks else ""
        self.bench = Bench(spec, out)
        self.results = Results(out)
        self.made = {name: value for name, value in result([]).items() if name != "rows"}
        self.failed: dict[str, str] = {}

    def rows(self) -> list[dict]:
        """Choose settings, measure, and write the rows."""
        with Workers(self.bench, self.count) as workers:
            wanted: dict[Subject, dict[str, tuple[Cell, bool]]] = {}
            chosen = self._choose(workers)
            for task in self.spec.tasks:
                subject = Subject(task.task, task.contexts)
                choices = chosen.get(task.validation or "", {})
                wanted[subject] = cells_of(self._place(subject), self.spec, self.plain, self.trained, choices)
            if self.spec.utility is not None:
                subject = Subject("", self.spec.utility.contexts)
                wanted[subject] = self._replayed(subject)
            current = [cell for cells in wanted.values() for cell in cells]
            self.results.current = current
            cells = {subject: [cell for cell, _ in marked.values()] for subject, marked in wanted.items()}
            self._measure(workers, cells, "measure")
        for marked in wanted.values():
            for cell, mark in marked.values():
                if cell.id in self.results.rows:
                    self.results.rows[cell.id]["chosen_on_validation"] = mark
        self.results.save()
        self.results.sweep()
        self._tell_failures(wanted)
        return [self.results.rows[cell] for cell in current]

    def _place(self, subject: Subject) -> Place:
        task = self.bench.task(subject)
        return Place(task.name, task.hash, task.trigger, self.model_hash if subject.task else "")

    def _choose(self, workers: Workers) -> dict[str, dict[str, Choice]]:
        """By validation task and heuristic, the best setting."""
        grid = self.spec.validation
        names = dict.fromkeys(task.validation for task in self.spec.tasks if task.validation)
        subjects = {name: Subject(name, grid.contexts) for name in names}
        found = {name: candidates(self._place(subject), grid, self.plain) for name, subject in subjects.items()}
        cells = {
            subjects[name]: list({cell.id: cell for each in tried for cell in each.cells}.values())
            for name, tried in found.items()
        }
        self._measure(workers, cells, "choose settings")
        return {name: choose(tried, self.results.rows) for name, tried in found.items()}

    def _replayed(self, subject: Subject) -> dict[str, tuple[Cell, bool]]:
        """Cells of replay: every policy and the oracles, by the specification's allocations."""
        assert self.spec.utility is not None
        oracles = [Contender.of(name) for name in self.spec.utility.oracles]
        place = self._place(subject)
        cells = [
            place.cell(contender, setting)
            for contender in (*self.plain, *self.trained, *oracles)
            for setting in settings(
                contender,
                self.spec.budgets,
                [rule for rule in self.spec.allocations if not unfit(contender, rule)],
            )
        ]
        return {cell.id: (cell, False) for cell in cells}

    def _measure(self, workers: Workers, wanted: Mapping[Subject, Sequence[Cell]], label: str) -> None:
        jobs, sizes = [], {}
        for subject, cells in wanted.items():
            sizes[subject] = len(self.bench.task(subject).batches())
            for cell in cells:
                self._settle(cell, sizes[subject])
            for number in range(sizes[subject]):
                missing = tuple(cell for cell in cells if self._missing(cell, number))
                if missing:
                    jobs.append(Job(subject, number, missing))
        shown = self.bar.add_task(label, total=len(jobs), visible=bool(jobs))
        for job, done in workers.measure(jobs):
            self.failed |= done.failed
            if done.file is not None:
                self.results.take(done.file)
            made = [self._settle(cell, sizes[job.subject]) for cell in job.cells]
            if any(made):
                self.results.save()
            self.bar.advance(shown)

    def _missing(self, cell: Cell, number: int) -> bool:
        return cell.id not in self.results.rows and number not in self.results.batches[cell.id]

    def _settle(self, cell: Cell, batches: int) -> bool:
        """Make a row of what all batches of a cell gave, or one of them refused; False where that cannot be yet."""
        given = self.results.batches[cell.id]
        if cell.id in self.results.rows or not (
            len(given) == batches or any(line.get("refused") for line in given.values())
        ):
            return False
        lines = [given[number] for number in sorted(given)]
        self.results.rows[cell.id] = cell.row() | finished(lines) | {"chosen_on_validation": False} | self.made
        return True

    def _tell_failures(self, wanted: Mapping[Subject, Mapping[str, tuple[Cell, bool]]]) -> None:
        if not self.failed:
            return
        names = {
            cell.id: f"{cell.contender.name} on {cell.task}" for each in wanted.values() for cell, _ in each.values()
        }
        first = next(iter(self.failed))
        raise UserError(
            f"{len(self.failed)} configurations failed, the first {names.get(first, 'on validation contexts')} with "
            f"{self.failed[first]}; all others are in {self.results.folder}: mend it and run the same command again"
        )
