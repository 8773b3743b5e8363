"""Summaries of rows: seeds and contexts made one number with its interval, and differences that are paired.

Rows are those of :mod:`kv_gym.evaluation.leaderboard`, one for each configuration, task and training seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean

import numpy as np

from kv_gym.budgets import budget_key
from kv_gym.evaluation.interval import mean_interval
from kv_gym.evaluation.rows import FULL

NULLS = ("random", "recency")
DRAWS = 2000  # of the bootstrap: its ends then move by about a tenth of the interval's width
CONFIGURATION = ("policy", "budget", "allocation", "evicted", "sinks", "recent", "window", "trigger")
_MEANS = ("nll", "cache_bytes", "policy_bytes", "milliseconds", "n", "questions")


@dataclass(frozen=True)
class Estimate:
    """A mean with the ends of its 95 % interval.

    Attributes:
        mean, low, high: the mean and the ends; they are equal where one run of one context says nothing of the spread.
        over: what varied: ``seeds``, ``contexts`` or ``seeds and contexts``.
    """

    mean: float
    low: float
    high: float
    over: str


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean of one number per training seed, with Student's t interval.

    It holds for other seeds on the same contexts: how much contexts vary, it does not say.
    """
    mean, half = fmean(values), mean_interval(values)[1] or 0.0
    return Estimate(mean, mean - half, mean + half, "seeds")


def over_contexts(parts: Sequence[float], wholes: Sequence[float]) -> Estimate:
    """The ratio of two sums over contexts, with a cluster bootstrap: contexts are drawn whole, with replacement.

    Questions of one context share its cut, so that they are no independent draws; contexts are.

    Args:
        parts: of each context, such as its right answers.
        wholes: of each context, such as its questions; above zero in some. Contexts of zero say nothing.
    """
    top, bottom = np.asarray(parts, float), np.asarray(wholes, float)
    top, bottom = top[bottom > 0], bottom[bottom > 0]
    times = _times_drawn(len(top))
    low, high = np.quantile(times @ top / (times @ bottom), (0.025, 0.975))
    return Estimate(float(top.sum() / bottom.sum()), float(low), float(high), "contexts")


@cache
def _times_drawn(contexts: int) -> np.ndarray:
    """How often each context is drawn, `[DRAWS, contexts]`: the same draws every time."""
    return np.random.default_rng(0).multinomial(contexts, [1 / contexts] * contexts, DRAWS)


def paired(ours: Sequence[Mapping], theirs: Sequence[Mapping]) -> Estimate | None:
    """How much more of a task one configuration answers than another, context by context.

    The interval joins how the difference varies over contexts (cluster bootstrap of the seeds' mean) with how it
    varies over training seeds (Student's t), as independent errors: the square root of the sum of squares.

    Args:
        ours: rows of one configuration, one for each seed.
        theirs: rows of the other.

    Returns:
        None where the rows do not hold the same contexts, or nothing was asked in them.
    """
    ids = sorted(ours[0].get("contexts") or ())
    if not ids or any(set(row.get("contexts") or ()) != set(ids) for row in (*ours, *theirs)):
        return None
    asked = [ours[0]["contexts"][name][1] for name in ids]
    if not sum(asked):
        return None
    gain = _mean_right(ours, ids) - _mean_right(theirs, ids)
    found = over_contexts(gain.tolist(), asked)
    squared = 0.0
    for rows in (ours, theirs):
        of_seeds = over_seeds([sum(row["contexts"][name][0] for name in ids) / sum(asked) for row in rows])
        squared += (of_seeds.high - of_seeds.mean) ** 2
    low = found.mean - ((found.mean - found.low) ** 2 + squared) ** 0.5
    high = found.mean + ((found.high - found.mean) ** 2 + squared) ** 0.5
    return Estimate(found.mean, low, high, "seeds and contexts" if squared else "contexts")


def _mean_right(rows: Sequence[Mapping], ids: Sequence[str]) -> np.ndarray:
    return np.mean([[row["contexts"][name][0] for name in ids] for row in rows], 0)


def configuration_key(row: Mapping) -> tuple:
    """A key of a row's configuration: the fields of :data:`CONFIGURATION`, None where the row lacks one."""
    return tuple(budget_key(row[name]) if name == "budget" else row.get(name) for name in CONFIGURATION)


