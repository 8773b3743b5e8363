"""`kv-gym leaderboard`: every cell of a specification is measured once, batch by batch, by one or more processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.progress import Progress

from kv_gym.errors import UserError
from kv_gym.evaluation.leaderboard.identity import digest, model_folder, model_hash
from kv_gym.evaluation.leaderboard.pages import page_cells
from kv_gym.evaluation.leaderboard.plan import (
    Candidate,
    Cell,
    PolicySource,
    TaskIdentity,
    best_candidates,
    candidates,
    cells_of,
    heuristics,
    learned,
    tier_of,
)
from kv_gym.evaluation.leaderboard.results import ResultFolder, write_batch
from kv_gym.evaluation.leaderboard.spec import Spec, read_spec
from kv_gym.evaluation.outcomes import to_json
from kv_gym.evaluation.rows import complete, result
from kv_gym.evaluation.tasks import Task, parse_tasks
from kv_gym.evaluation.tasks.replay import ReplayTask
from kv_gym.live import CacheConfig
from kv_gym.models import load_model
from kv_gym.policies import Policy
from kv_gym.traces import TraceSet, open_traces

MOST_WORKERS = 1024
REPLAYED_AT_ONCE = 8  # contexts of a batch of replay


def leaderboard(
    spec: str | Path | Mapping | Spec, out: str | Path = "results", workers: int = 1, progress: bool = True
) -> list[dict[str, Any]]:
    """Measure policies x budgets x allocations x tasks x seeds, and page policies x capacities x seeds.

    What a specification asks for and `out` does not hold yet is measured.
    Each context is read once and forked for every configuration. An interruption loses at most the batches under way;
    the same call goes on. A cell that is finished is never measured again, until something changes that its result
    depends on (:mod:`kv_gym.evaluation.leaderboard.identity`).

    Args:
        spec: YAML file with model, tasks, budgets, policies ..., see :mod:`kv_gym.evaluation.leaderboard.spec`. In
            Python, also the same as plain data.
        out: folder for ``rows.jsonl`` and what is needed to go on; run again to resume.
        workers: processes, each with one thread for tensors.
        progress: show bars.

    Returns:
        Rows (:class:`kv_gym.evaluation.rows.Row`), one per configuration and task. Rows of replay have
        ``utility_kept`` and no accuracy, those of page policies ``hit_rate``. A configuration that the model or the
        task refuses has ``refused``, the sentence, and no numbers.

    Raises:
        UserError: a specification that cannot be used, or configurations that failed: all others are kept.
    """
    chosen = read_spec(spec)
    if not 1 <= workers <= MOST_WORKERS:
        raise UserError(f"workers is {workers}; expected a number from 1 to {MOST_WORKERS}")
    with Progress(transient=True, disable=not progress) as bar:
        return _Leaderboard(chosen, Path(out), workers, bar).rows()


@dataclass(frozen=True)
class TaskKey:
    """Names a task, so that another process can make the same one.

    Attributes:
        task: as :func:`kv_gym.evaluation.tasks.parse_tasks` reads it; "" is replay of the specification's traces.
        contexts: how many, the first ones; None leaves it to the task.
    """

    task: str
    contexts: int | None = None


@dataclass(frozen=True)
class Job:
    """All that is missing of one batch of one task.

    Attributes:
        task: which one.
        batch: its number.
        cells: to measure, all of this task.
    """

    task: TaskKey
    batch: int
    cells: tuple[Cell, ...]


@dataclass
class JobResult:
    """What became of a job.

    Attributes:
        file: what was measured, or None where nothing was.
        failures: by cell, the error of those that neither gave outcomes nor were refused.
    """

    file: Path | None
    failures: dict[str, str] = field(default_factory=dict)


class _Leaderboard:
    """One call of :func:`leaderboard`."""

    def __init__(self, spec: Spec, out: Path, workers: int, bar: Progress):
        self.spec, self.bar, self.count = spec, bar, workers
        tier_of.cache_clear()  # a state may have been trained again since the last call
        measured = bool(spec.tasks) or spec.utility is not None  # else there are only pages
        self.plain, self.trained = (heuristics(spec), learned(spec)) if measured else ([], [])
        self.pages = [cell for each in spec.pages for cell in page_cells(each, spec.seeds)]
        self.model_hash = digest([model_hash(model_folder(spec.model)), spec.dtype]) if spec.tasks else ""
        self.results = ResultFolder(out)
        self.runner = Runner(spec, out)
        self.origin = {name: value for name, value in result([]).items() if name != "rows"}
        self.failures: dict[str, str] = {}

    def rows(self) -> list[dict[str, Any]]:
        """Choose settings, measure, and write the rows."""
        with WorkerPool(self.runner, self.count) as pool:
            chosen = self._choose(pool)
            wanted: dict[TaskKey, dict[str, tuple[Cell, bool]]] = {}
            for task in self.spec.tasks:
                key = TaskKey(task.task, task.contexts)
                choices = chosen.get(task.validation or "", {}).values()
                wanted[key] = cells_of(self._identity(key), self.spec, (*self.plain, *self.trained), choices)
            if self.spec.utility is not None:
                key = TaskKey("", self.spec.utility.contexts)
                policies = *self.plain, *self.trained, *map(PolicySource.of, self.spec.utility.oracles)
                wanted[key] = cells_of(self._identity(key), self.spec, policies, nulls=False)
            self.results.current = [cell for cells in wanted.values() for cell in cells]
            self.results.current += dict.fromkeys(cell.id for cell in self.pages)
            self._measure_pages()
            self._measure(pool, {key: [cell for cell, _ in cells.values()] for key, cells in wanted.items()}, "measure")
        for cell, mark in (pair for cells in wanted.values() for pair in cells.values()):
            if cell.id in self.results.rows:
                self.results.rows[cell.id]["chosen_on_validation"] = mark
        self.results.save()
        self.results.remove_finished_batches()
        self._raise_failures([cell for cells in wanted.values() for cell, _ in cells.values()])
        return [self.results.rows[cell] for cell in self.results.current]

    def _identity(self, key: TaskKey) -> TaskIdentity:
        task = self.runner.task(key)
        return TaskIdentity(task.name, task.hash, task.trigger, self.model_hash if key.task else "")

    def _choose(self, pool: WorkerPool) -> dict[str, dict[str, Candidate]]:
        """By validation task and heuristic, the best setting."""
        grid = self.spec.validation
        names = dict.fromkeys(task.validation for task in self.spec.tasks if task.validation)
        keys = {name: TaskKey(name, grid.contexts) for name in names}
        tried = {name: candidates(self._identity(key), grid, self.plain) for name, key in keys.items()}
        cells = {
            keys[name]: list({cell.id: cell for each in found for cell in each.cells}.values())
            for name, found in tried.items()
        }
        self._measure(pool, cells, "choose settings")
        return {name: best_candidates(found, self.results.rows) for name, found in tried.items()}

    def _measure(self, pool: WorkerPool, wanted: Mapping[TaskKey, Sequence[Cell]], label: str) -> None:
        jobs, batches = [], {key: len(self.runner.task(key).batches()) for key in wanted}
        for key, cells in wanted.items():
            missing = [cell for cell in cells if not self._finish(cell, batches[key])]
            for number in range(batches[key]):
                unmeasured = tuple(cell for cell in missing if number not in self.results.batches[cell.id])
                if unmeasured:
                    jobs.append(Job(key, number, unmeasured))
        shown = self.bar.add_task(label, total=len(jobs), visible=bool(jobs))
        for job, done in pool.measure(jobs):
            self.failures |= done.failures
            if done.file is not None:
                self.results.add_batch(done.file)
            known = len(self.results.rows)
            for cell in job.cells:
                self._finish(cell, batches[job.task])
            if len(self.results.rows) > known:
                self.results.save()
            self.bar.advance(shown)

    def _measure_pages(self) -> None:
        missing = [cell for cell in self.pages if cell.id not in self.results.rows]
        for cell in self.bar.track(missing, description="pages") if missing else ():
            self.results.rows[cell.id] = complete(cell.measure() | self.origin)
            self.results.save()

    def _finish(self, cell: Cell, batches: int) -> bool:
        """Make a cell's row of what its batches gave; False where that cannot be yet."""
        if cell.id not in self.results.rows:
            measured = self.results.measured(cell.id, batches)
            if measured is None:
                return False
            self.results.rows[cell.id] = complete(cell.fields() | measured | self.origin)
        return True

    def _raise_failures(self, cells: Sequence[Cell]) -> None:
        if not self.failures:
            return
        names = {cell.id: f"{cell.policy.name} on {cell.task.task}" for cell in cells}
        first = next(iter(self.failures))
        raise UserError(
            f"{len(self.failures)} configurations failed, the first {names.get(first, 'on validation contexts')} with "
            f"{self.failures[first]}; all others are in {self.results.folder}: mend it and run the same command again"
        )


