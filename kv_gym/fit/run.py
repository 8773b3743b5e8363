"""The fit itself: record, train, choose the budget on validation contexts, report it on test contexts."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from kv_gym.budgets import parse_allocation, parse_budget
from kv_gym.errors import UserError
from kv_gym.evaluation.configurations import Configuration
from kv_gym.evaluation.rows import FULL, result
from kv_gym.evaluation.statistics import smallest_sufficient_budget
from kv_gym.evaluation.tasks import TaskContext
from kv_gym.files import atomic_write
from kv_gym.fit.card import LEARNED, card, share_of, verdict
from kv_gym.fit.data import FEWEST, FitData, contexts_for, read_data
from kv_gym.fit.folder import FitFolder
from kv_gym.fit.loss import least_provable, measure_losses
from kv_gym.fit.plan import Limits, Plan, Timings, fewest_to_test, phase_of, plan_whole, plan_within
from kv_gym.live.rope_shift import refuse_other_rotation
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.models.rotary import rotary_frequencies
from kv_gym.models.wrapped_model import transformers_model
from kv_gym.notebook import Result
from kv_gym.policies import Policy, make_policy
from kv_gym.policies.scorer import Scorer
from kv_gym.policies.scoring.inputs import DEFAULT, HIDDEN, WHEREVER
from kv_gym.records import Source
from kv_gym.traces import open_traces, record
from kv_gym.training import train
from kv_gym.training.masked_context import frozen_model
from kv_gym.training.pace import Pace
from kv_gym.training.registry import agent_settings, learner_class
from kv_gym.training.trainer import Trainer

BUDGETS = tuple(1 / n for n in (2, 3, 4, 6, 8, 11, 16, 22, 32, 45, 64, 90))  # about the powers of 2^(1/2)
HEURISTICS = {  # each with the allocations that it is tried with; the best on validation contexts goes on
    "keydiff": ("uniform", "global:softmax"),
    "snapkv": ("uniform", "global"),
    "h2o": ("uniform", "global"),
    "recency": ("uniform",),
    "random": ("uniform",),
}
PLANNED_AGENTS = ("joint", "end_to_end")  # within a time; the second starts from the first
PHASE_FOLDERS = {"warm_start": "warm-start", "train": "training"}
TIMED_CONTEXTS = 4
TIMING_SHARE = 0.1  # of a limited time, after which no further agent is timed


def fit(
    model: Any,
    data: Source,
    out: str | Path,
    *,
    tokenizer: Any = None,
    tolerance: float = 0.01,
    agent: str | None = None,
    minutes: float | None = None,
    allocation: str | None = None,
    budgets: Iterable[str | float] = BUDGETS,
    count: int = 160,
    tokens: int | None = None,
    continuation_tokens: int | None = None,
    seed: int = 0,
    chat: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Train a policy and find the smallest budget that suffices.

    The cache is fitted to a model and a file of prompts: it is the smallest with which the model still does what the
    data ask of it, within the tolerance.
    Records what the training contexts' continuations attend to, trains a policy, walks down the budgets as long as the
    loss against the full cache on validation contexts is within the tolerance, and measures what was chosen on test
    contexts, which choose nothing. Contexts are cut before their question is seen. Interrupted anywhere, the same call
    goes on; finished phases are not repeated. First it times a few contexts and steps, and says what it will do and how
    long that takes.

    Args:
        model: transformers decoder.
        data: JSON lines with context, question and answer, or context and continuations, or a file of a Hugging Face
            dataset with such rows; a text file; or ``reference``, the bundled task. See
            :func:`kv_gym.fit.data.read_data`.
        out: folder, new or of the same fit: ``policy/`` (exported), ``fit.json`` (all figures), ``README.md`` (the
            card), ``traces/`` and ``training/`` (the log).
        tokenizer: of the model; needed for text.
        tolerance: what may be lost, by the upper end of its 95 % interval: share of the questions for data with
            answers (0.01 is one point of accuracy), nats per token for continuations and text.
        agent: what is trained, see :func:`kv_gym.training.train`; by default ``end_to_end``, and within `minutes`
            ``joint``, then ``end_to_end`` from there if the time is long enough for both.
        minutes: time that all of it may take: agents, contexts, lengths, budgets and steps are chosen so that it fits,
            and training, choosing and testing end in time even if the machine turns out slower (with fewer steps and
            contexts, but as many as a choice needs). By default it takes as long as it takes.
        allocation: who gets the slots; by default ``global`` where the agent's scores allow it, else ``uniform``.
        budgets: shares of the tokens to try, from the largest down; by default 1/2 to 1/90.
        count: contexts to train on, at most.
        tokens: length of the windows that a text is cut into, by default 512.
        continuation_tokens: length of what follows each window, by default 64.
        seed: of the policy, and of the reference task's training contexts.
        chat: render questions, answers and messages by the model's chat template.
        workers: processes that share the contexts while they are recorded and measured, each with one thread for
            tensors; training is one process. By default this process with all its threads.
        ray: address of a Ray cluster whose machines do so in place of processes here, such as ``auto``; `out` and the
            model's folder have the same name on all of them.
        progress: show phases and bars on stderr.
        **settings: replace those of the agent.

    Returns:
        What ``fit.json`` holds: ``budget`` (1.0 where nothing smaller stays within the tolerance), ``allocation``,
        ``verdict`` (sentences), ``enough`` (heuristics that do as well), ``rows``, ``plan`` (what was decided after the
        timing), ``seconds`` and how it was made.

    Raises:
        UserError: unusable data, model or settings; too few contexts to tell the tolerance; a full cache that answers
            so little that there is nothing to lose; or a folder with other settings.
    """
    if not tolerance > 0:
        raise UserError(f"tolerance is {tolerance}; expected a number above 0, such as 0.01")
    if minutes is not None and not minutes > 0:
        raise UserError(f"minutes is {minutes:g}; expected a number above 0")
    if minutes is not None and agent is None and settings:
        raise UserError(
            f"the settings {', '.join(settings)} belong to an agent, and the time chooses it: name the agent, or leave "
            "them out"
        )
    agents = [agent] if agent is not None else ["end_to_end"] if minutes is None else [*PLANNED_AGENTS]
    fixed_budgets = budgets is not BUDGETS
    shares = _shares(budgets)
    rule = _rule(agents[-1], allocation, settings)
    if learner_class(agents[-1]).needs_model:
        try:
            with frozen_model(model):  # refuses models that this agent cannot train through, before anything is done
                pass
        except UserError:
            if len(agents) == 1:
                raise
            agents = agents[:1]
    parts = read_data(
        data, tokenizer, count=count, tokens=tokens, continuation_tokens=continuation_tokens, seed=seed, chat=chat
    )
    _refuse_too_few(parts, tolerance, count)
    shares = _of_whole_tokens(shares, parts)
    fingerprint = Fingerprint.of(model)
    settings = _with_inputs(settings, agents, model, fingerprint)
    folder = FitFolder(
        out,
        {
            "tolerance": tolerance, "agent": ", ".join(agents), "allocation": rule, "budgets": shares, "seed": seed,
            "agent settings": settings, "count": count, "minutes": minutes,
            **parts.source, "measure": parts.measure, "data": parts.hash,
            "model": fingerprint.weights,
        },
    )  # fmt: skip
    if not folder.state["finished"]:
        pipeline = _Pipeline(model, tokenizer, parts, folder, rule, fingerprint, seed, settings, progress, workers, ray)
        pipeline.run(minutes, agents, shares, fixed_budgets)
    return Result(folder.state)


