"""The page: one HTML file with everything in it, that opens without a network.

No text of results is ever part of markup or script: it stands in one JSON block, from which scripts take it as text,
and a content security policy lets only the page's own scripts run, each known by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

from kv_gym.budgets import format_budget
from kv_gym.errors import UserError
from kv_gym.evaluation.report import charts
from kv_gym.evaluation.report.charts import COLOURS, chart_styles
from kv_gym.evaluation.report.results import Results
from kv_gym.evaluation.report.summaries import MEASURES, summaries
from kv_gym.files import atomic_write, make_folder
from kv_gym.markdown import one_line

FOLDER = Path(__file__).with_name("web")
SCRIPTS = ("charts.js", "tables.js", "tokens.js", "page.js")
LIMIT = 5_000_000  # bytes of a page
# beside the colours of configurations: name -> (in light, in dark)
_SURFACES = {
    "paper": ("#f6f7f9", "#101317"), "card": ("#ffffff", "#181c22"), "stripe": ("#fafbfc", "#1b2027"),
    "hover": ("#eef3f8", "#232a33"), "ink": COLOURS["ink"], "muted": ("#59626e", "#a2acb8"),
    "faint": ("#8d96a1", "#727d8a"), "line": ("#dfe3e8", "#2c333c"), "dark": ("0", "1"),
}  # fmt: skip


def write_page(results: Results, file: str | Path, title: str = "kv_gym report", tokens: dict | None = None) -> Path:
    """Write the interactive page.

    Args:
        results: rows and ablations, as :func:`~kv_gym.evaluation.report.results.read_results` gives them.
        file: HTML to write.
        title: of the page.
        tokens: one context's tokens and ranks, of :func:`~kv_gym.evaluation.report.token_view.token_view`.

    Raises:
        UserError: the extra `report` is not installed, there is nothing to show, or the page would exceed 5 MB.
    """
    file = Path(file)
    charts.altair()
    if not (results.rows or results.ablations or tokens):
        raise UserError("there is nothing to report: no row, no ablation, no token view; give results that hold some")
    page = _page(_content(results, title, tokens))
    if len(page) > LIMIT:
        raise UserError(
            f"the page would take {len(page) / 1e6:.1f} MB and {LIMIT / 1e6:.0f} MB is most; report fewer files, or "
            "name fewer policies or a shorter context for the token view"
        )
    make_folder(file.parent)
    with atomic_write(file) as part:
        part.write_bytes(page)
    return file


def _content(results: Results, title: str, tokens: dict | None) -> dict[str, Any]:
    """The data of the page's scripts."""
    found = summaries(results.rows)
    styles = chart_styles(found)
    shown = [p["budget"] for p in found if p["role"] != "full"]
    specs: dict[str, Any] = {}
    for measure in MEASURES:
        if any(p[measure] is not None for p in found):
            specs[measure] = charts.quality(measure, styles, _property, shown)
    for cost in charts.COSTS:
        if any(p[cost] is not None and p["accuracy"] is not None for p in found):
            specs[cost] = charts.frontier(cost, styles, _property)
    if any(p["slots"] for p in found):
        specs["slots"] = charts.heads("slots")
    if any(p["head_gain"] for p in found):
        gains = (value for p in found for layer in p["head_gain"] or () for value in layer if value is not None)
        specs["gain"] = charts.heads("gain", max((abs(value) for value in gains), default=0.0) or 1.0)
    if any(p["parts"] for p in found):
        specs["parts"] = charts.parts(styles, _property)
    ablations = [_variant(row) for row in results.ablations]
    if ablations:
        specs["ablation"] = charts.ablation(_property)
    for point in found:
        point |= {name: _short(point[name]) for name in ("slots", "head_gain")}
        del point["head_utility"]  # the gain is what is drawn
    tasks = list(dict.fromkeys(one_line(row.get("task") or "") for row in results.rows))
    return {
        "title": title, "tasks": tasks, "points": found, "specs": specs, "ablations": ablations,
        "styles": {label: vars(style) for label, style in styles.items()},
        "commands": results.commands, "versions": results.versions, "tokens": tokens,
    }  # fmt: skip


def _variant(row: dict) -> dict[str, Any]:
    given = row.get("interval")
    half = given if isinstance(given, int | float) and row.get("accuracy") is not None else None
    low, high = given if isinstance(given, list) else (None, None)
    if half is not None:
        low, high = row["accuracy"] - half, row["accuracy"] + half
    known = {name: row.get(name) for name in ("variant", "budget", "accuracy", "difference")}
    known["variant"] = one_line(row["variant"])
    return known | {"low": low, "high": high, "budget_text": format_budget(row["budget"])}


def _short(grid: Sequence[Sequence[float | None]] | None) -> list[list[float | None]] | None:
    """To five digits: pages of large models hold many of them."""
    if grid is None:
        return None
    return [[None if value is None else float(f"{value:.5g}") for value in layer] for layer in grid]


def _page(content: dict[str, Any]) -> bytes:
    scripts = [_library(), *((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)]
    # `<` never stands in the block, so that nothing in it can end it
    data = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    text = Template((FOLDER / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(content["title"]),
        policy=_security(scripts),
        style=_properties() + (FOLDER / "page.css").read_text(encoding="utf-8"),
        data=data,
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )
    return text.encode()


@cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script, of the version that the specifications are written for."""
    alt = charts.altair()
    import vl_convert

    version = re.match(r"v?(\d+\.\d+)", alt.SCHEMA_VERSION)
    assert version is not None
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", version[1])
    if re.search(r"<!--|</?script", script, re.IGNORECASE):
        raise UserError("this version of vl-convert-python cannot stand in a page; install the one of constraints.txt")
    return script


def _security(scripts: Iterable[str]) -> str:
    """A content security policy: these scripts, styles of the page's own, nothing from anywhere else."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"


def _property(colour: str) -> str:
    return f"var(--c-{colour})"


def _properties() -> str:
    """Colours as custom properties: light, dark where the system or the reader wants it, and light on paper."""
    named = _SURFACES | {f"c-{name}": pair for name, pair in COLOURS.items()}
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in named.items()) for i in (0, 1))
    return (
        f":root{{{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}\n"
        f"@media screen{{:root[data-theme=dark]{{{dark}}}}}\n"
    )
