"""`kv-gym evaluate`: compare policies on recorded traces, or on a decoding model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from kv_gym.budgets import Allocation, fitting, parse_allocation, parse_budget
from kv_gym.errors import UserError
from kv_gym.evaluation.configurations import configurations_of, full_cache
from kv_gym.evaluation.measure import measure
from kv_gym.evaluation.rows import refuse_unwritable, result, write_json
from kv_gym.evaluation.tasks import (
    Task,
    TaskContext,
    contexts_from_records,
    group_by_task,
    parse_tasks,
    tasks_hash,
    unseen_questions,
)
from kv_gym.evaluation.tasks.replay import replay_tasks
from kv_gym.live.episodic_cache import parse_episodes
from kv_gym.live.selection import parse_selection
from kv_gym.live.tiers import parse_tier
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.policies import Policy, make_policy
from kv_gym.progress import ProgressBar
from kv_gym.records import read_records
from kv_gym.traces import TraceSet, open_traces

Policies = Iterable[str | Path | Policy] | Mapping[str, str | Path | Policy]
Tasks = str | Path | Iterable[Any]


def evaluate(
    policies: Policies,
    budgets: Iterable[str | int | float],
    *,
    traces: str | Path | TraceSet | Iterable[str | Path | TraceSet] | None = None,
    model: Any = None,
    tasks: Tasks | None = None,
    tokenizer: Any = None,
    chat: bool = False,
    split: str | None = "test",
    sinks: int | None = None,
    recent: int | None = None,
    allocations: Iterable[str | Allocation] = ("uniform",),
    evicted: Iterable[str] = ("drop",),
    select: Iterable[str] = ("all",),
    episodes: Iterable[str] = ("none",),
    json: str | Path | None = None,
    workers: int | None = None,
    ray: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Compare policies on traces (replay) or with a model (live).

    Give either `traces`, or `model` with `tasks`.

    Args:
        policies: names, class paths such as ``my_policy:Peak``, or folders of trained policies. In Python, also policy
            objects, and a mapping that names them for the rows.
        budgets: slots per head or shares of the tokens, such as ``64``, ``0.25`` or ``1/8``.
        traces: trace set to replay, or its folder; several of one model, or a folder of them, are read as one.
        model: transformers decoder that answers the tasks.
        tasks: names or files as :func:`kv_gym.evaluation.tasks.parse_tasks` reads them, such as ``questions.jsonl``;
            or a list (or data set) of questions as the lines of such a file are, of contexts with questions, or of
            whole tasks.
        tokenizer: of the model; needed where tasks are text.
        chat: render questions and messages by the model's chat template.
        split: of the traces, ``train`` or ``test``; ``all`` takes every context. In Python, so does None.
        sinks: first tokens that every policy keeps; by default each policy's own number.
        recent: last tokens that every policy keeps; by default each policy's own number.
        allocations: who gets the slots: ``uniform``, ``global``, ``global:NORMALISATION`` ...; every policy is measured
            with all that can use its scores.
        evicted: what becomes of evicted pairs: ``drop``, ``merge``, ``merge:values``, ``bits:4``, ``less:FOLDER`` ...;
            every policy is measured with each. Only with a model, because replay knows what is kept and not what a
            model makes of it.
        select: which of the held slots a query reads: ``all``, ``mpcache:0.2`` ...; every policy is measured with each.
            Only with a model.
        episodes: ``none``, or how many episodes a context is divided into, each with a cache of that budget, from which
            a question chooses one: ``4``, ``4:medoids=8:block=64:match=cosine`` ...; every policy is measured with
            each. Only with a model, and tasks whose context is compressed once.
        json: file to write the result to.
        workers: processes that share the contexts, each with one thread for tensors; they load the model from where it
            was loaded, and rows are the same for any number of them. By default this process with all its threads.
        ray: address of a Ray cluster whose machines measure in place of processes here, such as ``auto`` or
            ``auto:gpus=0.25``; traces and the model's folder have the same name on all of them.
        progress: show a bar.

    Returns:
        ``{"rows": [...], "left_out": [...], "command", "versions", ...}``: rows are those of
        :class:`kv_gym.evaluation.rows.Row`, live with the full cache first; ``left_out`` has a sentence for every
        policy and allocation that do not fit each other.

    Raises:
        UserError: an unusable policy, budget, trace set or task; a policy of another model, or one that no allocation
            can use; an oracle live.
    """
    if json is not None:
        refuse_unwritable(json)
    rules = [parse_allocation(allocation) for allocation in allocations]
    chosen, tiers = named_policies(policies), [parse_tier(name) for name in evicted]
    if model is not None and tokenizer is not None:
        chosen = {name: policy.with_tokenizer(tokenizer) for name, policy in chosen.items()}
    selections, divisions = [parse_selection(name) for name in select], [parse_episodes(name) for name in episodes]
    configurations = configurations_of(
        chosen, [parse_budget(each) for each in budgets], rules, tiers, sinks, recent, selections, divisions
    )
    if not configurations:
        raise UserError("there is nothing to compare; expected at least one budget, allocation and so on")
    if (traces is None) == (model is None):
        raise UserError("evaluate needs either traces, or a model with tasks: give exactly one of the two")
    found: Sequence[Task]
    if traces is not None:
        if [tier.name for tier in tiers] != ["drop"] or [each.name for each in selections] != ["all"] or any(divisions):
            raise UserError(
                "replay knows what is kept and not what a model makes of it: to compare what becomes of evicted pairs, "
                "what queries read of the others, or episodes, give a model with tasks instead of traces"
            )
        part = traces_in_split(traces, split)
        refuse_other_model(chosen, part.fingerprint, "the model of the traces")
        found = replay_tasks(part)
        about = {"traces": part.hash, "contexts": len(part), "split": split or "all"}
    else:
        for name, policy in chosen.items():
            if policy.needs_future:
                raise UserError(f"policy {name} is an oracle, and a live model has no recorded future: give traces")
        found, hashed = _tasks_of(tasks, tokenizer, chat)
        refuse_other_model(chosen, Fingerprint.of(model), "this model")
        configurations = [full_cache(), *configurations]
        folder = Path(str(model.config.name_or_path)).name
        about = {"tasks": hashed, "contexts": sum(task.contexts for task in found), "model": folder}
    label = "replay" if model is None else "answer"
    with ProgressBar(label, about["contexts"], shown=progress, transient=True) as bar:
        rows = measure(model, found, configurations, bar.advance, workers=workers, ray=ray)
    left_out = [f"{name}: {why}" for name, policy in chosen.items() for why in fitting(policy, rules)[1]]
    data = result(rows, **about, left_out=left_out)
    if json is not None:
        write_json(json, data)
    return data


