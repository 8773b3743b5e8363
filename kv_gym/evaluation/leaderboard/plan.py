"""Who is compared, and the cells that this makes of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kv_gym.errors import UserError
from kv_gym.evaluation.configurations import FULL
from kv_gym.evaluation.leaderboard.cells import Cell, Contender, Setting, settings, unfit
from kv_gym.evaluation.leaderboard.spec import ALL, Protection, Spec
from kv_gym.evaluation.summary import NULLS
from kv_gym.policies import list_policies, make_policy

PROTECTED = (4, 32)  # the ends of the null hypotheses: StreamingLLM's sinks, and the window of H2O and SnapKV


@dataclass(frozen=True)
class Choice:
    """The setting with which a heuristic answers most on validation contexts.

    Attributes:
        contender: with the window that did best.
        allocation, protection: that did best; protection None is the policy's own.
        accuracy: mean over the validation budgets.
    """

    contender: Contender
    allocation: str
    protection: Protection
    accuracy: float


@dataclass(frozen=True)
class Place:
    """The task that cells belong to, as far as their identity depends on it."""

    task: str
    tasks_hash: str
    trigger: str
    model_hash: str

    def cell(self, contender: Contender, setting: Setting) -> Cell:
        """A cell here."""
        return Cell(contender, setting, self.task, self.tasks_hash, self.trigger, self.model_hash)


def heuristics(spec: Spec) -> list[Contender]:
    """The policies of a specification that have no weights, each once.

    Raises:
        UserError: an unknown policy, or an oracle, which cannot run live.
    """
    return [each for each in _named(spec) if not each.learned]


def learned(spec: Spec) -> list[Contender]:
    """The trained policies of a specification, one for each seed.

    Raises:
        UserError: a folder that is not there.
    """
    found = [replace(each, seed=0) for each in _named(spec) if each.learned]
    for name, folders in spec.learned.items():
        seeds = spec.seeds if any("{seed}" in folder for folder in folders) else (0,)
        for seed in seeds:
            places = [folder.replace("{seed}", str(seed)) for folder in folders]
            there = next((place for place in places if (Path(place) / "policy.json").is_file()), None)
            if there is None:
                raise UserError(
                    f"learned policy {name!r} is not in {' or '.join(places)}: train it into one of them, or leave it "
                    "or its seed out of the specification"
                )
            found.append(Contender.of(there if "/" in there else f"./{there}", name, seed))
    return found


def _named(spec: Spec) -> list[Contender]:
    names: list[str] = []
    for name in spec.policies:
        names += _live() if name == ALL else [name]
    found = [Contender.of(name) for name in dict.fromkeys(names)]
    for each in found:
        if not each.learned and each.make().needs_future:
            raise UserError(f"policy {each.name} is an oracle and cannot run live: name it under utility, as oracles")
    return found


def _live() -> list[str]:
    return [name for name in list_policies() if name != "scorer" and not make_policy(name).needs_future]


def null_cells(place: Place, spec: Spec) -> list[Cell]:
    """The full cache and the null hypotheses, plain and with protected ends: they stand in every table."""
    cells = [place.cell(Contender.of("recency", FULL), Setting(1.0))]
    for name in NULLS:
        contender = Contender.of(name)
        for protection in (None, PROTECTED):
            chosen = settings(contender, spec.budgets, ("uniform",), spec.tiers, protection)
            cells += [place.cell(contender, setting) for setting in chosen]
    return cells


def cells_of(
    place: Place, spec: Spec, plain: Sequence[Contender], trained: Sequence[Contender], chosen: Mapping[str, Choice]
) -> dict[str, tuple[Cell, bool]]:
    """All cells of one task by id, each with whether its setting was chosen on validation contexts.

    Args:
        place: the task.
        spec: budgets, allocations (heuristics that cannot use one go without) and tiers.
        plain: heuristics; they run with their own protection and, where `chosen` has them, with what it says.
        trained: learned policies.
        chosen: by the heuristic's name.
    """
    marked = {cell.id: (cell, False) for cell in null_cells(place, spec)}
    for contender in (*plain, *trained):
        fit = [rule for rule in spec.allocations if not unfit(contender, rule)]
        for setting in settings(contender, spec.budgets, fit, spec.tiers):
            cell = place.cell(contender, setting)
            marked.setdefault(cell.id, (cell, False))
    for choice in chosen.values():
        for setting in settings(choice.contender, spec.budgets, (choice.allocation,), spec.tiers, choice.protection):
            cell = place.cell(choice.contender, setting)
            marked[cell.id] = (cell, True)
    return marked
