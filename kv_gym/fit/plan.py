"""What a fit will do and how long that takes, decided from a few timings before it starts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from kv_gym.errors import UserError
from kv_gym.progress import duration
from kv_gym.training.pace import Pace, steps_within

MARGIN = 0.95  # of the time is planned; the rest is for loading, the card and small delays
JUDGING, MOST_JUDGING = (
    0.4,
    0.7,
)  # of the time goes into validation and test contexts: at most, and if it cannot be less
RECORDING = 0.35  # of what judging leaves, at most
WARM_START = 0.35  # of the training time, at most, goes into `joint` before `end_to_end`
ENOUGH_CONTEXTS = 32  # to train on; shorter contexts are preferred to fewer than that
FEWEST_CONTEXTS = 8
FEWEST_STEPS = 30  # of `end_to_end`; with fewer, `joint` takes all the time
SHARES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.0)  # of the validation and test contexts that are tried


@dataclass(frozen=True)
class Timings:
    """Seconds that the parts of a fit take on one machine, model and kind of data.

    Attributes:
        record: per token of a context and its continuations.
        read: per validation context, read once and asked with its full cache.
        ask: per context and configuration.
        paces: of training, by agent.
    """

    record: float
    read: float
    ask: float
    paces: Mapping[str, Pace]


@dataclass(frozen=True)
class Limits:
    """What there is to plan with.

    Attributes:
        lengths: tokens of each training context with its continuations.
        validation, test: contexts of these parts.
        fewest: validation contexts that the tolerance needs.
        budgets: to try, the largest first.
        fixed_budgets: all of them have to be tried.
        heuristics: configurations of heuristics on validation contexts, and on test contexts.
        steps: of each agent, and its steps between validations.
        held_out: share of the training contexts that choose the checkpoint.
    """

    lengths: Sequence[int]
    validation: int
    test: int
    fewest: int
    budgets: Sequence[float]
    fixed_budgets: bool
    heuristics: tuple[int, int]
    steps: Mapping[str, tuple[int, int]]
    held_out: float = 0.1


@dataclass(frozen=True)
class Stage:
    """One training run: its agent, its steps, those between validations, and the seconds that it takes."""

    agent: str
    steps: int
    every: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a fit does.

    Attributes:
        stages: training runs; each starts from the policy of the one before.
        contexts: to record and train on: the first so many of those that are not longer than `longest` tokens.
        longest: see there.
        validation, test: contexts that choose the budget and that report it, the first ones of their parts.
        budgets: to try, the largest first.
        seconds: that each phase takes; ``measure`` is what was spent before the plan.
        minutes: that were given; None: as long as it takes.
    """

    stages: tuple[Stage, ...]
    contexts: int
    longest: int
    validation: int
    test: int
    budgets: tuple[float, ...]
    seconds: Mapping[str, float]
    minutes: float | None = None

    @property
    def total(self) -> float:
        """Seconds in all."""
        return sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data, from which :meth:`from_json` makes the plan again."""
        return asdict(self) | {"budgets": list(self.budgets), "stages": [asdict(stage) for stage in self.stages]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that :meth:`to_json` was given."""
        stages = tuple(Stage(**stage) for stage in data["stages"])
        return cls(**dict(data) | {"stages": stages, "budgets": tuple(data["budgets"])})

    def selected(self, lengths: Sequence[int]) -> list[int]:
        """Which of the training contexts, with these lengths, are recorded."""
        return [i for i, length in enumerate(lengths) if length <= self.longest][: self.contexts]

    def describe(self) -> list[str]:
        """The plan in a few lines."""
        spent = {name: duration(seconds) for name, seconds in self.seconds.items()}
        trained = ", then ".join(
            f"{stage.agent} for {stage.steps} steps ({duration(stage.seconds)})" for stage in self.stages
        )
        end = "" if self.minutes is None else f" of {duration(60 * self.minutes)}"
        more = "; --minutes N plans for a time" if self.minutes is None else ""
        return [
            f"record {self.contexts} contexts of up to {self.longest} tokens with their continuations "
            f"({spent['record']}),",
            f"train {trained},",
            f"choose among {len(self.budgets)} budgets on {self.validation} contexts "
            f"({duration(self.seconds['full_cache'] + self.seconds['chosen'])}), test on {self.test} others "
            f"({spent['tested']}):",
            f"about {duration(self.total)}{end} on this machine{more}",
        ]

    def judging_time(self, spent: Mapping[str, float], phase: str) -> float | None:
        """Seconds after which no further context is begun in a phase that measures; None without a limit.

        Args:
            spent: seconds of the phases so far, those of an interrupted one included.
            phase: ``chosen`` or ``tested``. The first leaves the second its planned part of the time.
        """
        if self.minutes is None:
            return None
        left = 60 * self.minutes * MARGIN - sum(spent.values())
        later = self.seconds["tested"] if phase == "chosen" else 0.0
        return max(0.0, left * self.seconds[phase] / max(self.seconds[phase] + later, 1e-9))

    def training_time(self, spent: Mapping[str, float], stage: int) -> float | None:
        """Seconds after which a stage has to end, counted from its own start; None without a limit.

        What other phases took longer than planned is taken from the training, in the stages' proportions, and what is
        still to come is expected to be as slow as recording was.

        Args:
            spent: seconds of the phases so far, those of an interrupted one included.
            stage: number of the stage, from 0.
        """
        if self.minutes is None:
            return None
        slower = max(1.0, spent.get("record", 0.0) / max(self.seconds["record"], 1e-9))
        later = slower * (self.seconds["chosen"] + self.seconds["tested"])
        phases = [phase_of(i, len(self.stages)) for i in range(len(self.stages))]
        own = spent.get(phases[stage], 0.0)
        left = 60 * self.minutes * MARGIN - sum(spent.values()) + own - later
        planned = sum(self.seconds[phase] for phase in phases[stage:])
        return max(1.0, left * self.seconds[phases[stage]] / max(planned, 1e-9))