def named_policies(policies: Policies) -> dict[str, Policy]:
    """Policies by the name that rows carry.

    Raises:
        UserError: no policy, or two of one name.
    """
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


def refuse_other_model(policies: Mapping[str, Policy], fingerprint: Fingerprint, what: str) -> None:
    """Raise a UserError where a learned policy belongs to another model than `what`."""
    for name, policy in policies.items():
        trained_on = getattr(policy, "fingerprint", None)
        if trained_on is not None:
            accept = getattr(policy, "accept_fingerprint", False)
            trained_on.refuse_other(fingerprint, f"policy {name}", what, accept)


def traces_in_split(traces: str | Path | TraceSet | Iterable[str | Path | TraceSet], split: str | None) -> TraceSet:
    """A trace set, or the part of it in `split` (None or ``all``: every context).

    Raises:
        UserError: no trace set there, or no context in the split.
    """
    opened = open_traces(traces)
    part = opened if split in (None, "all") else opened.select(split=split)
    if not len(part):
        known = ", ".join(sorted({repr(entry.split) for entry in opened.entries})) or "none"
        raise UserError(
            f"the traces hold no context in split {split!r} (splits there: {known}); choose another split, or `all`"
        )
    return part


def _tasks_of(tasks: Tasks | None, tokenizer: Any, chat: bool) -> tuple[list[Task], str]:
    """Whole tasks and a hash over all of them; contexts are asked questions that are unseen when they are cut."""
    if isinstance(tasks, str | Path):
        given: list = parse_tasks(str(tasks), tokenizer, chat=chat)
    else:
        given = list(() if tasks is None else tasks)
    if given and all(isinstance(each, str | Path) for each in given):
        given = [task for name in given for task in parse_tasks(str(name), tokenizer, chat=chat)]
    elif given and all(isinstance(each, Mapping) for each in given):
        given = contexts_from_records(read_records(given, "context, question and answer"), tokenizer, chat)
    if not given:
        raise UserError("a model needs tasks: give tasks a name such as 'multi_key:512', a file or a list of questions")
    if all(isinstance(each, Task) for each in given):
        hashes = [task.hash for task in given]
        return given, hashes[0] if len(hashes) == 1 else sha256("".join(hashes).encode()).hexdigest()
    if all(isinstance(each, TaskContext) for each in given):
        return [unseen_questions(same, label) for label, same in group_by_task(given).items()], tasks_hash(given)
    kinds = ", ".join(sorted({type(each).__name__ for each in given}))
    raise UserError(
        f"tasks hold {kinds}; expected names, questions (dicts), contexts or whole tasks, and all of a kind"
    )
