"""`kv-gym report`: the page, and in a folder the same as Markdown and pictures."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from kv_gym.errors import UserError
from kv_gym.evaluation.report import charts
from kv_gym.evaluation.report.page import write_page
from kv_gym.evaluation.report.picture import frontier_picture, quality_picture
from kv_gym.evaluation.report.points import points
from kv_gym.evaluation.report.reading import Results
from kv_gym.evaluation.report.table import markdown, rule
from kv_gym.files import atomic_write

_OTHERS = {".csv", ".htm", ".json", ".jsonl", ".md", ".pdf", ".png", ".svg", ".txt"}  # no names of folders


def report(
    results: Results | Sequence[dict],
    out: str | Path,
    title: str = "kv_gym report",
    notes: str = "",
    tokens: dict | None = None,
) -> Path:
    """Write results as a page, or as a folder with pictures too.

    The page is one file that needs no network.

    Args:
        results: files of results (``.json``, ``.jsonl``), or folders of them. In Python, what
            :func:`~kv_gym.evaluation.report.reading.read_results` made of them, or results of
            :func:`kv_gym.evaluation.evaluate`.
        out: file that ends in ``.html`` for the page alone, or folder for ``report.md``, ``report.html`` and pictures:
            for each task one of quality over budget and one of what it costs.
        title: of the page and of the Markdown file.
        notes: Markdown that follows the table.
        tokens: of :func:`~kv_gym.evaluation.report.tokens.token_view`, for the page.

    Returns:
        The page, or the Markdown file of a folder.

    Raises:
        UserError: the extra `report` is not installed, there is nothing to report, or the page would exceed 5 MB.
    """
    charts.altair()
    out = Path(out)
    if not isinstance(results, Results):
        given, results = results, Results()
        for number, data in enumerate(given, 1):
            results.add(data, f"result {number}")
    if out.suffix == ".html":
        return write_page(results, out, title, tokens)
    if out.suffix in _OTHERS and not out.is_dir():
        raise UserError(f"a report is no {out.suffix} file; name one that ends in .html, or a folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder, or a file that ends in .html")
    out.mkdir(parents=True, exist_ok=True)
    write_page(results, out / "report.html", title, tokens)
    text = f"# {_literal(title)}\n\n{_told(results, out)}{notes}\n\n{_origin(results)}"
    with atomic_write(out / "report.md") as part:
        part.write_text(text, encoding="utf-8")
    return out / "report.md"


def _told(results: Results, folder: Path) -> str:
    """Table and pictures in Markdown; the pictures are written."""
    found = points(results.rows)
    if not found:
        return ""
    text = markdown(_row(point) for point in found)
    tasks = list(dict.fromkeys(point["task"] for point in found))
    for number, task in enumerate(tasks, 1):
        suffix = f"-{number}" if len(tasks) > 1 else ""
        of_task = [point for point in found if point["task"] == task]
        quality_picture(of_task, folder / f"report{suffix}.png", ("accuracy", "nll", "utility_kept"))
        about = _literal(task) or "all"
        text += f"\n![budgets against quality: {about}](report{suffix}.png)\n"
        if frontier_picture(of_task, folder / f"frontier{suffix}.png"):
            text += f"\n![costs against quality: {about}](frontier{suffix}.png)\n"
    return text + "\n"


def _row(point: dict) -> dict:
    """A point as a row of the Markdown table: its label says all that tells it from others."""
    return {
        "policy": point["arm"], "budget": point["budget"], "task": point["task"], "accuracy": point["accuracy"],
        "nll": point["nll"], "utility_kept": point["utility_kept"], "cache_bytes": point["bytes"],
        "policy_bytes": round(point["weights"] or 0),
    }  # fmt: skip


def _origin(results: Results) -> str:
    rules = ", ".join(_literal(name) for name in sorted({rule(row) for row in results.rows}))
    counts = ", ".join(map(str, sorted({row["n"] for row in results.rows if row.get("n") is not None})))
    commands = "\n".join(f"    {' '.join(command.split())}" for command in results.commands)  # code, whatever it says
    versions = ", ".join(_literal(f"{name} {version}") for name, version in results.versions.items())
    return (
        f"Allocation of the slots: {rules}. Utility kept: share of the recorded future attention on kept slots."
        f" Accuracy: greedy exact match of the whole answer, question unseen while compressing."
        f" Cache bytes: all that the compressed cache of one context holds; what stands behind a plus are the weights"
        f" of a learned policy, held once. Rows stand on n = {counts} contexts or questions.\n\n"
        f"Made by:\n\n{commands}\n\nWith {versions}.\n"
    )


def _literal(text: str) -> str:
    """Text of result files as Markdown shows it, on one line."""
    plain = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{letter}" if letter in "\\`*[]" else letter for letter in plain)
