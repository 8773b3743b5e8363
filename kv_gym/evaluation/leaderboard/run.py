"""`kv-gym leaderboard`: every cell of a specification is measured once, batch by batch, by one or more processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from kv_gym.errors import UserError
from kv_gym.evaluation.leaderboard.identity import digest, model_folder, model_hash
from kv_gym.evaluation.leaderboard.pages import PageCell, page_cells
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
from kv_gym.evaluation.leaderboard.results import ResultFolder
from kv_gym.evaluation.leaderboard.spec import Spec, read_spec
from kv_gym.evaluation.outcomes import to_json
from kv_gym.evaluation.rows import complete, result
from kv_gym.evaluation.tasks import Task, parse_tasks
from kv_gym.evaluation.tasks.replay import ReplayTask
from kv_gym.live import CacheConfig
from kv_gym.models import load_model
from kv_gym.notebook import ResultRows
from kv_gym.policies import Policy
from kv_gym.traces import open_traces
from kv_gym.workers import WorkerPool

REPLAYED_AT_ONCE = 8  # contexts of a batch of replay


def leaderboard(
    spec: str | Path | Mapping | Spec,
    out: str | Path = "results",
    workers: int | None = None,
    progress: bool = True,
    *,
    ray: str | None = None,
) -> list[dict[str, Any]]:
    """Measure policies x budgets x allocations x tasks x seeds, and page policies x capacities x seeds.

    What a specification asks for and `out` does not hold yet is measured.
    Each context is read once and forked for every configuration. An interruption loses at most the batches under way;
    the same call goes on. A cell that is finished is never measured again, until something changes that its result
    depends on (:mod:`kv_gym.evaluation.leaderboard.identity`).

    Args:
        spec: YAML file with model, tasks, budgets, policies ..., see :mod:`kv_gym.evaluation.leaderboard.spec`. In
            Python, also the same as plain data.
        out: folder for ``rows.jsonl`` and what is needed to go on, or its address, such as ``s3://bucket/folder``; run
            again to resume.
        workers: processes, each with one thread for tensors; by default this one alone, and on the command line two.
        progress: show bars.
        ray: address of a Ray cluster whose machines measure in place of processes here, such as ``auto`` or
            ``auto:gpus=0.25``; by default as many workers as it has room for. What the specification names has the
            same name on all of them.

    Returns:
        Rows (:class:`kv_gym.evaluation.rows.Row`), one per configuration and task. Rows of replay have
        ``utility_kept`` and no accuracy, those of page policies ``hit_rate``. A configuration that the model or the
        task refuses has ``refused``, the sentence, and no numbers.

    Raises:
        UserError: a specification that cannot be used, or configurations that failed: all others are kept.
    """
    chosen = read_spec(spec)
    runner = Runner(chosen)
    count = 1 if workers is None and ray is None else workers  # with one thread, so that rows are those of workers
    pool: WorkerPool = WorkerPool(_runner, lambda: (chosen,), count, ray, runner.run)
    console = Console(stderr=True, force_jupyter=False)  # a notebook has no place for bars that come and go
    with pool, Progress(console=console, transient=True, disable=not progress) as bar:
        return ResultRows(_Leaderboard(chosen, out, runner, pool, bar).rows())


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


@dataclass(frozen=True)
class PageJob:
    """One cell of page policies.

    Attributes:
        cell: its id.
    """

    cell: str


@dataclass
class JobResult:
    """What became of a job.

    Attributes:
        lines: what was measured, see :func:`~kv_gym.evaluation.leaderboard.results.write_batch`.
        failures: by cell, the error of those that neither gave outcomes nor were refused.
    """

    lines: list[dict]
    failures: dict[str, str] = field(default_factory=dict)


class _Leaderboard:
    """One call of :func:`leaderboard`."""

    def __init__(self, spec: Spec, out: str | Path, runner: Runner, pool: WorkerPool, bar: Progress):
        self.spec, self.runner, self.pool, self.bar = spec, runner, pool, bar
        tier_of.cache_clear()  # a state may have been trained again since the last call
        measured = bool(spec.tasks) or spec.utility is not None  # else there are only pages
        self.plain, self.trained = (heuristics(spec), learned(spec)) if measured else ([], [])
        self.pages = list(runner.pages)  # what cannot be read is refused before a folder is made
        self.model_hash = digest([model_hash(model_folder(spec.model)), spec.dtype]) if spec.tasks else ""
        self.results = ResultFolder(out)
        self.origin = {name: value for name, value in result([]).items() if name != "rows"}
        self.failures: dict[str, str] = {}

    def rows(self) -> list[dict[str, Any]]:
        """Choose settings, measure, and write the rows."""
        chosen = self._choose()
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
        self.results.current += self.pages
        self._measure_pages()
        self._measure({key: [cell for cell, _ in cells.values()] for key, cells in wanted.items()}, "measure")
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

    def _choose(self) -> dict[str, dict[str, Candidate]]:
        """By validation task and heuristic, the best setting."""
        grid = self.spec.validation
        names = dict.fromkeys(task.validation for task in self.spec.tasks if task.validation)
        keys = {name: TaskKey(name, grid.contexts) for name in names}
        tried = {name: candidates(self._identity(key), grid, self.plain) for name, key in keys.items()}
        cells = {
            keys[name]: list({cell.id: cell for each in found for cell in each.cells}.values())
            for name, found in tried.items()
        }
        self._measure(cells, "choose settings")
        return {name: best_candidates(found, self.results.rows) for name, found in tried.items()}

    def _measure(self, wanted: Mapping[TaskKey, Sequence[Cell]], label: str) -> None:
        jobs, batches = [], {key: len(self.runner.task(key).batches()) for key in wanted}
        for key, cells in wanted.items():
            missing = [cell for cell in cells if not self._finish(cell, batches[key])]
            for number in range(batches[key]):
                unmeasured = tuple(cell for cell in missing if number not in self.results.batches[cell.id])
                if unmeasured:
                    jobs.append(Job(key, number, unmeasured))
        shown = self.bar.add_task(label, total=len(jobs), visible=bool(jobs))
        for job, done in self.pool.run(jobs):
            self.failures |= done.failures
            if done.lines:
                self.results.write_batch(job.batch, done.lines)
            known = len(self.results.rows)
            for cell in job.cells:
                self._finish(cell, batches[job.task])
            if len(self.results.rows) > known:
                self.results.save()
            self.bar.advance(shown)

    def _measure_pages(self) -> None:
        jobs = [PageJob(cell) for cell in self.pages if cell not in self.results.rows]
        shown = self.bar.add_task("pages", total=len(jobs), visible=bool(jobs))
        for job, fields in self.pool.run(jobs):
            self.results.rows[job.cell] = complete(fields | self.origin)
            self.results.save()
            self.bar.advance(shown)

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
    """

    def __init__(self, spec: Spec):
        self.spec = spec
        self._tasks: dict[TaskKey, Task] = {}
        self._policies: dict[tuple[PolicySource, bool], Policy] = {}
        self._refusals: dict[tuple, str] = {}

    @cached_property
    def model(self) -> Any:
        """The decoding model."""
        return load_model(model_folder(self.spec.model), dtype=self.spec.dtype)[0]

    @cached_property
    def pages(self) -> dict[str, PageCell]:
        """Cells of page policies, by their ids."""
        cells = (cell for each in self.spec.pages for cell in page_cells(each, self.spec.seeds))
        return {cell.id: cell for cell in cells}

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
        part = part.of(part.entries[:contexts])
        if not len(part):
            raise UserError(f"traces {traces} hold no context in split {split!r}; choose another split, or `all`")
        names = sorted({entry.task for entry in part.entries if entry.task})
        return ReplayTask(part, f"replay {', '.join(names)}".strip(), REPLAYED_AT_ONCE)

    def run(self, job: Job | PageJob) -> JobResult | dict[str, Any]:
        """Measure a batch, or give the fields of a page cell's row."""
        return self.measure(job) if isinstance(job, Job) else self.pages[job.cell].measure()

    def measure(self, job: Job) -> JobResult:
        """Measure a batch."""
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
        return JobResult(lines, failures)

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


def _runner(spec: Spec) -> Callable[[Job | PageJob], JobResult | dict[str, Any]]:
    """What measures in a worker process."""
    return Runner(spec).run