def _with_inputs(
    settings: dict[str, Any], agents: Sequence[str], model: Any, fingerprint: Fingerprint
) -> dict[str, Any]:  # fmt: skip
    """The settings with keys before the rotary embedding as an input, where the agents' own are the usual ones.

    A token then looks the same wherever it stands, which a few recorded contexts cannot teach.
    """
    usual = all(learner_class(each).any_inputs and agent_settings(each).inputs == DEFAULT for each in agents)
    if "inputs" in settings or not usual:
        return settings
    try:
        frequencies = rotary_frequencies(fingerprint.rope, fingerprint.head_dim)
        refuse_other_rotation(transformers_model(model), frequencies, agents[-1])
    except UserError:
        return settings
    return settings | {"inputs": list(WHEREVER)}


class _Pipeline:
    """The phases, each of which leaves its result in the folder."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        data: FitData,
        folder: FitFolder,
        allocation: str,
        fingerprint: Fingerprint,
        seed: int,
        settings: Mapping[str, Any],
        progress: bool,
        workers: int | None = None,
        ray: str | None = None,
    ):
        self.model, self.tokenizer, self.data, self.folder = model, tokenizer, data, folder
        self.allocation, self.fingerprint, self.progress = allocation, fingerprint, progress
        self.seed, self.settings = seed, settings
        self.workers: dict[str, Any] = {"workers": workers, "ray": ray}
        self.console = Console(stderr=True, quiet=not progress, highlight=False, soft_wrap=True)

    def run(self, minutes: float | None, agents: Sequence[str], budgets: list[float], fixed_budgets: bool) -> None:
        """Do what is not done yet."""
        if "plan" not in self.folder.state:
            with self._shown("measure", "Time a few contexts and steps"):
                timings = self._timings(agents, minutes)
            limits, spent = self._limits(agents, budgets, fixed_budgets), self.folder.state["seconds"]["measure"]
            plan = (
                plan_whole(agents[-1], limits, timings, spent)
                if minutes is None
                else plan_within(minutes, list(timings.paces), limits, timings, spent)
            )
            self.folder.save(plan=plan.to_json())
        self.plan = Plan.from_json(self.folder.state["plan"])
        for line in self.plan.describe():
            self.console.print(f"   {line}")
        self._take_planned_contexts()
        self._phase("full_cache", "Ask the model with its full cache", self._full_cache)
        with self._shown("record", f"Record {len(self.data.train)} contexts"):
            self._record(
                self.data, self.folder.path / "traces", self.plan.stages[-1].agent, self.progress, **self.workers
            )
        policy = self._train()
        self._phase(
            "chosen", f"Choose the budget on {len(self.data.validation)} contexts", lambda: self._choose(policy)
        )
        self._phase("tested", f"Test it on {len(self.data.test)} other contexts", lambda: self._test(policy))
        self._finish(policy)

    def _record(self, data: FitData, out: Path, agent: str, progress: bool, **workers: Any) -> None:
        recipe = {"source": "fit", "data": self.folder.state["settings"]["data"]} | data.source
        settings = agent_settings(agent, **self.settings)
        more = [self._policy(name) for name in learner_class(agent).statistics(settings)]
        record(
            self.model, data.prompts(), out, tokenizer=self.tokenizer, recipe=recipe, progress=progress,
            hidden=HIDDEN in settings.inputs, stats=["h2o", *more] if more else None,
            **workers,
        )  # fmt: skip

    def _policy(self, name: str) -> Policy:
        """A policy that knows the model's tokenizer, where there is one."""
        policy = make_policy(name)
        return policy if self.tokenizer is None else policy.with_tokenizer(self.tokenizer)

    def _timings(self, agents: Sequence[str], minutes: float | None) -> Timings:
        """Time measuring, recording and training steps on a few contexts, in a folder that goes again.

        Agents behind the first are left out where that took much of the time already.
        """
        whole, few = time.perf_counter(), self.data.validation[:2]
        seconds = []
        policy, equal = self._policy("keydiff"), parse_allocation("uniform")
        for configurations in ([], [Configuration("keydiff", policy, 1 / n, equal) for n in (2, 4, 8)]):
            began = time.perf_counter()
            measure_losses(self.model, few, "timing", self.data.measure, configurations, False)
            seconds.append((time.perf_counter() - began) / len(few))
        read, ask = seconds[0], max(0.0, seconds[1] - seconds[0]) / 3
        data = replace(self.data, train=self.data.train[:TIMED_CONTEXTS])
        with TemporaryDirectory() as folder:
            began = time.perf_counter()
            self._record(data, Path(folder), agents[-1], progress=False)
            recorded = (time.perf_counter() - began) / sum(map(_recorded_tokens, data.train))
            traces, paces = open_traces(folder), dict[str, Pace]()
            for agent in agents:
                if paces and minutes is not None and time.perf_counter() - whole > TIMING_SHARE * 60 * minutes:
                    break
                settings = learner_class(agent).resolve_settings(agent_settings(agent, **self.settings), True)
                paces[agent] = Trainer(agent, settings, self.seed, traces, None, self.model).measure_pace()
        return Timings(recorded, read, ask, paces)

    def _limits(self, agents: Sequence[str], budgets: Sequence[float], fixed_budgets: bool) -> Limits:
        data, settings = self.data, {agent: agent_settings(agent, **self.settings) for agent in agents}
        return Limits(
            [_recorded_tokens(context) for context in data.train], len(data.validation), len(data.test),
            _fewest_to_choose(data, self.folder.state["settings"]["tolerance"]), budgets, fixed_budgets,
            (sum(map(len, HEURISTICS.values())), len(HEURISTICS)),
            {agent: (each.steps, each.every) for agent, each in settings.items()}, settings[agents[-1]].validation,
        )  # fmt: skip

    def _take_planned_contexts(self) -> None:
        data, plan = self.data, self.plan
        chosen = plan.selected([_recorded_tokens(context) for context in data.train])
        self.data = replace(
            data, train=tuple(data.train[i] for i in chosen), validation=data.validation[: plan.validation],
            test=data.test[: plan.test],
        )  # fmt: skip

    def _train(self) -> Scorer:
        """Every stage from the policy of the one before; the last one's policy is exported."""
        path, stages, policy = self.folder.path, self.plan.stages, None
        for number, stage in enumerate(stages):
            phase = phase_of(number, len(stages))
            with self._shown(phase, f"Train {stage.agent}"):
                policy = train(
                    stage.agent, open_traces(path / "traces"), path / PHASE_FOLDERS[phase], seed=self.seed, init=policy,
                    model=self.model, progress=self.progress,
                    deadline=self.plan.training_time(self.folder.state["seconds"], number),
                    **dict(self.settings) | {"steps": stage.steps, "every": stage.every},
                )  # fmt: skip
        assert policy is not None
        exported = path / "policy"
        if exported.exists() and not (exported / "policy.json").is_file():  # an export that was interrupted
            shutil.rmtree(exported)
        policy.save_pretrained(exported)
        return policy

    @contextmanager
    def _shown(self, phase: str, what: str) -> Iterator[None]:
        self.console.print(f"{what} ...")
        with self.folder.timed(phase):
            yield
        self.console.print(f"   {self.folder.state['seconds'][phase]:.0f} s")

    def _phase(self, name: str, what: str, work: Callable[[], dict[str, Any]]) -> None:
        if name not in self.folder.state:
            with self._shown(name, what):
                self.folder.save(**{name: work()})

    def _measured(
        self, part: str, configurations: Sequence[Configuration], seconds: float | None = None
    ) -> list[dict[str, Any]]:
        """Rows of a part's contexts: of all, or of those that a time allows, but of no fewer than a choice needs."""
        contexts = getattr(self.data, part)
        fewest = _fewest_to_choose(self.data, self.folder.state["settings"]["tolerance"])
        if part == "test":
            fewest = fewest_to_test(fewest)
        began, done = time.perf_counter(), 0

        def go_on(batch: int) -> bool:
            nonlocal done
            spent = time.perf_counter() - began
            late = seconds is not None and done >= fewest and spent * (done + batch) > seconds * done
            done += 0 if late else batch
            return not late

        rows = measure_losses(
            self.model, contexts, part, self.data.measure, configurations, self.progress, go_on, **self.workers
        )
        if done < len(contexts):
            self.console.print(f"   the time is short: {done} of {len(contexts)} contexts")
        return rows

    def _full_cache(self) -> dict[str, Any]:
        (row,) = self._measured("validation", ())
        tolerance = self.folder.state["settings"]["tolerance"]
        if self.data.measure == "accuracy" and row["accuracy"] <= tolerance:
            raise UserError(
                f"with its full cache the model answers {row['accuracy']:.1%} of {row['questions']} validation "
                f"questions, so there is not more than the tolerance of {tolerance} to lose: ask what it can answer, "
                "or give continuations, whose likelihood is compared"
            )
        return row

    def _choose(self, policy: Policy) -> dict[str, Any]:
        """Walk down the budgets with the learned policy, then see what heuristics do where it ended."""
        rule, walked = parse_allocation(self.allocation), len(self.plan.budgets)
        seconds = self.plan.judging_time(self.folder.state["seconds"], "chosen")
        rows = self._measured(
            "validation",
            [Configuration(LEARNED, policy, budget, rule) for budget in self.plan.budgets],
            None if seconds is None else seconds * walked / (walked + sum(map(len, HEURISTICS.values()))),
        )
        read = [self.data.validation[int(number)] for number in rows[0]["contexts"]]  # for the heuristics, too
        self.data = replace(self.data, validation=tuple(read))
        tolerance = self.folder.state["settings"]["tolerance"]
        budget = smallest_sufficient_budget(
            (row["budget"], row["loss_upper"] <= tolerance) for row in rows if row["policy"] == LEARNED
        )
        compared = max(self.plan.budgets) if budget is None else budget
        configurations = [
            Configuration(name, heuristic, compared, parse_allocation(rule))
            for name, rules in HEURISTICS.items()
            for heuristic in [self._policy(name)]
            for rule in rules
        ]
        best: dict[str, dict[str, Any]] = {}
        for row in self._measured("validation", configurations)[1:]:
            other = best.setdefault(row["policy"], row)
            if (row["loss_upper"], row["nll"]) < (other["loss_upper"], other["nll"]):
                best[row["policy"]] = row
        enough = [name for name, row in best.items() if row["loss_upper"] <= tolerance]
        return {"rows": [*rows, *best.values()], "budget": budget, "compared_at": compared, "enough": enough}

    def _test(self, policy: Policy) -> dict[str, Any]:
        """Measure the learned policy, and each heuristic with the allocation that suited it, where the walk ended."""
        chosen = self.folder.state["chosen"]
        at = chosen["compared_at"]
        configurations = [Configuration(LEARNED, policy, at, parse_allocation(self.allocation))]
        for row in chosen["rows"]:
            if row["policy"] not in (FULL, LEARNED):
                configurations.append(
                    Configuration(row["policy"], self._policy(row["policy"]), at, parse_allocation(row["allocation"]))
                )
        seconds = self.plan.judging_time(self.folder.state["seconds"], "tested")
        return {"rows": self._measured("test", configurations, seconds)}

    def _finish(self, policy: Scorer) -> None:
        state = self.folder.state
        chosen, tested = state["chosen"], state["tested"]
        known = {
            "budget": 1.0 if chosen["budget"] is None else chosen["budget"], "allocation": self.allocation,
            "protection": list(policy.protection), "enough": chosen["enough"], "measure": self.data.measure,
            "compared_at": chosen["compared_at"], "fingerprint": self.fingerprint.to_json(),
            "data": state["settings"]["data"],
            "agent": " -> ".join(stage.agent for stage in self.plan.stages),
            "stopped_after": policy.training.get("stopped_after"),
        }  # fmt: skip
        state |= result([*chosen["rows"], *tested["rows"]], **known)
        state["verdict"] = verdict(state)
        with atomic_write(self.folder.path / "README.md") as part:
            part.write_text(card(state), encoding="utf-8")
        for name in ("chosen", "tested"):  # their rows stand together now
            del state[name]
        self.folder.save(finished=True)


