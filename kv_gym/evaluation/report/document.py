"""`kv-gym report`: the page, or a folder with the page, a table in Markdown and pictures."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kv_gym.budgets import budget_key, format_budget
from kv_gym.errors import UserError
from kv_gym.evaluation.report.charts import altair, frontier_picture, quality_picture
from kv_gym.evaluation.report.page import write_page
from kv_gym.evaluation.report.results import Results
from kv_gym.evaluation.report.summaries import MEASURES, summaries
from kv_gym.evaluation.rows import FULL
from kv_gym.files import atomic_write, make_folder, refuse_address
from kv_gym.markdown import one_line, pipe_table

COLUMNS = ("policy", "budget", "utility kept", "accuracy", "NLL", "cache bytes")
_OTHERS = {".csv", ".htm", ".json", ".jsonl", ".md", ".pdf", ".png", ".svg", ".txt"}  # no names of folders


def report(
    results: Results | Iterable[str | Path | Mapping[str, Any]],
    out: str | Path,
    title: str = "kv_gym report",
    notes: str = "",
    tokens: dict | None = None,
) -> Path:
    """Write results as a page, or as a folder with pictures too.

    The page is one file that needs no network.

    Args:
        results: files of results (``.json``, ``.jsonl``), or folders of them. In Python, what
            :func:`kv_gym.evaluation.evaluate` returns stands among them, or the whole is what
            :func:`~kv_gym.evaluation.report.results.read_results` returns.
        out: file that ends in ``.html`` for the page alone, or folder for ``report.md``, ``report.html`` and pictures:
            for each task one of quality over budget and one of what it costs.
        title: of the page and of the Markdown file.
        notes: Markdown that follows the table.
        tokens: of :func:`~kv_gym.evaluation.report.token_view.token_view`, for the page.

    Returns:
        The page, or the Markdown file of a folder.

    Raises:
        UserError: the extra `report` is not installed, a result cannot be read, there is nothing to report, or the page
            would exceed 5 MB.
    """
    altair()
    refuse_address(out)
    out = Path(out)
    if not isinstance(results, Results):
        results = _collect(results)
    if out.suffix == ".html":
        return write_page(results, out, title, tokens)
    if out.suffix in _OTHERS and not out.is_dir():
        raise UserError(f"a report is no {out.suffix} file; name one that ends in .html, or a folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder, or a file that ends in .html")
    make_folder(out)
    write_page(results, out / "report.html", title, tokens)
    text = f"# {_literal(title)}\n\n{_table_and_pictures(results, out)}{notes}\n\n{_origin(results)}"
    with atomic_write(out / "report.md") as part:
        part.write_text(text, encoding="utf-8")
    return out / "report.md"


def _collect(given: Any) -> Results:
    """Results in files, and those that stand in memory."""
    results = Results()
    for number, each in enumerate([given] if isinstance(given, str | Path | Mapping) else given, 1):
        if isinstance(each, str | Path):
            results.read(each)
        elif isinstance(each, Mapping) and isinstance(each.get("rows"), list):
            results.add(each, f"result {number}")
        else:
            raise UserError(
                f"result {number} is {type(each).__name__}; expected a file or folder of results, or what evaluate() "
                "returns"
            )
    return results


def _table_and_pictures(results: Results, folder: Path) -> str:
    """Table and pictures in Markdown; the pictures are written."""
    points = summaries(results.rows)
    if not points:
        return ""
    slots = [point for point in points if point["hit_rate"] is None]
    tables = [markdown(map(_row, slots))] if slots else []
    text = "\n".join([*tables, *_hit_rates([point for point in points if point["hit_rate"] is not None])])
    tasks = list(dict.fromkeys(point["task"] for point in points))
    for number, task in enumerate(tasks, 1):
        suffix = f"-{number}" if len(tasks) > 1 else ""
        of_task = [point for point in points if point["task"] == task]
        quality_picture(of_task, folder / f"report{suffix}.png", MEASURES)
        about = _literal(task) or "all"
        text += f"\n![budgets against quality: {about}](report{suffix}.png)\n"
        if frontier_picture(of_task, folder / f"frontier{suffix}.png"):
            text += f"\n![costs against quality: {about}](frontier{suffix}.png)\n"
    return text + "\n"


def _hit_rates(points: Sequence[dict]) -> list[str]:
    """The table of page policies, the best first at every capacity; none without points."""
    if not points:
        return []
    order = sorted(points, key=lambda point: (point["task"], point["budget"], -point["hit_rate"]))
    body = [
        [*(_literal(point[name]) for name in ("task", "configuration")), f"{point['budget']:,}",
         f"{point['hit_rate']:.2%}"]
        for point in order
    ]  # fmt: skip
    return [pipe_table(["requests", "policy", "capacity", "hit rate"], body, left=2) + "\n"]


def _row(point: dict) -> dict:
    """A point as a row of the Markdown table: its label says all that tells it from others."""
    return {
        "policy": point["configuration"], "budget": point["budget"], "task": point["task"],
        "accuracy": point["accuracy"], "nll": point["nll"], "utility_kept": point["utility_kept"],
        "cache_bytes": point["bytes"], "policy_bytes": round(point["weights"] or 0),
    }  # fmt: skip


def _origin(results: Results) -> str:
    rules = ", ".join(_literal(name) for name in sorted({_settings(row) for row in results.rows}))
    counts = ", ".join(map(str, sorted({row["n"] for row in results.rows if row.get("n") is not None})))
    commands = "\n".join(f"    {one_line(command)}" for command in results.commands)  # code, whatever it says
    versions = ", ".join(_literal(f"{name} {version}") for name, version in results.versions.items())
    return (
        f"Allocation of the slots: {rules}. Utility kept: share of the recorded future attention on kept slots."
        f" Hit rate: share of the accesses to pages that the cache held; the budget is its capacity."
        f" Accuracy: greedy exact match of the whole answer, question unseen while compressing."
        f" Cache bytes: all that the compressed cache of one context holds; what stands behind a plus are the weights"
        f" of a learned policy, held once. Rows stand on n = {counts} contexts or questions.\n\n"
        f"Made by:\n\n{commands}\n\nWith {versions}.\n"
    )


def _literal(text: str) -> str:
    """Text of result files as Markdown shows it, on one line."""
    plain = html.escape(one_line(text), quote=False)
    return "".join(f"\\{letter}" if letter in "\\`*[]" else letter for letter in plain)


def merged(*results: dict) -> list[dict]:
    """Rows of several results; those of one policy, budget, allocation, fate of evicted pairs and task made one.

    Replay has the utility of such a row and live decoding the rest.
    """
    rows: dict[tuple, dict] = {}
    for row in (row for result in results for row in result["rows"]):
        known = {name: value for name, value in row.items() if value is not None}
        place = row["policy"], budget_key(row["budget"]), _settings(row), row.get("task", "")
        rows.setdefault(place, {}).update(known)
    return list(rows.values())


def table(rows: Iterable[dict]) -> list[tuple[str, ...]]:
    """Cells of `COLUMNS`, the full cache first, then by budget from large to small and accuracy (or utility)."""
    rows = list(rows)
    several = len({row.get("task", "") for row in rows}) > 1
    shared = len({_settings(row) for row in rows if row["policy"] != FULL}) <= 1

    def order(row: dict):
        quality = next((row[name] for name in ("accuracy", "utility_kept") if row.get(name) is not None), 0.0)
        return row["policy"] != FULL, row.get("task", ""), -row["budget"], -quality

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


def _settings(row: dict) -> str:
    """Who got the slots of a row and what became of evicted pairs, as tables say it."""
    more = [row.get("evicted") or "drop", row.get("select") or "all", f"episodes {row.get('episodes') or 'none'}"]
    usual = ("drop", "all", "episodes none")
    return ", ".join([row.get("allocation") or "uniform", *(name for name in more if name not in usual)])


def _label(row: dict, shared: bool) -> str:
    """A row's policy, and its allocation and what becomes of evicted pairs, unless all rows share them."""
    return row["policy"] if shared or row["policy"] == FULL else f"{row['policy']}, {_settings(row)}"


def markdown(rows: Iterable[dict]) -> str:
    """The table in Markdown; what names say there is no markup."""
    return pipe_table(COLUMNS, [list(map(_literal, line)) for line in table(rows)]) + "\n"
