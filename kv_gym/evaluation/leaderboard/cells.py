"""Cells: one configuration on one task. What is known before anything is measured, as plain data for workers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import product
from typing import Any

from kv_gym.budgets import parse_allocation, parse_budget, protection_for
from kv_gym.budgets.allocation import unfit as refused
from kv_gym.budgets.budget import Budget
from kv_gym.evaluation.configurations import Configuration
from kv_gym.evaluation.leaderboard.identity import RESULTS, digest, exported_hash, policy_hash
from kv_gym.live.tiers import parse_tier
from kv_gym.policies import Policy, make_policy


@dataclass(frozen=True)
class Contender:
    """A policy that is compared, before it has a budget.

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
    def of(cls, source: str, name: str | None = None, seed: int | None = None, window: int | None = None) -> Contender:
        """A policy by its name, class path or exported folder.

        Raises:
            UserError: no such policy, or a folder that holds none.
        """
        if is_exported(source):
            return cls(name or source.rstrip("/"), source, exported_hash(source), seed)
        made = make_policy(source, **({} if window is None else {"window": window}))
        return cls(name or source, source, policy_hash(made), seed, window)

    @property
    def learned(self) -> bool:
        """Whether it has weights."""
        return is_exported(self.source)

    def make(self) -> Policy:
        """The policy object."""
        return make_policy(self.source, **({} if self.window is None else {"window": self.window}))


@dataclass(frozen=True)
class Setting:
    """How a contender's slots are dealt out.

    Attributes:
        budget: slots per KV head, or a share.
        allocation, evicted: by name.
        sinks, recent: None means the policy's own.
    """

    budget: Budget
    allocation: str = "uniform"
    evicted: str = "drop"
    sinks: int | None = None
    recent: int | None = None


@dataclass(frozen=True)
class Cell:
    """One configuration on one task.

    Attributes:
        contender, setting: the configuration.
        task, tasks_hash, trigger: of the task.
        model_hash: of the model's files and dtype; "" for replay of recorded traces, whose hash covers them.
    """

    contender: Contender
    setting: Setting
    task: str
    tasks_hash: str
    trigger: str
    model_hash: str

    @cached_property
    def id(self) -> str:
        """SHA-256 of all that the result depends on, and of the name and seed that the row will bear."""
        rule = parse_allocation(self.setting.allocation)
        # a rule that is read from a file is known by what the file says, not by where it lies
        parts: Any = rule  # every allocation is a dataclass, which their base class does not say
        content = {f.name: repr(getattr(rule, f.name)) for f in fields(parts) if f.name not in ("file", "about")}
        return digest(
            [
                RESULTS, self.contender.hash, self.contender.name, self.contender.seed, self.setting.budget,
                type(rule).__name__, content, self.setting.evicted, self.setting.sinks, self.setting.recent,
                self.tasks_hash, self.trigger, self.model_hash,
            ]
        )  # fmt: skip

    def configuration(self, policy: Policy) -> Configuration:
        """What a task measures; `policy` is the contender's, shared by all its cells."""
        held = self.setting
        return Configuration(
            self.contender.name, policy, held.budget, parse_allocation(held.allocation), parse_tier(held.evicted),
            held.sinks, held.recent, self.contender.seed,
        )  # fmt: skip

    def row(self) -> dict[str, Any]:
        """The part of its row that is known before it is measured."""
        held = self.setting
        return {
            "cell": self.id, "policy": self.contender.name, "seed": self.contender.seed, "budget": held.budget,
            "allocation": held.allocation, "evicted": held.evicted, "sinks": held.sinks, "recent": held.recent,
            "window": self.contender.window, "trigger": self.trigger, "task": self.task, "tasks_hash": self.tasks_hash,
            "model_hash": self.model_hash, "policy_hash": self.contender.hash,
        }  # fmt: skip


def is_exported(source: str) -> bool:
    """Whether a policy is named by the folder of an exported one, or by a path that should be one."""
    from pathlib import Path

    return ":" not in source and ("/" in source or (Path(source) / "policy.json").is_file())


def settings(
    contender: Contender,
    budgets: Iterable[str],
    allocations: Iterable[str],
    tiers: Iterable[str] = ("drop",),
    protection: tuple[int, int] | None = None,
) -> list[Setting]:
    """Every budget, allocation and tier for one contender; a protection that is its own has one identity."""
    sinks, recent = protection or (None, None)
    if protection is not None and not contender.learned and protection == protection_for(contender.make(), None, None):
        sinks = recent = None
    return [
        Setting(parse_budget(budget), rule, tier, sinks, recent)
        for budget, rule, tier in product(budgets, allocations, tiers)
    ]


def unfit(contender: Contender, allocation: str) -> str:
    """The sentence with which an allocation refuses a policy's scores, or ""; learned ones are asked when loaded."""
    if contender.learned:
        return ""
    return refused(contender.make(), parse_allocation(allocation))
