"""Rows of decision value as a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kv_gym.budgets import format_budget
from kv_gym.evaluation.decision_value import NOT_DECISIVE
from kv_gym.markdown import pipe_table


def markdown(rows: Iterable[dict]) -> str:
    """The rows as a table in Markdown, by budget from large to small and then by gain; intervals behind `+-`."""
    rows = sorted(rows, key=lambda row: (row["task"], -row["budget"], -row["gain_per_slot"]))
    several = len({row["task"] for row in rows}) > 1
    forms = {
        "gain_per_slot": ("gain per slot", "{:.3g}"),
        "gain": ("gain", "{:.1%}"),
        "changed_slots": ("slots changed", "{:.1%}"),
        "changed_heads": ("heads changed", "{:.1%}"),
        "changed_contexts": ("contexts changed", "{:.0%}"),
        "output_error_change": ("output error, change", "{:.1%}"),
        "regret": ("regret", "{:.1%}"),
    }
    head = ["policy", "allocation", "budget", *(name for name, _ in forms.values()), "(Spearman)", "(AUC)", "n"]
    body = []
    for row in rows:
        cells = [_cell(row, name, form) for name, (_, form) in forms.items()]
        beside = [_cell(row["not_decisive"], name, "{:.3f}") for name in NOT_DECISIVE]
        name = f"{row['policy']} ({row['task']})" if several else row["policy"]
        body.append([name, row["allocation"], format_budget(row["budget"]), *cells, *beside, str(row["n"])])
    against = ", ".join(sorted({f"{row['baseline']} ({row['baseline_allocation']})" for row in rows}))
    return (
        pipe_table(head, body, 2)
        + f"\n\nAgainst the cut of {against} in the same contexts: mean over contexts +- half a 95 % interval. Gain and"
        " regret are shares of the whole future attention. Spearman and AUC say how well importance is predicted, not"
        " what the action is worth: no ground to choose by.\n"
    )


def _cell(row: Mapping, name: str, form: str) -> str:
    if row[name] is None:
        return ""
    half = row[f"{name}_interval"]
    return form.format(row[name]) + (f" +- {form.format(half)}" if half is not None else "")
