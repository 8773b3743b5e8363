"""What a leaderboard compares: a YAML file that is checked key by key.

model: reference                     # or a folder, or a hub id that is on this machine
tasks:
  - {task: "multi_key:512", contexts: 64, validation: "multi_key:512:seed=899"}
budgets: [1/4, 1/8, 1/16]
allocations: [uniform, global]       # of every policy that can use them
allocations_of: {rloo: [uniform]}    # instead, of some
tiers: [drop]
selections: [all]                    # what queries read of the held slots
episodes: [none]                     # or how many episodes a context is divided into, such as 4 or "4:match=cosine"
policies: [all]                      # every registered policy that runs live; names; class paths; folders
learned:                             # folders by the name that rows carry; of several the first that is there
  joint: ["runs/zoo/joint-{seed}", "runs/held_out/joint-{seed}"]
seeds: [0, 1, 2, 3, 4]
validation: {contexts: 16, budgets: [1/16], allocations: [uniform, "global:softmax"], protections: [own, [0, 0]],
             windows: [8]}
utility: {traces: runs/held_out/test-512, contexts: 16, oracles: [oracle]}
pages:                               # page policies on traces of requests; neither model nor budgets are needed
  - {requests: traces/requests/sample.jsonl.gz, capacities: [500, 1000], semantics: prefix, warm_up: 0.7,
     policies: [lru, tail_oracle], learned: {clone: "runs/pages-{seed}"}}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, StrictStr, model_validator

from kv_gym.budgets import budget_key, parse_allocation, parse_budget
from kv_gym.errors import UserError
from kv_gym.files import read_yaml, validated
from kv_gym.live.episodic_cache import parse_episodes
from kv_gym.live.selection import parse_selection
from kv_gym.live.tiers import parse_tier

ALL = "all"
NO_EPISODES = "none"
OWN = "own"  # the protection that a policy brings
Protection = tuple[int, int] | None  # None: the policy's own


def _names(value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str | int | float) else value
    if not isinstance(items, list | tuple):
        raise ValueError("expected a list")
    if not items or not all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in items):
        raise ValueError("expected a list of names")
    return tuple(str(item) for item in items)


def _budgets(value: Any) -> tuple[str, ...]:
    """Each once, as it was written first: 0.25 and 1/4 are one budget, 1 and 1.0 are two."""
    known: dict[tuple, str] = {}
    for text in _names(value):
        known.setdefault(budget_key(parse_budget(text)), text)
    return tuple(known.values())


def _allocations(value: Any) -> tuple[str, ...]:
    names = _names(value)
    for name in names:
        parse_allocation(name)
    return names


def _tiers(value: Any) -> tuple[str, ...]:
    names = _names(value)
    for name in names:
        parse_tier(name)
    return names


def _episodes(value: Any) -> tuple[str, ...]:
    """Each once, however its settings were written."""
    found = [parse_episodes(name) for name in _names(value)]
    return tuple(dict.fromkeys(NO_EPISODES if each is None else each.name for each in found))


def _selections(value: Any) -> tuple[str, ...]:
    names = _names(value)
    for name in names:
        parse_selection(name)
    return names


def _numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError("expected a list")
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value):
        raise ValueError("expected numbers from 0")
    return tuple(value)


def _count(value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError("expected a number from 1")
    return value


def _protections(value: Any) -> tuple[Protection, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError("expected a list")
    found: list[Protection] = []
    for each in value:
        pair = None if each == OWN else _numbers(each)
        if pair is not None and len(pair) != 2:
            raise ValueError("expected `own`, or sinks and recent such as [4, 32], in each place")
        found.append(None if pair is None else (pair[0], pair[1]))
    return tuple(found)


def _capacities(value: Any) -> tuple[int, ...]:
    numbers = _numbers(value)
    if not numbers or 0 in numbers:
        raise ValueError("expected numbers from 1, pages or bytes")
    return numbers


def _folders(value: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, Mapping):
        raise ValueError("expected folders by name, such as joint: runs/joint-{seed}")
    return {str(name): _names(folders) for name, folders in value.items()}


Names = Annotated[tuple[str, ...], PlainValidator(_names)]
Budgets = Annotated[tuple[str, ...], PlainValidator(_budgets)]
Allocations = Annotated[tuple[str, ...], PlainValidator(_allocations)]
Selections = Annotated[tuple[str, ...], PlainValidator(_selections)]
Tiers = Annotated[tuple[str, ...], PlainValidator(_tiers)]
EpisodeNames = Annotated[tuple[str, ...], PlainValidator(_episodes)]
Numbers = Annotated[tuple[int, ...], PlainValidator(_numbers)]
Capacities = Annotated[tuple[int, ...], PlainValidator(_capacities)]
Count = Annotated[int | None, PlainValidator(_count)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {name: each for name, each in data.items() if each is not None} if isinstance(data, Mapping) else data


class TaskSpec(_Section):
    """One task.

    Attributes:
        task: as :func:`kv_gym.evaluation.tasks.parse_tasks` reads it.
        contexts: how many, unless the name says it with ``:count=``; None leaves it to the task.
        validation: the same kind of task on other contexts, on which heuristics' settings are chosen; None: none are.
    """

    task: StrictStr
    contexts: Count = None
    validation: StrictStr | None = None


class Validation(_Section):
    """The settings among which every heuristic gets its best, by mean accuracy over `budgets` on validation contexts.

    Attributes:
        contexts: how many.
        budgets: at which it is chosen, for all budgets of the task.
        allocations: tried; those that a policy cannot use are left out for it.
        protections: tried, sinks and recent; None is the policy's own.
        windows: tried for policies that have a setting `window`, with its default.
    """

    contexts: Count = 16
    budgets: Budgets = ("1/16", "1/32")
    allocations: Allocations = ("uniform", "global", "global:raw", "global:zscore", "global:softmax")
    protections: Annotated[tuple[Protection, ...], PlainValidator(_protections)] = (None, (0, 0), (2, 8))
    windows: Numbers = ()


class Utility(_Section):
    """Replay on recorded traces.

    Attributes:
        traces: folder of a trace set.
        split: of the traces; ``all`` takes every context.
        contexts: how many, the first ones; None takes all.
        oracles: policies that see the future: they are replayed, and never run live.
    """

    traces: StrictStr
    split: StrictStr = "test"
    contexts: Count = None
    oracles: Names = ("oracle",)


class PageSpec(_Section):
    """Page policies on one trace of requests, see :func:`kv_gym.pages.simulate`.

    Attributes:
        requests, format: file of the trace, and what it holds.
        capacities: pages, or bytes where the trace has sizes.
        policies: names, class paths, trained folders or exported files.
        learned: folders with ``{seed}``, by the name that rows carry.
        semantics, oversize, warm_up: of the simulation.
    """

    requests: StrictStr
    format: StrictStr = "auto"
    capacities: Capacities
    policies: Names = ("lru", "s3_fifo", "tail_oracle", "belady")
    learned: Annotated[dict[str, tuple[str, ...]], PlainValidator(_folders)] = {}
    semantics: Literal["objects", "prefix"] = "objects"
    oversize: Literal["refuse", "pass"] = "refuse"
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.0


def _task(value: Any) -> Any:
    return {"task": value} if isinstance(value, str) else value


def _allocations_of(value: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, Mapping):
        raise ValueError("expected allocations by policy, such as rloo: [uniform]")
    return {str(name): () if rules == [] else _allocations(rules) for name, rules in value.items()}


def _list(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise ValueError("expected a list")
    return value


class Spec(_Section):
    """What is compared; see the module's example.

    Attributes:
        tasks: at least one, unless there is `utility` or `pages`.
        budgets: as users write them; needed by tasks and utility.
        model: ``reference``, a folder or a hub id.
        dtype: that the model computes in.
        allocations, tiers, selections: every policy meets every one that it can use.
        episodes: likewise; the full cache and the null hypotheses do without. A row with episodes has ``tokens_read``,
            what they cost.
        allocations_of: instead of `allocations`, for some policies, by the name that rows carry; none: of a heuristic
            only the setting that was chosen on validation contexts.
        policies: ``all``, names, class paths or exported folders.
        learned: folders with ``{seed}``, by the name that rows carry.
        seeds: training runs of each learned policy.
        validation: how heuristics' settings are chosen, for tasks with validation contexts.
        utility: what is replayed.
        pages: page policies, whose stochastic ones run with each of `seeds`.
    """

    tasks: Annotated[tuple[Annotated[TaskSpec, BeforeValidator(_task)], ...], BeforeValidator(_list)] = ()
    budgets: Budgets = ()
    model: StrictStr = "reference"
    dtype: StrictStr = "auto"
    allocations: Allocations = ("uniform",)
    allocations_of: Annotated[dict[str, tuple[str, ...]], PlainValidator(_allocations_of)] = {}
    tiers: Tiers = ("drop",)
    selections: Selections = ("all",)
    episodes: EpisodeNames = (NO_EPISODES,)
    policies: Names = (ALL,)
    learned: Annotated[dict[str, tuple[str, ...]], PlainValidator(_folders)] = {}
    seeds: Numbers = (0,)
    validation: Validation = Validation()
    utility: Utility | None = None
    pages: Annotated[tuple[PageSpec, ...], BeforeValidator(_list)] = ()

    @model_validator(mode="after")
    def _measures_something(self) -> Spec:
        slots = bool(self.tasks) or self.utility is not None
        if not slots and not self.pages:
            raise UserError("a specification has no tasks, utility or pages; expected something to measure")
        if slots and not self.budgets:
            raise UserError("a specification has no budgets; expected shares of the tokens, such as [1/4, 1/8]")
        return self


def read_spec(spec: str | Path | Mapping | Spec) -> Spec:
    """A checked specification.

    Args:
        spec: a YAML file, the same as plain data, or a specification, which is returned as it is.

    Raises:
        UserError: no such file, no YAML, an unknown or missing key, or a value of another kind.
    """
    if isinstance(spec, Spec):
        return spec
    if isinstance(spec, Mapping):
        return validated(Spec, spec, "the specification")
    return validated(Spec, read_yaml(spec, "expected a specification with tasks and budgets, or pages"), str(spec))
