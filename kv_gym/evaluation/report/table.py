"""Results as one table in Markdown."""

from __future__ import annotations

import html
from collections.abc import Iterable

from kv_gym.budgets import budget_key, format_budget
from kv_gym.evaluation.summary import FULL
from kv_gym.markdown import pipe_table

COLUMNS = ("policy", "budget", "utility kept", "accuracy", "NLL", "cache bytes")


def merged(*results: dict) -> list[dict]:
    """Rows of several results; those of one policy, budget, allocation, fate of evicted pairs and task made one.

    Replay has the utility of such a row and live decoding the rest.
    """
    rows: dict[tuple, dict] = {}
    for row in (row for result in results for row in result["rows"]):
        known = {name: value for name, value in row.items() if value is not None}
        place = row["policy"], budget_key(row["budget"]), rule(row), row.get("task", "")
        rows.setdefault(place, {}).update(known)
    return list(rows.values())


def table(rows: Iterable[dict]) -> list[tuple[str, ...]]:
    """Cells of `COLUMNS`, the full cache first, then by budget from large to small and accuracy (or utility)."""
    rows = list(rows)
    several = len({row.get("task", "") for row in rows}) > 1
    shared = len({rule(row) for row in rows if row["policy"] != FULL}) <= 1

    def order(row: dict):
        worth = next((row[name] for name in ("accuracy", "utility_kept") if row.get(name) is not None), 0.0)
        return row["policy"] != FULL, row.get("task", ""), -row["budget"], -worth

    def cell(row: dict, name: str, form: str) -> str:
        return form.format(row[name]) if row.get(name) is not None else ""

    return [
        (
            _label(row, shared) + (f" ({row['task']})" if several else ""),
            format_budget(row["budget"]),
            cell(row, "utility_kept", "{:.3f}"),
            cell(row, "accuracy", "{:.1%}"),
            cell(row, "nll", "{:.3f}"),
            cell(row, "cache_bytes", "{:,.0f}") + (f" + {row['policy_bytes']:,}" if row.get("policy_bytes") else ""),
        )
        for row in sorted(rows, key=order)
    ]


def rule(row: dict) -> str:
    """Who got the slots of a row and what became of evicted pairs, as tables say it."""
    allocation, evicted = row.get("allocation") or "uniform", row.get("evicted") or "drop"
    return allocation if evicted == "drop" else f"{allocation}, {evicted}"


def _label(row: dict, shared: bool) -> str:
    """A row's policy, and its allocation and what becomes of evicted pairs, unless all rows share them."""
    return row["policy"] if shared or row["policy"] == FULL else f"{row['policy']}, {rule(row)}"


def markdown(rows: Iterable[dict]) -> str:
    """The table in Markdown; what names say there is no markup."""
    told = [[html.escape(cell, quote=False) for cell in line] for line in table(rows)]
    return pipe_table(COLUMNS, told) + "\n"