def summarise(rows: Iterable[Mapping], measure: str = "accuracy") -> list[dict]:
    """One line for each configuration and task, with its seeds made one.

    Args:
        rows: of any number of tasks; refused ones are left out.
        measure: ``accuracy``, or ``utility_kept`` (ratio of sums over contexts, of replay).

    Returns:
        Lines of the configuration (:data:`CONFIGURATION`), ``task``, ``learned``, ``chosen_on_validation``, ``seeds``,
        means of the other numbers, `measure` with ``low``, ``high`` and ``over``: over seeds for learned policies with
        several of them, else over contexts; where a row lists no contexts the ends are the mean. ``gain`` is the paired
        difference to the best heuristic of the same task and budget (:func:`best_heuristics`) as ``{"against", "mean",
        "low", "high", "over"}``, or None. ``rows`` holds what a line stands on.
    """
    configurations: dict[tuple, list[Mapping]] = {}
    for row in rows:
        if not row.get("refused") and row.get(measure) is not None:
            configurations.setdefault((row["task"], *configuration_key(row)), []).append(row)
    lines = [_line(same, measure) for same in configurations.values()]
    best = best_heuristics(lines, measure)
    for line in lines:
        other = best.get((line["task"], budget_key(line["budget"])))
        line["gain"] = None
        if other is not None and other is not line and line["policy"] != FULL:
            difference = paired(line["rows"], other["rows"])
            if difference is not None:
                line["gain"] = {"against": other["policy"], **vars(difference)}
    return lines


def _line(rows: list[Mapping], measure: str) -> dict:
    first = rows[0]
    learned = first.get("seed") is not None
    contexts = list((first.get("contexts") or {}).values())
    if learned and len(rows) > 1:
        found = over_seeds([row[measure] for row in rows])
    elif contexts and sum(entry[1] for entry in contexts):
        found = over_contexts([entry[0] for entry in contexts], [entry[1] for entry in contexts])
    else:
        found = Estimate(first[measure], first[measure], first[measure], "contexts")
    line = {"task": first["task"], **{name: first.get(name) for name in CONFIGURATION}}
    line |= {"learned": learned, "seeds": len(rows), measure: found.mean}
    line |= {"low": max(found.low, 0.0), "high": min(found.high, 1.0)}  # Student's t knows nothing of shares
    line |= {"over": found.over, "chosen_on_validation": bool(first.get("chosen_on_validation")), "rows": rows}
    for name in _MEANS:
        known = [row[name] for row in rows if row.get(name) is not None]
        line[name] = fmean(known) if known else None
    return line


def best_heuristics(lines: Iterable[Mapping], measure: str = "accuracy") -> dict[tuple[str, tuple], dict]:
    """The line of the best policy that is not learned, by task and :func:`~kv_gym.budgets.budget_key`.

    Of the heuristics with several settings only those chosen on validation contexts compete, where there are any.
    The best is found on the very contexts that are reported, which is in the heuristics' favour.
    """
    candidates: dict[tuple[str, tuple], list] = {}
    for line in lines:
        if not line["learned"] and line["policy"] != FULL:
            candidates.setdefault((line["task"], budget_key(line["budget"])), []).append(line)
    best = {}
    for place, same in candidates.items():
        chosen = {line["policy"] for line in same if line["chosen_on_validation"]}
        fair = [line for line in same if line["chosen_on_validation"] or line["policy"] not in chosen]
        best[place] = max(fair, key=lambda line: line[measure])
    return best


def smallest_budgets(lines: Iterable[Mapping], tolerance: float = 0.01) -> dict[tuple, float | None]:
    """The smallest budget at which each configuration still answers as the full cache does.

    Args:
        lines: of :func:`summarise`, with the full cache's among them.
        tolerance: how far below the full cache's accuracy the lower end of the interval may lie.

    Returns:
        By ``(task, policy, allocation, evicted, sinks, recent, window, trigger)`` the smallest budget at and above
        which all measured ones hold, or None. Tasks without a full cache are left out.
    """
    lines = list(lines)
    full = {line["task"]: line["accuracy"] for line in lines if line["policy"] == FULL}
    configurations: dict[tuple, list] = {}
    for line in lines:
        if line["task"] in full and line["policy"] != FULL:
            place = (line["task"], *(line[name] for name in CONFIGURATION if name != "budget"))
            configurations.setdefault(place, []).append(line)
    found: dict[tuple, float | None] = {}
    for place, same in configurations.items():
        found[place] = None
        for line in sorted(same, key=lambda line: -line["budget"]):
            if line["low"] < full[place[0]] - tolerance:
                break
            found[place] = line["budget"]
    return found
