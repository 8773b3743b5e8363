"""Summaries: what charts and tables show, one for each configuration and task, with its training runs made one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from kv_gym.budgets import budget_key, format_budget
from kv_gym.evaluation.rows import FULL
from kv_gym.evaluation.summary import NULLS, best_heuristics, configuration_key, smallest_budgets, summarise
from kv_gym.markdown import one_line
from kv_gym.pages.policies.registry import list_page_policies, make_page_policy

MEASURES = ("accuracy", "nll", "utility_kept", "hit_rate")
_NAMES = ("policy", "task", "allocation", "evicted", "select", "episodes", "trigger")
COSTS = ("total_bytes", "milliseconds")
SETTINGS = ("allocation", "evicted", "select", "episodes", "protection", "window", "trigger")
Grid = list[list[float | None]]  # numbers of `[layers][heads]`; None is what is not known


def summaries(rows: Iterable[Mapping]) -> list[dict]:
    """Sum up rows over training runs (:mod:`kv_gym.evaluation.summary`) and say what each point stands for.

    Args:
        rows: as :func:`~kv_gym.evaluation.report.results.read_results` gives them; replay and live rows of one
            configuration make one point.

    Returns:
        One dict per configuration, budget and task. ``configuration`` is its label in charts and tables, ``role`` is
        learned, heuristic, null, oracle or full. Every one of :data:`MEASURES` comes with ``_low`` and ``_high``, the
        ends of its 95 % interval, None where nothing is known of it. ``bytes`` is the cache, ``total_bytes`` with the
        policy's weights; ``slots`` and ``head_gain`` are `[layers][heads]`, the gain being
        utility kept beyond that of ``gain_over``, the best policy at that budget that is neither learned nor an
        oracle. ``difference`` is the accuracy beyond ``against``, the best heuristic, paired over contexts.
        ``smallest`` says whether it is the configuration's smallest budget that keeps the full cache's accuracy.
    """
    usable = [_with_printable_names(row) for row in rows if not row.get("refused")]
    oracles = _oracles()
    lines: dict[tuple, dict[str, dict]] = {}
    for measure in MEASURES:
        measured = [_for_measure(measure, row) for row in usable]
        for part in ([r for r in measured if (_base(r["policy"]) in oracles) == given] for given in (False, True)):
            for line in summarise(part, measure):
                lines.setdefault(_place(line), {})[measure] = line
    named = _distinguishing(lines)
    found = {place: _point(of, named, oracles) for place, of in lines.items()}
    _mark_smallest(found, [of["accuracy"] for of in lines.values() if "accuracy" in of])
    for task in dict.fromkeys(point["task"] for point in found.values()):
        of_task = [point for point in found.values() if point["task"] == task]
        _compare_heads(of_task)
        _mark_frontier(of_task)
    return sorted(found.values(), key=lambda p: (p["task"], p["role"] != "full", p["configuration"], -p["budget"]))


def _with_printable_names(row: Mapping) -> dict:
    """The row with names on one line and without control characters, which tables and the picture library refuse."""
    return dict(row) | {name: one_line(row[name]) for name in _NAMES if row.get(name)}


def _for_measure(measure: str, row: dict) -> dict:
    """The row with a numerator and a denominator of the measure for each context."""
    contexts = row.get("contexts") or {}
    if measure == "nll":
        contexts = {name: [entry[2], entry[1]] for name, entry in contexts.items() if entry[2] is not None}
    elif measure == "utility_kept" and row.get("accuracy") is not None:
        contexts = {}  # they tell of answers
    return row | {"contexts": contexts}


def _oracles() -> set[str]:
    from kv_gym.policies.registry import list_policies, make_policy

    of_slots = {name for name in list_policies() if name != "scorer" and make_policy(name).needs_future}
    return of_slots | {name for name in list_page_policies() if make_page_policy(name).needs_future}


def _base(policy: str) -> str:
    """A policy's name without the settings behind it, as page policies bear them."""
    return policy.partition(":")[0]


def _setting(line: Mapping, name: str) -> str:
    if name == "protection":
        ends = line["sinks"], line["recent"]
        return "" if ends == (None, None) else f"protects {ends[0]} + {ends[1]}"
    if name == "window":
        return "" if line["window"] is None else f"window {line['window']}"
    if name == "episodes":
        return "" if line[name] in (None, "none") else f"episodes {line[name]}"
    return line[name] or ""


def _distinguishing(lines: Mapping[tuple, Mapping[str, dict]]) -> set[str]:
    """Which settings differ among the configurations, so that labels must name them."""
    seen = [next(iter(of.values())) for of in lines.values()]
    seen = [line for line in seen if line["policy"] != FULL]
    return {name for name in SETTINGS if len({_setting(line, name) for line in seen}) > 1}


