"""The plan of a leaderboard: which policies and settings are compared, and the cells that this makes of a task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from kv_gym.budgets import Budget, parse_allocation, parse_budget, protection_for, unfit
from kv_gym.errors import UserError
from kv_gym.evaluation.configurations import Configuration
from kv_gym.evaluation.leaderboard.identity import RESULTS, digest, exported_hash, policy_hash
from kv_gym.evaluation.leaderboard.spec import ALL, NO_EPISODES, Protection, Spec, Validation
from kv_gym.evaluation.rows import FULL
from kv_gym.evaluation.summary import NULLS
from kv_gym.files import exists
from kv_gym.live.episodic_cache import parse_episodes
from kv_gym.live.selection import parse_selection
from kv_gym.live.tiers import Tier, parse_tier
from kv_gym.policies import Policy, list_policies, make_policy

PROTECTED = (4, 32)  # the ends of the null hypotheses: StreamingLLM's sinks, and the window of H2O and SnapKV


@dataclass(frozen=True)
class PolicySource:
    """A policy as plain data, from which every worker makes the same object.

    Attributes:
        name: what rows call it.
        source: what :func:`kv_gym.make_policy` takes.
        hash: of its settings and code, or of its weights.
        seed: of a learned policy, which training run.
        window: instead of the policy's default, for one that has this setting.
    """

    name: str
    source: str
    hash: str
    seed: int | None = None
    window: int | None = None

    @classmethod
    def of(
        cls, source: str, name: str | None = None, seed: int | None = None, window: int | None = None
    ) -> PolicySource:
        """A policy by its name, class path or exported folder.

        Raises:
            UserError: no such policy, or a folder that holds none.
        """
        if is_exported(source):
            return cls(name or source.rstrip("/"), source, exported_hash(source), seed)
        policy = make_policy(source, **({} if window is None else {"window": window}))
        return cls(name or source, source, policy_hash(policy), seed, window)

    @property
    def learned(self) -> bool:
        """Whether it has weights."""
        return is_exported(self.source)

    def make(self) -> Policy:
        """The policy object."""
        return make_policy(self.source, **({} if self.window is None else {"window": self.window}))

    def refusal(self, allocation: str) -> str:
        """The sentence with which an allocation refuses its scores, or ""; learned ones are asked when loaded."""
        return "" if self.learned else unfit(self.make(), parse_allocation(allocation))


def is_exported(source: str) -> bool:
    """Whether a policy is named by the folder of an exported one, or by a path that should be one."""
    return ":" not in source and ("/" in source or exists(Path(source) / "policy.json"))


@dataclass(frozen=True)
class CacheSetting:
    """How the cache of a policy is held.

    Attributes:
        budget: slots per KV head, or a share.
        allocation, evicted, select, episodes: by name.
        sinks, recent: None means the policy's own.
    """

    budget: Budget
    allocation: str = "uniform"
    evicted: str = "drop"
    sinks: int | None = None
    recent: int | None = None
    select: str = "all"
    episodes: str = NO_EPISODES


@cache
def tier_of(name: str) -> Tier:
    """A tier by name; one that lies in a folder is read once for all cells."""
    return parse_tier(name)


def cache_settings(
    policy: PolicySource,
    budgets: Iterable[str],
    allocations: Iterable[str],
    tiers: Iterable[str] = ("drop",),
    protection: Protection = None,
    selections: Iterable[str] = ("all",),
    episodes: Iterable[str] = (NO_EPISODES,),
) -> list[CacheSetting]:
    """Every way to hold the cache of one policy; a protection that is its own has one identity."""
    sinks, recent = protection or (None, None)
    if protection is not None and not policy.learned and protection == protection_for(policy.make(), None, None):
        sinks = recent = None
    return [
        CacheSetting(parse_budget(budget), rule, tier, sinks, recent, select, division)
        for budget, rule, tier, select, division in product(budgets, allocations, tiers, selections, episodes)
    ]


@dataclass(frozen=True)
class TaskIdentity:
    """What cells depend on of their task.

    Attributes:
        task, tasks_hash, trigger: of the task.
        model_hash: of the model's files and dtype; "" for replay of recorded traces, whose hash covers them.
    """

    task: str
    tasks_hash: str
    trigger: str
    model_hash: str


@dataclass(frozen=True)
class Cell:
    """One configuration on one task, as plain data for workers, before anything is measured.

    Attributes:
        policy, setting: the configuration.
        task: what it is measured on.
    """

    policy: PolicySource
    setting: CacheSetting
    task: TaskIdentity

    @cached_property
    def id(self) -> str:
        """SHA-256 of all that the result depends on, and of the name and seed that the row will bear."""
        rule, tier = parse_allocation(self.setting.allocation), tier_of(self.setting.evicted)
        # a rule or tier that is read from a file is known by what the file says, not by where it lies
        parts: Any = rule  # every allocation is a dataclass, which their base class does not say
        content = {f.name: repr(getattr(rule, f.name)) for f in fields(parts) if f.name not in ("file", "about")}
        return digest(
            [
                RESULTS, self.policy.hash, self.policy.name, self.policy.seed, self.setting.budget,
                type(rule).__name__, content, tier.label, self.setting.sinks, self.setting.recent,
                self.task.tasks_hash, self.task.trigger, self.task.model_hash,
                *([self.setting.select] if self.setting.select != "all" else []),
                *([f"episodes {self.setting.episodes}"] if self.setting.episodes != NO_EPISODES else []),
            ]
        )  # fmt: skip

    def configuration(self, policy: Policy) -> Configuration:
        """What a task measures; `policy` is the object of this cell's policy, shared by all its cells."""
        setting = self.setting
        return Configuration(
            self.policy.name, policy, setting.budget, parse_allocation(setting.allocation),
            tier_of(setting.evicted), setting.sinks, setting.recent, self.policy.seed,
            parse_selection(setting.select), parse_episodes(setting.episodes),
        )  # fmt: skip

    def fields(self) -> dict[str, Any]:
        """The fields of its row that are known before it is measured."""
        return {
            "cell": self.id, "policy": self.policy.name, "seed": self.policy.seed, "window": self.policy.window,
            "policy_hash": self.policy.hash, **vars(self.setting), **vars(self.task),
            "evicted": tier_of(self.setting.evicted).label,
        }  # fmt: skip