def _shares(budgets: Iterable[str | float]) -> list[float]:
    shares = [parse_budget(budget) for budget in budgets]
    wrong = [share for share in shares if isinstance(share, int) or share >= 1]
    if wrong or not shares:
        raise UserError(
            f"budget {wrong[0] if wrong else ''} cannot be chosen; expected shares of the cache below 1, such as 1/8"
        )
    return sorted({float(share) for share in shares}, reverse=True)


def _of_whole_tokens(budgets: list[float], data: FitData) -> list[float]:
    """The budgets that leave every head at least one token of the shortest context."""
    shortest = min(len(context.context_ids) for context in (*data.validation, *data.test))
    fitting = [budget for budget in budgets if budget * shortest >= 1]
    if not fitting:
        raise UserError(
            f"{share_of(budgets[0])} of the shortest context, {shortest} tokens, is no whole token: give larger "
            "budgets or longer contexts"
        )
    return fitting


def _rule(agent: str, allocation: str | None, settings: Mapping[str, Any]) -> str:
    """The allocation's name; refused here if the agent's scores will not allow it."""
    comparable = learner_class(agent).scores_comparable(agent_settings(agent, **settings))
    if allocation is None:
        return "global" if comparable else "uniform"
    rule = parse_allocation(allocation)
    rule.refuse_unfit(SimpleNamespace(name=agent, comparable=comparable))  # type: ignore[arg-type]
    return rule.name


