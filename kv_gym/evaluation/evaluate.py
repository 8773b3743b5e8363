"""`kv-gym evaluate`: compare policies on recorded traces, or on a decoding model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from rich.progress import Progress

from kv_gym.budgets import Allocation, fitting, parse_allocation, parse_budget
from kv_gym.errors import UserError
from kv_gym.evaluation.configurations import every_configuration
from kv_gym.evaluation.replay import replay
from kv_gym.evaluation.rows import refuse_unwritable, result, write_json
from kv_gym.evaluation.tasks import Task, TaskContext, tasks_hash
from kv_gym.evaluation.tasks.asked import by_label, unseen_questions
from kv_gym.live.tiers import parse_tier
from kv_gym.policies import Policy, make_policy

COLUMNS = ("policy", "budget", "allocation", "evicted", "task", "utility_kept", "accuracy", "nll", "cache_bytes", "n")
Policies = Iterable[str | Path | Policy] | Mapping[str, str | Path | Policy]


def evaluate(
    policies: Policies,
    budgets: Iterable[str | int | float],
    *,
    traces=None,
    model=None,
    tasks: Iterable[TaskContext] | Iterable[Task] | None = None,
    split: str | None = "test",
    sinks: int | None = None,
    recent: int | None = None,
    allocations: Iterable[str | Allocation] = ("uniform",),
    evicted: Iterable[str] = ("drop",),
    json: str | Path | None = None,
    progress: bool = True,
) -> dict:
    """Compare policies; give either `traces` (replay) or `model` and `tasks` (live).

    Args:
        policies: names, class paths, exported folders or policy objects; a mapping gives them names for the rows.
        budgets: slots per head or shares, see :func:`kv_gym.budgets.parse_budget`.
        traces: a trace set or its folder.
        model: a transformers decoder.
        tasks: contexts with questions, or whole tasks, see :func:`kv_gym.evaluation.tasks.parse_tasks`.
        split: of the traces, ``train`` or ``test``; None takes all.
        sinks, recent: protection for every policy; None means each policy's own.
        allocations: who gets the slots, see :func:`kv_gym.budgets.parse_allocation`; every policy meets all that can
            use its scores.
        evicted: what becomes of evicted pairs, ``drop``, ``merge``, ``bits:4`` ...; every policy meets every one. Live
            only: replay knows what is kept, not what a model makes of it.
        json: file to write the result to.
        progress: show a bar.

    Returns:
        ``{"rows": [...], "left_out": [...], "command", "versions", ...}``; rows as in :func:`replay` and
        :func:`~kv_gym.evaluation.live.judge`, with None for what the other of the two measures; a sentence for every
        policy and allocation that do not fit each other.

    Raises:
        UserError: an unusable policy, budget, trace set or task; a policy of another model, or one that no allocation
            can use; an oracle live.
    """
    if json is not None:
        refuse_unwritable(json)
    rules = [parse_allocation(allocation) for allocation in allocations]
    chosen_budgets = [parse_budget(budget) for budget in budgets]
    chosen = named(policies)
    if (traces is None) == (model is None):
        raise UserError("evaluate compares either on traces or on a model with tasks; give exactly one of them")
    fates = list(evicted)
    if traces is not None:
        if fates != ["drop"]:
            raise UserError(
                "replay only knows what is kept: compare what becomes of evicted pairs with --model and --tasks"
            )
        rows, about = _replayed(chosen, chosen_budgets, traces, split, sinks, recent, rules, progress)
    else:
        rows, about = _live(chosen, chosen_budgets, model, list(tasks or ()), sinks, recent, rules, fates, progress)
    about["left_out"] = [f"{name}: {why}" for name, policy in chosen.items() for why in fitting(policy, rules)[1]]
    data = result([dict.fromkeys(COLUMNS) | row for row in rows], **about)
    if json is not None:
        write_json(json, data)
    return data


def named(policies: Policies) -> dict[str, Policy]:
    """Policies by the name that rows carry; a UserError where there is none, or where two would bear one name."""
    if isinstance(policies, Mapping):
        chosen = {name: make_policy(given) for name, given in policies.items()}
    else:
        chosen, source = {}, dict[str, object]()
        for given in policies:
            name = given.name if isinstance(given, Policy) else str(given).rstrip("/")
            same = given if isinstance(given, Policy) else name
            if source.setdefault(name, same) != same:
                raise UserError(f"two policies are called {name!r}; give a mapping that names each of them")
            chosen[name] = make_policy(given)
    if not chosen:
        raise UserError("no policy to evaluate; give at least one name (`kv-gym policies` lists them)")
    return chosen


def refuse_other_model(policies: Mapping[str, Policy], fingerprint, what: str) -> None:
    """Raise a UserError where a learned policy belongs to another model than `what`."""
    for name, policy in policies.items():
        theirs = getattr(policy, "fingerprint", None)
        if theirs is not None:
            theirs.refuse_other(fingerprint, f"policy {name}", what)


def in_split(traces, split: str | None):
    """The part of a trace set in `split`, or all of it for None; a UserError where that is empty."""
    part = traces.select(split=split) if split else traces
    if not len(part):
        there = ", ".join(sorted({repr(entry.split) for entry in traces.entries})) or "none"
        raise UserError(
            f"the traces hold no context in split {split!r} (splits there: {there}); choose another split, or `all`"
        )
    return part


def _replayed(policies, budgets, traces, split, sinks, recent, rules, progress):
    from kv_gym.traces import TraceSet, open_traces

    trace_set = traces if isinstance(traces, TraceSet) else open_traces(traces)
    refuse_other_model(policies, trace_set.fingerprint, "the model of the traces")
    part = in_split(trace_set, split)
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("replay", total=len(part) * len(policies))
        rows = replay(policies, part, budgets, sinks, recent, lambda: bar.advance(task), rules)
    return rows, {"traces": part.hash, "contexts": len(part), "split": split or "all"}


def _live(policies, budgets, model, given, sinks, recent, rules, fates, progress):
    from kv_gym.evaluation.live import judge
    from kv_gym.models.fingerprint import Fingerprint

    if not given:
        raise UserError("live evaluation needs tasks; give --tasks FILE.jsonl or --tasks reference")
    for name, policy in policies.items():
        if policy.needs_future:
            raise UserError(
                f"policy {name} is an oracle and a live model has no recorded future: evaluate it on traces"
            )
    refuse_other_model(policies, Fingerprint.of(model), "this model")
    tasks, hashed = _tasks(given)
    contexts = sum(task.contexts for task in tasks)
    configurations = every_configuration(policies, budgets, rules, [parse_tier(fate) for fate in fates], sinks, recent)
    with Progress(transient=True, disable=not progress) as bar:
        shown = bar.add_task("answer", total=contexts)
        rows = judge(model, tasks, configurations, lambda done: bar.advance(shown, done))
    return rows, {"tasks": hashed, "contexts": contexts, "model": Path(str(model.config.name_or_path)).name}


def _tasks(given: Sequence[TaskContext] | Sequence[Task]) -> tuple[list[Task], str]:
    """Tasks, and a hash over all of them; contexts are asked questions that are unseen when they are cut."""
    contexts = [each for each in given if isinstance(each, TaskContext)]
    tasks = [each for each in given if isinstance(each, Task)]
    if not contexts:
        return tasks, tasks[0].hash if len(tasks) == 1 else sha256("".join(t.hash for t in tasks).encode()).hexdigest()
    if tasks:
        raise UserError("tasks are either contexts with questions or whole tasks, and both were given; give one kind")
    asked = by_label(contexts).items()
    return [unseen_questions(same, label) for label, same in asked], tasks_hash(contexts)
