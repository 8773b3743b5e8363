"""How results look in a notebook: tables of their rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

# what tells rows apart and what was measured; a column is shown where some row has a value for it
_COLUMNS = (
    "policy", "allocation", "evicted", "select", "episodes", "budget", "task", "seed", "accuracy", "nll",
    "utility_kept", "hit_rate", "cache_bytes", "n", "refused",
)  # fmt: skip
_DEFAULTS = {"evicted": "drop", "select": "all", "episodes": "none"}  # not worth a column
_MOST_ROWS = 200


class Result(dict[str, Any]):
    """A result, ``{"rows": [...], ...}``, which a notebook shows as a table below its findings."""

    def _repr_html_(self) -> str:
        verdict = "".join(f"<li>{escape(str(line))}</li>" for line in self.get("verdict", ()))
        return (f"<ul>{verdict}</ul>" if verdict else "") + rows_table(self.get("rows", ()))


class ResultRows(list[dict[str, Any]]):
    """Rows of results, which a notebook shows as a table."""

    def _repr_html_(self) -> str:
        return rows_table(self)


def rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of results as a table in HTML, the first 200 of them."""
    shown = rows[:_MOST_ROWS]
    head = [name for name in _COLUMNS if any(row.get(name, _DEFAULTS.get(name)) != _DEFAULTS.get(name) for row in rows)]
    table = html_table(head, ([_cell(row.get(name)) for name in head] for row in shown))
    more = len(rows) - len(shown)
    return table + (f"<p>and {more:,} more rows</p>" if more else "")


def html_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in HTML; cells are escaped."""
    titles = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in body)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