def _recorded_tokens(context: TaskContext) -> int:
    """Tokens of a context and its continuations."""
    asked = (len(question.question_ids) + len(question.answer_ids) for question in context.questions)
    return len(context.context_ids) + sum(asked)


def _fewest_to_choose(data: FitData, tolerance: float) -> int:
    """The validation contexts that are needed to tell a loss of the tolerance, if none of their answers is lost."""
    fewest = FEWEST["validation"]
    if data.measure == "accuracy":
        contexts, questions = len(data.validation), sum(len(context.questions) for context in data.validation)
        while least_provable(fewest, fewest * questions // contexts) > tolerance:
            fewest += 1
    return fewest


def _refuse_too_few(data: FitData, tolerance: float, count: int) -> None:
    """Refuse questions so few that even losing none of them would not show that the loss is within the tolerance."""
    contexts, questions = len(data.validation), sum(len(context.questions) for context in data.validation)
    if data.measure != "accuracy" or least_provable(contexts, questions) <= tolerance:
        return
    needed = _fewest_to_choose(data, tolerance)
    total = len(data.train) + contexts + len(data.test)
    raise UserError(
        f"{data.source['file']} gives {total} contexts, and about {contexts_for(needed, count)} are needed to tell a "
        f"loss of {tolerance} (of {questions} questions that choose the budget, not losing one proves no less than "
        f"{least_provable(contexts, questions):.3f}): give more, ask more of each, or raise the tolerance"
    )
