"""A readable report of result files: one table in Markdown, one picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kv_gym.atomic import whole_file
from kv_gym.budgets import format_budget

COLUMNS = ("policy", "budget", "utility kept", "accuracy", "NLL", "cache bytes")


def merged(*results: dict) -> list[dict]:
    """Rows of several results; those of one policy, budget, allocation, fate of evicted pairs and task made one.

    Replay has the utility of such a row and live decoding the rest.
    """
    rows: dict[tuple, dict] = {}
    for row in (row for result in results for row in result["rows"]):
        known = {name: value for name, value in row.items() if value is not None}
        place = row["policy"], row["budget"], _rule(row), row.get("task", "")
        rows.setdefault(place, {}).update(known)
    return list(rows.values())


def table(rows: Iterable[dict]) -> list[tuple[str, ...]]:
    """Cells of `COLUMNS`, the full cache first, then by budget from large to small and accuracy (or utility)."""
    rows = list(rows)
    several = len({row.get("task", "") for row in rows}) > 1
    shared = len({_rule(row) for row in rows if row["policy"] != "full_cache"}) <= 1

    def order(row: dict):
        worth = row.get("accuracy", row.get("utility_kept", 0.0))
        return row["policy"] != "full_cache", row.get("task", ""), -row["budget"], -worth

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


def _rule(row: dict) -> str:
    rule, evicted = row.get("allocation") or "uniform", row.get("evicted") or "drop"
    return rule if evicted == "drop" else f"{rule}, {evicted}"


def _label(row: dict, shared: bool) -> str:
    """A row's policy, and its allocation and what becomes of evicted pairs, unless all rows share them."""
    return row["policy"] if shared or row["policy"] == "full_cache" else f"{row['policy']}, {_rule(row)}"


def markdown(rows: Iterable[dict]) -> str:
    """The table in Markdown."""
    lines = [COLUMNS, ("---", "---:", "---:", "---:", "---:", "---:"), *table(rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def picture(rows: list[dict], file: Path) -> None:
    """Accuracy and utility kept against the budget, a line for each policy, written as PNG."""
    from matplotlib.figure import Figure

    labels = {"accuracy": "questions answered right", "utility_kept": "future attention kept"}
    measures = [(name, label) for name, label in labels.items() if any(row.get(name) is not None for row in rows)]
    figure = Figure(figsize=(5.2 * len(measures) + 1.8, 4), layout="constrained")
    axes = figure.subplots(1, len(measures), squeeze=False)[0]
    shared = len({_rule(row) for row in rows if row["policy"] != "full_cache"}) <= 1
    names = sorted({_label(row, shared) for row in rows} - {"full_cache"})
    styles = [(f"C{i % 10}", "-" if i < 10 else "--", "o^sDvPX*<>hpd8"[i % 14]) for i in range(len(names))]
    for axis, (measure, label) in zip(axes, measures, strict=True):
        for name, (colour, dash, mark) in zip(names, styles, strict=True):
            points: dict[float, list[float]] = {}
            for row in rows:
                if _label(row, shared) == name and row.get(measure) is not None:
                    points.setdefault(row["budget"], []).append(row[measure])
            if points:
                xs = sorted(points)
                ys = [sum(points[x]) / len(points[x]) for x in xs]
                axis.plot(xs, ys, color=colour, linestyle=dash, marker=mark, label=name)
        full = [row[measure] for row in rows if row["policy"] == "full_cache" and row.get(measure) is not None]
        if full:
            axis.axhline(sum(full) / len(full), color="0.6", linestyle=":", label="full cache")
        budgets = sorted({row["budget"] for row in rows if row["policy"] != "full_cache"})
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets, [format_budget(b) for b in budgets], minor=False)
        axis.set(xlabel="budget", ylabel=label, ylim=(-0.02, 1.03))
        axis.grid(alpha=0.3)
    lines = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    figure.legend(list(lines.values()), list(lines), loc="outside right center", fontsize=8, frameon=False)
    with whole_file(file) as part:
        figure.savefig(part, dpi=130, format="png")


def report(results: list[dict], folder: str | Path, title: str = "kv_gym report", notes: str = "") -> Path:
    """Write ``report.md`` and ``report.png`` into `folder` and return the Markdown file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = merged(*results)
    picture(rows, folder / "report.png")
    counts = sorted({row["n"] for result in results for row in result["rows"]})
    commands = "\n".join(f"- `{command}`" for command in dict.fromkeys(result["command"] for result in results))
    versions = ", ".join(f"{name} {version}" for name, version in results[-1]["versions"].items())
    rules = ", ".join(f"`{rule}`" for rule in sorted({_rule(row) for row in rows}))
    text = (
        f"# {title}\n\n{markdown(rows)}\n![budgets against quality](report.png)\n\n{notes}\n\n"
        f"Allocation of the slots: {rules}. Utility kept: share of the recorded future attention on kept slots."
        f" Accuracy: greedy exact match of the whole answer, question unseen while compressing."
        f" Cache bytes: all that the compressed cache of one context holds; what stands behind a plus are the weights"
        f" of a learned policy, held once. Rows stand on n = {', '.join(map(str, counts))} contexts or questions.\n\n"
        f"Made by:\n{commands}\n\nWith {versions}.\n"
    )
    with whole_file(folder / "report.md") as part:
        part.write_text(text)
    return folder / "report.md"