def heuristics(spec: Spec) -> list[PolicySource]:
    """The policies of a specification that have no weights, each once.

    Raises:
        UserError: an unknown policy, or an oracle, which cannot run live.
    """
    return [policy for policy in _named(spec) if not policy.learned]


def learned(spec: Spec) -> list[PolicySource]:
    """The trained policies of a specification, one for each seed.

    Raises:
        UserError: a folder that is not there.
    """
    found = [replace(policy, seed=0) for policy in _named(spec) if policy.learned]
    for name, seed, place in trained(spec.learned, spec.seeds):
        found.append(PolicySource.of(place if "/" in place else f"./{place}", name, seed))
    return found


def trained(learned: Mapping[str, Sequence[str]], seeds: Iterable[int]) -> Iterator[tuple[str, int, str]]:
    """Name, seed and folder of trained policies: of several folders of a name the first that is there.

    Raises:
        UserError: a folder that is not there.
    """
    for name, folders in learned.items():
        for seed in seeds if any("{seed}" in folder for folder in folders) else (0,):
            places = [folder.replace("{seed}", str(seed)) for folder in folders]
            place = next((each for each in places if (Path(each) / "policy.json").is_file()), None)
            if place is None:
                raise UserError(
                    f"learned policy {name!r} is not in {' or '.join(places)}: train it into one of them, or leave it "
                    "or its seed out of the specification"
                )
            yield name, seed, place


def _named(spec: Spec) -> list[PolicySource]:
    names: list[str] = []
    for name in spec.policies:
        names += _live() if name == ALL else [name]
    found = [PolicySource.of(name) for name in dict.fromkeys(names)]
    for policy in found:
        if not policy.learned and policy.make().needs_future:
            raise UserError(f"policy {policy.name} is an oracle and cannot run live: name it under utility, as oracles")
    return found


def _live() -> list[str]:
    return [name for name in list_policies() if name != "scorer" and not make_policy(name).needs_future]


@dataclass(frozen=True)
class Candidate:
    """One setting of one heuristic, and its cells at the validation budgets.

    Attributes:
        policy: with its window.
        allocation, protection: the setting; protection None is the policy's own.
        cells: one for each validation budget.
    """

    policy: PolicySource
    allocation: str
    protection: Protection
    cells: tuple[Cell, ...]