def _point(of: Mapping[str, dict], named: set[str], oracles: set[str]) -> dict[str, Any]:
    line = of.get("accuracy") or next(iter(of.values()))
    runs = [row for one in of.values() for row in one["rows"]]
    policy = line["policy"]
    learned = line["learned"] and policy != FULL
    if "hit_rate" in of:  # the seeds of bundled page policies are those of what they draw
        learned = _base(policy) not in list_page_policies()
    kind = (
        "full" if policy == FULL else "learned" if learned else "null" if policy in NULLS
        else "oracle" if _base(policy) in oracles else "heuristic"
    )  # fmt: skip
    # a trigger that differs from task to task tells tasks apart, not configurations
    extra = [_setting(line, name) for name in SETTINGS if name in named and name != "trigger"]
    point: dict[str, Any] = {
        "task": line["task"], "policy": policy, "role": kind, "budget": line["budget"],
        "configuration": policy if kind == "full" else ", ".join([policy, *filter(None, extra)]),
        "budget_text": format_budget(line["budget"]), "chosen": line["chosen_on_validation"],
        "runs": max(line["seeds"], max(int(row.get("seeds") or 1) for row in runs)), "n": line["n"],
    } | {name: _setting(line, name) for name in SETTINGS}  # fmt: skip
    for measure in MEASURES:
        point |= _measured(measure, of.get(measure))
    difference = line.get("gain") if "accuracy" in of else None
    for name, key in (("difference", "mean"), ("difference_low", "low"), ("difference_high", "high")):
        point[name] = difference[key] if difference else None
    point["against"] = difference["against"] if difference else None
    for name, source in (("bytes", "cache_bytes"), ("weights", "policy_bytes"), ("milliseconds", "milliseconds")):
        values = [row[source] for row in line["rows"] if row.get(source) is not None]
        point[name] = fmean(values) if values else None
    point["total_bytes"] = None if point["bytes"] is None else point["bytes"] + (point["weights"] or 0)
    point["slots"] = _mean_grid([row["slots"] for row in line["rows"] if row.get("slots")])
    kept = [row["head_utility"] for row in of.get("utility_kept", line)["rows"] if row.get("head_utility")]
    point["head_utility"] = _mean_grid(kept)
    point["parts"] = _parts(line["rows"])
    point["smallest"] = False
    return point


def _measured(measure: str, line: Mapping | None) -> dict[str, float | None]:
    if line is None:
        return {measure: None, f"{measure}_low": None, f"{measure}_high": None}
    first, mean = line["rows"][0], line[measure]
    low, high = line["low"], line["high"]
    given = first.get(f"{measure}_interval")  # half its width, where a row sums up several runs itself
    if given is not None and len(line["rows"]) == 1:
        low, high = given if isinstance(given, list) else (mean - given, mean + given)
    elif len(line["rows"]) == 1 and not first["contexts"]:
        low = high = None
    if low is not None:
        low, high = max(low, 0.0), high if measure == "nll" else min(high, 1.0)
    return {measure: mean, f"{measure}_low": low, f"{measure}_high": high}


def _parts(runs: Sequence[Mapping]) -> list[dict]:
    """Accuracy by part of a context ("turn 3"), all training runs together."""
    sums: dict[str, list[float]] = {}
    for run in runs:
        for name, part in (run.get("parts") or {}).items():
            total = sums.setdefault(one_line(str(name)), [0.0, 0.0])
            total[0] += part["correct"]
            total[1] += part["questions"]
    return [
        {"part": name, "accuracy": correct / questions, "questions": questions}
        for name, (correct, questions) in sums.items()
        if questions
    ]


def _mark_smallest(found: Mapping[tuple, dict], lines: list[dict]) -> None:
    held = smallest_budgets([line | _ends(found[_place(line)]) for line in lines])
    for (task, policy, *settings), budget in held.items():
        if budget is not None:
            point = found[task, policy, budget_key(budget), *settings]
            point["smallest"] = point["role"] != "oracle"


def _place(line: Mapping) -> tuple:
    return line["task"], *configuration_key(line)


def _ends(point: Mapping) -> dict[str, float]:
    known: Callable[[Any], bool] = lambda end: end is not None  # noqa: E731
    return {"low": point["accuracy_low"] if known(point["accuracy_low"]) else point["accuracy"]}


def _compare_heads(of_task: Sequence[dict]) -> None:
    """Say what each head of a point keeps beyond the best heuristic's at the same budget."""
    plain = [p for p in of_task if p["role"] in ("heuristic", "null") and p["head_utility"]]
    candidates = [
        {"task": p["task"], "budget": p["budget"], "policy": p["policy"], "learned": False, "point": p,
         "chosen_on_validation": p["chosen"], "utility_kept": p["utility_kept"] or 0.0}
        for p in plain
    ]  # fmt: skip
    best = best_heuristics(candidates, "utility_kept")
    for point in of_task:
        other = best.get((point["task"], budget_key(point["budget"])))
        point["head_gain"] = _difference(point["head_utility"], other["point"]["head_utility"]) if other else None
        point["gain_over"] = other["point"]["configuration"] if other and point["head_gain"] else None


def _mark_frontier(summaries: Sequence[dict]) -> None:
    """Set ``front_<cost>`` of every point of a task; the full cache takes part, oracles (no accuracy) do not."""
    for cost in COSTS:
        usable = [p for p in summaries if p[cost] is not None and p["accuracy"] is not None]
        ahead = -1.0
        for point in summaries:
            point[f"front_{cost}"] = False
        for point in sorted(usable, key=lambda p: (p[cost], -p["accuracy"])):
            if point["accuracy"] > ahead:
                point[f"front_{cost}"], ahead = True, point["accuracy"]


def _mean_grid(grids: Sequence[Grid]) -> Grid | None:
    """The mean of every head over grids of the first one's shape; None without any."""
    if not grids:
        return None
    same = [grid for grid in grids if _shape(grid) == _shape(grids[0])]
    lines = [list(zip(*layer, strict=True)) for layer in zip(*same, strict=True)]
    return [[_mean([value for value in head if value is not None]) for head in layer] for layer in lines]


def _difference(mine: Grid | None, theirs: Grid | None) -> Grid | None:
    """Head by head, what one has beyond the other; None for grids of different shapes."""
    if mine is None or theirs is None or _shape(mine) != _shape(theirs):
        return None
    return [
        [None if a is None or b is None else a - b for a, b in zip(*layers, strict=True)]
        for layers in zip(mine, theirs, strict=True)
    ]


def _shape(grid: Grid) -> list[int]:
    """How many heads each layer has."""
    return [len(layer) for layer in grid]


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None
