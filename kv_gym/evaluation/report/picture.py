"""The page's charts as PNG, for README files and Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kv_gym.evaluation.report import charts
from kv_gym.evaluation.report.look import COLOURS, Look, looks
from kv_gym.evaluation.report.points import points
from kv_gym.files import atomic_write

SCALE = 2  # pixels for each of the picture's own
WIDTH = 420
MANY = 14  # arms; of more the main ones are drawn


def picture(rows: Sequence[Mapping], file: str | Path, measures: Iterable[str] = ("accuracy", "utility_kept")) -> None:
    """Measures against the budget side by side, a line for each arm, written as PNG.

    Args:
        rows: results of one task.
        file: PNG to write.
        measures: accuracy, nll, utility_kept; those that no row has are left out.

    Raises:
        UserError: the extra `report` is not installed.
    """
    quality_picture(points(rows), file, measures)


def quality_picture(of_task: Sequence[dict], file: str | Path, measures: Iterable[str]) -> None:
    """The same from the points of one task."""
    drawn, seen = _drawn(of_task)
    budgets = [point["budget"] for point in drawn if point["role"] != "full"]
    shown = [name for name in measures if any(point[name] is not None for point in drawn)]
    write_png([charts.quality(name, seen, light, budgets, legend=True) for name in shown], drawn, file)


def frontier_picture(of_task: Sequence[dict], file: str | Path) -> bool:
    """Accuracy against bytes and milliseconds; False, and nothing written, where neither is known."""
    drawn, seen = _drawn(of_task)
    known = [p for p in drawn if p["accuracy"] is not None]
    panels = [
        charts.frontier(cost, seen, light, legend=True)
        for cost in charts.COSTS
        if any(p[cost] is not None for p in known)
    ]
    if panels:
        write_png(panels, drawn, file)
    return bool(panels)


def write_png(panels: Sequence[dict[str, Any]], data: Sequence[dict], file: str | Path) -> None:
    """Draw charts of the same points side by side with one legend.

    Args:
        panels: as :mod:`kv_gym.evaluation.report.charts` makes them.
        data: the points.
        file: PNG to write.
    """
    charts.altair()
    import vl_convert

    kept = [{name: panel[name] for name in panel if name not in ("config", "$schema", "params")} for panel in panels]
    whole = {name: panels[0][name] for name in ("$schema", "config", "params")} | {
        "datasets": {charts.DATA: data}, "background": "white", "padding": 12,
        "hconcat": [panel | {"width": WIDTH} for panel in kept],
    }  # fmt: skip
    with atomic_write(file) as part:
        part.write_bytes(vl_convert.vegalite_to_png(whole, scale=SCALE))


def light(name: str) -> str:
    """A colour on white paper."""
    return COLOURS[name][0]


def _drawn(of_task: Sequence[dict]) -> tuple[list[dict], dict[str, Look]]:
    seen = looks(of_task)
    if len(seen) > MANY:
        seen = {arm: look for arm, look in seen.items() if look.prime}
    return [point for point in of_task if point["arm"] in seen], seen