def candidates(task: TaskIdentity, grid: Validation, policies: Sequence[PolicySource]) -> list[Candidate]:
    """The whole grid of settings for every heuristic; what an allocation cannot use is left out."""
    found = []
    for variant in (variant for policy in policies for variant in _windows(policy, grid.windows)):
        for allocation in grid.allocations:
            if variant.refusal(allocation):
                continue
            tried = set()
            for protection in grid.protections:
                settings = cache_settings(variant, grid.budgets, (allocation,), ("drop",), protection)
                if settings[0] not in tried:  # a protection that is the policy's own stands there once
                    tried.add(settings[0])
                    cells = tuple(Cell(variant, setting, task) for setting in settings)
                    found.append(Candidate(variant, allocation, protection, cells))
    return found


def _windows(policy: PolicySource, windows: Sequence[int]) -> list[PolicySource]:
    made: Any = policy.make()
    own = {field.name: getattr(made, field.name) for field in fields(made)}.get("window")
    if not isinstance(own, int):
        return [policy]
    others = [PolicySource.of(policy.source, policy.name, window=window) for window in windows if window != own]
    return [policy, *others]


def best_candidates(found: Sequence[Candidate], rows: Mapping[str, Mapping]) -> dict[str, Candidate]:
    """By heuristic, the setting of highest mean accuracy over the validation budgets.

    Ties go to the lower NLL, then to the first of the grid. A setting that was refused, or failed, is not in the
    running.

    Args:
        found: of :func:`candidates`.
        rows: by cell.
    """
    best: dict[str, tuple[tuple[float, float], Candidate]] = {}
    for candidate in found:
        measured = [rows.get(cell.id, {}) for cell in candidate.cells]
        if any(row.get("accuracy") is None for row in measured):
            continue
        losses = [row["nll"] for row in measured]
        rank = fmean(row["accuracy"] for row in measured), -fmean(losses) if None not in losses else 0.0
        name = candidate.policy.name
        if name not in best or rank > best[name][0]:
            best[name] = rank, candidate
    return {name: candidate for name, (_, candidate) in best.items()}


def null_cells(task: TaskIdentity, spec: Spec) -> list[Cell]:
    """The full cache and the null hypotheses, plain and with protected ends: they stand in every table."""
    cells = [Cell(PolicySource.of("recency", FULL), CacheSetting(1.0), task)]
    for name, protection in product(NULLS, (None, PROTECTED)):
        policy = PolicySource.of(name)
        settings = cache_settings(policy, spec.budgets, ("uniform",), spec.tiers, protection, spec.selections)
        cells += [Cell(policy, setting, task) for setting in settings]
    return cells


def cells_of(
    task: TaskIdentity,
    spec: Spec,
    policies: Iterable[PolicySource],
    chosen: Iterable[Candidate] = (),
    nulls: bool = True,
) -> dict[str, tuple[Cell, bool]]:
    """All cells of one task by id, each with whether its setting was chosen on validation contexts.

    Args:
        task: what is measured.
        spec: budgets, allocations (heuristics that cannot use one go without), tiers, selections and episodes.
        policies: they run with their own protection.
        chosen: settings of heuristics that run too.
        nulls: whether the full cache and the null hypotheses are among them.
    """
    marked = {cell.id: (cell, False) for cell in (null_cells(task, spec) if nulls else ())}
    tiers, selections, episodes = (
        (spec.tiers, spec.selections, spec.episodes) if nulls else (("drop",), ("all",), (NO_EPISODES,))
    )
    for policy in policies:
        rules = spec.allocations_of.get(policy.name, spec.allocations)
        fit = [rule for rule in rules if not policy.refusal(rule)]
        for setting in cache_settings(policy, spec.budgets, fit, tiers, None, selections, episodes):
            cell = Cell(policy, setting, task)
            marked.setdefault(cell.id, (cell, False))
    for choice in chosen:
        rules = (choice.allocation,)
        ways = cache_settings(choice.policy, spec.budgets, rules, tiers, choice.protection, selections, episodes)
        for setting in ways:
            cell = Cell(choice.policy, setting, task)
            marked[cell.id] = (cell, True)
    return marked