class Runner:
    """One process's model, tasks and policies, each made when first needed; measures one batch at a time.

    Args:
        spec: what is compared.
        out: folder of the results.
    """

    def __init__(self, spec: Spec, out: Path):
        self.spec, self.out = spec, out
        self._tasks: dict[TaskKey, Task] = {}
        self._policies: dict[tuple[PolicySource, bool], Policy] = {}
        self._refusals: dict[tuple, str] = {}

    @cached_property
    def model(self) -> Any:
        """The decoding model."""
        return load_model(model_folder(self.spec.model), dtype=self.spec.dtype)[0]

    def task(self, key: TaskKey) -> Task:
        """The task of this name.

        Raises:
            UserError: an unknown task, several in one entry, or a file or trace set that cannot be read.
        """
        if key not in self._tasks:
            self._tasks[key] = self._parsed(key) if key.task else self._replayed(key.contexts)
        return self._tasks[key]

    def _parsed(self, key: TaskKey) -> Task:
        found = parse_tasks(key.task, _LazyTokenizer(self.spec.model), key.contexts)
        if len(found) != 1:
            raise UserError(f"task {key.task!r} names {len(found)} tasks; expected one in each entry of the list")
        return found[0]

    def _replayed(self, contexts: int | None) -> ReplayTask:
        assert self.spec.utility is not None
        traces, split = self.spec.utility.traces, self.spec.utility.split
        opened = open_traces(traces)
        part = opened if split == "all" else opened.select(split=split)
        part = TraceSet(part.entries[:contexts], opened.manifest)
        if not len(part):
            raise UserError(f"traces {traces} hold no context in split {split!r}; choose another split, or `all`")
        names = sorted({entry.task for entry in part.entries if entry.task})
        return ReplayTask(part, f"replay {', '.join(names)}".strip(), REPLAYED_AT_ONCE)

    def measure(self, job: Job) -> JobResult:
        """Measure a batch, and write what it gave."""
        task = self.task(job.task)
        lines: list[dict] = []
        failures: dict[str, str] = {}
        able: list[tuple[Cell, Policy]] = []
        for cell in job.cells:
            sentence = self._refusal(task, cell)
            if sentence:
                lines.append(_refused(cell, job.batch, sentence))
            else:
                able.append((cell, self._policy(task, cell)))
        with warnings.catch_warnings():  # other lengths than a policy was trained on are what some tasks are about
            warnings.filterwarnings("ignore", message=".* was trained on contexts of")
            self._measure(task, job.batch, able, lines, failures)
        return JobResult(write_batch(self.out, job.batch, lines) if lines else None, failures)

    def _refusal(self, task: Task, cell: Cell) -> str:
        """The sentence with which a configuration is refused before anything is read, or ""."""
        key = (
            cell.policy,
            cell.setting.allocation,
            cell.setting.evicted,
            cell.setting.select,
            cell.setting.episodes,
            isinstance(task, ReplayTask),
        )
        if key not in self._refusals:
            try:
                self._check(task, cell)
                self._refusals[key] = ""
            except UserError as error:
                self._refusals[key] = str(error)
        return self._refusals[key]

    def _policy(self, task: Task, cell: Cell) -> Policy:
        """The policy of a cell, made once; recordings know no tokenizer."""
        key = cell.policy, isinstance(task, ReplayTask)
        if key not in self._policies:
            policy = cell.policy.make()
            if not isinstance(task, ReplayTask):
                policy = policy.with_tokenizer(_LazyTokenizer(self.spec.model))
            self._policies[key] = policy
        return self._policies[key]

    def _check(self, task: Task, cell: Cell) -> None:
        config = cell.configuration(self._policy(task, cell))
        if isinstance(task, ReplayTask):
            task.refuse_unfit(config)
        else:
            parts = config.episodes
            CacheConfig.parse(
                self.model,
                policy=config.policy,
                budget=config.budget,
                allocation=config.allocation,
                sinks=config.sinks,
                recent=config.recent,
                evicted=config.evicted,
                select=config.select,
                **({} if parts is None else {"trigger": f"block:{parts.block}", "probe": (0,)}),  # any token will do
            )

    def _measure(
        self, task: Task, batch: int, able: Sequence[tuple[Cell, Policy]], lines: list[dict], failures: dict[str, str]
    ) -> None:
        """Measure configurations together; where that raises, in halves, until the one that raises stands alone."""
        if not able:
            return
        found: list[dict] = []
        try:
            model = None if isinstance(task, ReplayTask) else self.model
            configurations = [cell.configuration(policy) for cell, policy in able]
            outcomes = task.measure(model, task.batches()[batch], configurations)
            for (cell, policy), (_, given) in zip(able, outcomes, strict=True):
                weights, plain = getattr(policy, "nbytes", int)(), [to_json(outcome) for outcome in given]
                found.append({"cell": cell.id, "batch": batch, "policy_bytes": weights, "outcomes": plain})
        except Exception as error:  # one configuration must not cost the others their results
            if len(able) > 1:
                rest = able[len(found) :]
                middle = (len(rest) + 1) // 2
                self._measure(task, batch, rest[:middle], lines, failures)
                self._measure(task, batch, rest[middle:], lines, failures)
            elif isinstance(error, UserError):
                lines.append(_refused(able[0][0], batch, str(error)))
            else:
                failures[able[0][0].id] = f"{type(error).__name__}: {error}"
        lines += found


