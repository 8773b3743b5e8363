"""Summaries of rows: training seeds made one line, with intervals and paired differences.

Rows are those of :class:`kv_gym.evaluation.rows.Row`, one for each configuration, task and training seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean

import numpy as np

from kv_gym.budgets import budget_key
from kv_gym.evaluation.rows import FULL
from kv_gym.evaluation.statistics import (
    Estimate,
    over_contexts,
    over_seeds,
    paired_difference,
    smallest_sufficient_budget,
)

NULLS = ("random", "recency")
CONFIGURATION = (
    "policy", "budget", "allocation", "evicted", "select", "episodes", "sinks", "recent", "window", "trigger",
)  # fmt: skip
_MEANS = ("nll", "slots_read", "tokens_read", "cache_bytes", "policy_bytes", "milliseconds", "n", "questions")


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
            difference = paired_difference(line["rows"], other["rows"])
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
    # Student's t knows nothing of shares; a likelihood has no upper end
    line |= {"low": max(found.low, 0.0), "high": found.high if measure == "nll" else min(found.high, 1.0)}
    line |= {"over": found.over, "chosen_on_validation": bool(first.get("chosen_on_validation")), "rows": rows}
    for name in _MEANS:
        known = [row[name] for row in rows if row.get(name) is not None]
        line[name] = fmean(known) if known else None
    return line


def join_portions(rows: Iterable[Mapping]) -> list[dict]:
    """Rows of portions of one task (``:first=``), made one row for each configuration and training run.

    Args:
        rows: with their contexts; portions share none. What is no sum or mean over contexts is that of the first row.

    Returns:
        Rows in the order of first appearance.
    """
    portions: dict[tuple, list[Mapping]] = {}
    for row in rows:
        portions.setdefault((row["task"], row.get("seed"), *configuration_key(row)), []).append(row)
    return [same[0] if len(same) == 1 else _joined(same) for same in portions.values()]  # type: ignore[misc]


def _joined(rows: list[Mapping]) -> dict:
    first = rows[0]
    contexts = {name: entry for row in rows for name, entry in row["contexts"].items()}
    counts = [row["n"] for row in rows]
    parts: dict[str, dict] = {}
    for name, part in ((name, part) for row in rows for name, part in row["parts"].items()):
        known = parts.setdefault(name, {"questions": 0, "correct": 0})
        parts[name] = {key: known[key] + part[key] for key in known}
    grids = [row["slots"] for row in rows]
    joined = {
        "n": sum(counts),
        "parts": parts,
        "answers": {name: each for row in rows for name, each in (row["answers"] or {}).items()} or None,
        "slots": None if None in grids else np.average(grids, axis=0, weights=counts).tolist(),
    }
    for name in ("cache_bytes", "milliseconds"):
        joined[name] = float(np.average([row[name] for row in rows], weights=counts))
    return {**first, **joined, **_answered(contexts)}


def regrade(rows: Iterable[Mapping], first_token: bool = False, where_full_is_right: bool = False) -> list[dict]:
    """Rows whose ``accuracy`` and ``contexts`` count other answers, made of those that rows list one by one.

    Args:
        rows: of any number of tasks; those without listed answers are left out.
        first_token: an answer counts when its first token is right.
        where_full_is_right: only questions count that the full cache of the same task answers wholly; tasks without a
            full cache are left out.
    """
    rows = [row for row in rows if row.get("answers")]
    full = {row["task"]: row["answers"] for row in rows if row["policy"] == FULL}
    if where_full_is_right:
        rows = [row for row in rows if row["task"] in full]
    found = []
    for row in rows:
        contexts = {}
        for name, answers in row["answers"].items():
            kept = answers
            if where_full_is_right:
                kept = [
                    answer for answer, (grade, _) in zip(answers, full[row["task"]][name], strict=True) if grade == 2
                ]
            right = sum(grade >= (1 if first_token else 2) for grade, _ in kept)
            contexts[name] = [right, len(kept), sum(nll for _, nll in kept)]
        found.append({**row, **_answered(contexts)})
    return found


def _answered(contexts: Mapping[str, list]) -> dict:
    """The fields of a row that its contexts add up to."""
    questions = sum(entry[1] for entry in contexts.values())
    losses = [entry[2] for entry in contexts.values()]
    return {
        "contexts": contexts,
        "questions": questions,
        "accuracy": sum(entry[0] for entry in contexts.values()) / questions if questions else None,
        "nll": None if None in losses or not questions else sum(losses) / questions,
    }


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
        By task and the names of :data:`CONFIGURATION` but the budget, the smallest budget at and above which all
        measured ones hold, or None. Tasks without a full cache are left out.
    """
    lines = list(lines)
    full = {line["task"]: line["accuracy"] for line in lines if line["policy"] == FULL}
    configurations: dict[tuple, list] = {}
    for line in lines:
        if line["task"] in full and line["policy"] != FULL:
            place = (line["task"], *(line[name] for name in CONFIGURATION if name != "budget"))
            configurations.setdefault(place, []).append(line)
    return {
        key: smallest_sufficient_budget((line["budget"], line["low"] >= full[key[0]] - tolerance) for line in same)
        for key, same in configurations.items()
    }