def phase_of(stage: int, stages: int) -> str:
    """Name of the phase of a fit that a training run is."""
    return "train" if stage == stages - 1 else "warm_start"


def fewest_to_test(fewest: int) -> int:
    """Test contexts that are needed at least, where the choice needs `fewest`."""
    return max(fewest // 2, 4)


def plan_whole(agent: str, limits: Limits, timings: Timings, spent: float) -> Plan:
    """Everything that the settings ask for, however long it takes."""
    training, held_out = _divided(len(limits.lengths), limits.held_out)
    steps, every = limits.steps[agent]
    stage = Stage(agent, steps, every, timings.paces[agent].seconds(steps, every, training, held_out))
    judging = _judging(limits, timings, limits.validation, limits.test, len(limits.budgets))
    seconds = {"measure": spent, **judging, "record": timings.record * sum(limits.lengths), "train": stage.seconds}
    return Plan(
        (stage,), len(limits.lengths), max(limits.lengths), limits.validation, limits.test, tuple(limits.budgets),
        seconds,
    )  # fmt: skip


def plan_within(minutes: float, agents: Sequence[str], limits: Limits, timings: Timings, spent: float) -> Plan:
    """The best use of a limited time.

    In this order: validation and test contexts take at most two fifths of it, with every second budget where that
    helps; recording at most a third of the rest, on shorter contexts where fewer than 32 would fit; training the rest.

    Args:
        minutes: in all.
        agents: one agent, or ``joint`` and the agent that starts from it where the time is long enough for both.
        limits: what there is to plan with.
        timings: as measured.
        spent: seconds that are gone already.

    Raises:
        UserError: the time is too short.
    """
    whole = 60 * minutes * MARGIN - spent
    try:
        validation, test, budgets, judging = _judged(whole, limits, timings)
        rest = whole - sum(judging.values())
        contexts, longest, recording = _recorded(rest, limits, timings)
        stages = _stages(rest - recording, agents, contexts, limits, timings)
    except _TooShort as error:
        raise UserError(
            f"{minutes:g} minutes are too short for this fit on this machine, where {error.why}: give at least "
            f"{math.ceil((spent + error.needed) / 60 / MARGIN)} minutes, or fewer or shorter contexts"
        ) from None
    trained = {phase_of(i, len(stages)): each.seconds for i, each in enumerate(stages)}
    seconds = {"measure": spent, **judging, "record": recording, **trained}
    return Plan(stages, contexts, longest, validation, test, tuple(budgets), seconds, minutes)


class _TooShort(Exception):
    """The time that is left is too short; about `needed` seconds, all but those of the timing, would do."""

    def __init__(self, why: str, needed: float):
        super().__init__(why)
        self.why, self.needed = why, needed


def _judged(
    whole: float, limits: Limits, timings: Timings
) -> tuple[int, int, Sequence[float], dict[str, float]]:  # fmt: skip
    """Validation contexts, test contexts, budgets and the seconds that they take."""
    for most in (JUDGING, MOST_JUDGING):
        for validation, test, budgets in _ways_to_judge(limits):
            judging = _judging(limits, timings, validation, test, len(budgets))
            needed = sum(judging.values())
            if needed <= most * whole:
                return validation, test, budgets, judging
    why = f"{validation} validation and {test} test contexts alone take {duration(needed)}"
    raise _TooShort(why, needed / MOST_JUDGING)


def _stages(
    seconds: float, agents: Sequence[str], contexts: int, limits: Limits, timings: Timings
) -> tuple[Stage, ...]:  # fmt: skip
    """The training runs: both agents where the second gets enough steps, else the first alone."""
    training, held_out = _divided(contexts, limits.held_out)

    def stage(agent: str, seconds: float) -> Stage:
        pace = timings.paces[agent]
        try:
            steps, every = steps_within(seconds, pace, training, held_out, *limits.steps[agent])
        except UserError:
            needed = pace.seconds(FEWEST_STEPS, FEWEST_STEPS, training, held_out)
            why = f"{FEWEST_STEPS} steps of {agent} take {duration(needed)}"
            raise _TooShort(why, needed / (1 - RECORDING) / (1 - JUDGING)) from None
        return Stage(agent, steps, every, pace.seconds(steps, every, training, held_out))

    if len(agents) > 1:
        with suppress(_TooShort):
            first = stage(agents[0], WARM_START * seconds)
            second = stage(agents[1], seconds - first.seconds)
            if second.steps >= FEWEST_STEPS:
                return first, second
    return (stage(agents[0], seconds),)


def _ways_to_judge(limits: Limits) -> Iterator[tuple[int, int, Sequence[float]]]:
    """From the most thorough to the quickest."""
    coarse = [] if limits.fixed_budgets or len(limits.budgets) < 4 else [limits.budgets[::2]]
    for share in SHARES:
        validation = min(limits.validation, max(limits.fewest, math.ceil(share * limits.validation)))
        test = min(limits.test, max(fewest_to_test(limits.fewest), math.ceil(share * limits.test)))
        for budgets in [limits.budgets, *coarse]:
            yield validation, test, budgets


def _judging(limits: Limits, timings: Timings, validation: int, test: int, budgets: int) -> dict[str, float]:
    """Seconds of the phases that measure; validation contexts are read once more for the heuristics."""
    walk, compared = limits.heuristics
    return {
        "full_cache": validation * timings.read,
        "chosen": validation * (2 * timings.read + (budgets + walk) * timings.ask),
        "tested": test * (timings.read + (1 + compared) * timings.ask),
    }


def _recorded(rest: float, limits: Limits, timings: Timings) -> tuple[int, int, float]:
    """Training contexts, the longest of them in tokens, and the seconds that recording them takes."""
    lengths, ordered = list(limits.lengths), sorted(limits.lengths)
    best = 0, ordered[-1], 0.0
    for quarter in (4, 3, 2, 1):
        longest = ordered[max(0, len(ordered) * quarter // 4 - 1)]
        count, tokens = 0, 0
        for length in lengths:
            if length <= longest and (tokens + length) * timings.record <= RECORDING * rest:
                count, tokens = count + 1, tokens + length
            elif length <= longest:
                break
        if count > best[0]:
            best = count, longest, tokens * timings.record
        if count >= min(ENOUGH_CONTEXTS, len(lengths)):
            break
    if best[0] < min(FEWEST_CONTEXTS, len(lengths)):
        needed = sum(ordered[:FEWEST_CONTEXTS]) * timings.record
        why = f"recording {FEWEST_CONTEXTS} contexts takes {duration(needed)}"
        raise _TooShort(why, needed / RECORDING / (1 - JUDGING))
    return best


def _divided(contexts: int, held_out: float) -> tuple[int, int]:
    """How many contexts are trained on, and how many choose the checkpoint."""
    validation = max(1, math.ceil(held_out * contexts))
    return contexts - validation, validation