def _refused(cell: Cell, batch: int, sentence: str) -> dict[str, Any]:
    return {"cell": cell.id, "batch": batch, "refused": sentence, "outcomes": []}


class _LazyTokenizer:
    """The model's tokenizer, loaded when a task first needs more of it than the reference model's words."""

    def __init__(self, model: str):
        self._model = model

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model_folder(self._model), local_files_only=True, trust_remote_code=False)

    def get_vocab(self) -> dict[str, int]:
        """Tokens by their text; known of the reference model without importing transformers, which takes seconds."""
        if self._model == "reference":
            from kv_gym.reference.tokenizer import word_ids

            return dict(word_ids())
        return self._tokenizer.get_vocab()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tokenizer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class WorkerPool:
    """Measures jobs in `count` processes, started with the first job; a single one measures in this process.

    Args:
        runner: of this process.
        count: how many processes.
    """

    def __init__(self, runner: Runner, count: int):
        self.runner, self.count = runner, count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def measure(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, JobResult]]:
        """Each job with what became of it, in the order in which they end.

        Raises:
            UserError: a worker died.
        """
        if self.count == 1 or len(jobs) == 1:
            yield from ((job, _on_one_thread(self.runner, job)) for job in jobs)
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads, and their locks
            arguments = self.runner.spec, self.runner.out
            self._pool = ProcessPoolExecutor(self.count, context, _start_worker, arguments)
        waiting = {self._pool.submit(_measure_in_worker, job): job for job in jobs}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process died, perhaps for want of memory: whole batches are kept; run the same again, with "
                "fewer workers if it happens twice"
            ) from None


_worker: Runner | None = None  # of a worker process


def _start_worker(spec: Spec, out: Path) -> None:
    global _worker
    end_with_parent()
    import torch

    torch.set_num_threads(1)
    _worker = Runner(spec, out)


def _measure_in_worker(job: Job) -> JobResult:
    assert _worker is not None
    return _worker.measure(job)


def end_with_parent() -> None:
    """End this process as soon as its parent has ended, however that came about.

    A worker of a pool waits for jobs forever when its parent is killed. What is under way is lost, and every file is
    whole or not there.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _on_one_thread(runner: Runner, job: Job) -> JobResult:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker: sums over several threads are rounded otherwise
    try:
        return runner.measure(job)
    finally:
        torch.set_num_threads(before)
