"""Charts: how configurations look, Vega-Lite specifications for page and pictures, and the pictures as PNG.

The hues are those of Okabe and Ito (Color Universal Design, 2008), which people with any kind of colour vision tell
apart; marks and dashes differ as well, so that colour is never the only difference. A specification names its data and
holds none: the page gives it the summaries that are selected, a picture all of them. Colours are custom properties of
the page, or fixed ones for a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from kv_gym.errors import UserError
from kv_gym.evaluation.report.summaries import summaries
from kv_gym.files import atomic_write

DATA = "points"
TITLES = {
    "accuracy": "questions answered right",
    "nll": "NLL of the right answer, nats per token",
    "utility_kept": "future attention kept",
    "hit_rate": "accesses that the cache held",
}
COSTS = {"total_bytes": "bytes of one context's cache and of the policy", "milliseconds": "CPU milliseconds a context"}
# 1/8 rather than 0.125, and slots as they are
_BUDGET = (
    "datum.value >= 1 ? format(datum.value, ',') :"
    " abs(1 / datum.value - round(1 / datum.value)) < 0.001 ? '1/' + round(1 / datum.value) :"
    " format(datum.value, '.3~')"
)
Colour = Callable[[str], str]
# name -> (in light, in dark); the page's style sheet is given these as custom properties
COLOURS = {
    "blue": ("#0072b2", "#4cb2ee"),
    "vermilion": ("#d55e00", "#ff8a3c"),
    "green": ("#00805e", "#2fd0a2"),
    "purple": ("#a0498a", "#e79fd0"),
    "orange": ("#b97f00", "#efc23a"),
    "sky": ("#3a8fbf", "#8fd0f5"),
    "slate": ("#6b7a8f", "#95a3b8"),
    "grey": ("#a3a3a3", "#777777"),
    "ink": ("#1b1f24", "#e8eaed"),
}
_LEARNED = ("blue", "vermilion", "green", "purple")
_KNOWN = ("orange", "sky", "purple", "vermilion", "green", "blue")
_MARKS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "triangle-right", "triangle-left")
_DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])
ROLES = ("learned", "heuristic", "null", "oracle", "full")
STRONG = 5  # so many heuristics have a hue of their own, the best ones
SCALE = 2  # pixels for each of the picture's own
WIDTH = 420
MANY = 14  # configurations; of more the main ones are drawn


@dataclass(frozen=True)
class Style:
    """How a configuration is drawn.

    Attributes:
        role: what it is compared as.
        colour: a name in :data:`COLOURS`, the same for all settings of a policy.
        mark: a Vega symbol.
        dash: lengths of strokes and gaps in pixels.
        prime: shown at first: bounds, null hypotheses and learned policies with their best two settings, and the best
            heuristics, each with the setting that was chosen on validation contexts or, where none was, the best one.
    """

    role: str
    colour: str
    mark: str
    dash: list[int]
    prime: bool


def chart_styles(points: Sequence[dict]) -> dict[str, Style]:
    """The style of every configuration in the legend's order: learned ones first, then by accuracy (or utility).

    Args:
        points: as :func:`kv_gym.evaluation.report.summaries.summaries` makes them.

    Returns:
        Styles by the label of the configuration.
    """
    by_label: dict[str, list[dict]] = {}
    for point in points:
        by_label.setdefault(point["configuration"], []).append(point)
    first = {label: same[0] for label, same in by_label.items()}
    order = sorted(first, key=lambda label: (ROLES.index(first[label]["role"]), -_quality(by_label[label]), label))
    by_policy: dict[tuple[str, str], list[str]] = {}
    for label in order:
        by_policy.setdefault((first[label]["role"], first[label]["policy"]), []).append(label)
    styles: dict[str, Style] = {}
    counts = dict.fromkeys(ROLES, 0)
    for (role, _), labels in by_policy.items():
        number = counts[role]
        counts[role] += 1
        colour = _colour(role, number, {style.colour for style in styles.values()})
        chosen = [label for label in labels if any(point["chosen"] for point in by_label[label])] or labels[:1]
        for place, label in enumerate(labels):
            dash = _DASHES[(place + number // len(_LEARNED)) % len(_DASHES)] if role != "full" else [2, 3]
            shown = label in chosen and number < STRONG if role == "heuristic" else place < 2
            styles[label] = Style(role, colour, _MARKS[len(styles) % len(_MARKS)], dash, shown)
    return {label: styles[label] for label in order}


def _colour(role: str, number: int, taken: set[str]) -> str:
    if role == "learned":
        return _LEARNED[number % len(_LEARNED)]
    if role == "heuristic":
        free = [colour for colour in _KNOWN if colour not in taken]
        return free[0] if free and number < STRONG else "slate"
    return "grey" if role == "null" else "ink"


def _quality(by_configuration: Sequence[dict]) -> float:
    for measure in ("accuracy", "utility_kept", "hit_rate"):
        if values := [point[measure] for point in by_configuration if point[measure] is not None]:
            return fmean(values)
    return 0.0


def altair():
    """The plotting library.

    Raises:
        UserError: the extra `report` is not installed.
    """
    try:
        import altair
        import vl_convert  # noqa: F401
    except ImportError as missing:
        raise UserError(
            f"a report's charts need {missing.name}, which is not installed: pip install 'kv-gym[report]'"
        ) from None
    return altair


def quality(
    measure: str, styles: Mapping[str, Style], colour: Colour, budgets: Iterable[float], legend: bool = False
) -> dict[str, Any]:
    """A measure over the budget: a line per configuration, its 95 % interval, the full cache as a dotted line.

    Args:
        measure: accuracy, nll, utility_kept or hit_rate, whose budget is the capacity of a cache of pages.
        styles: of the configurations, in the legend's order.
        colour: a colour as the chart's reader takes it, by its name.
        budgets: that the axis names.
        legend: beside the chart; the page has one of its own for all charts.
    """
    alt = altair()
    fields = alt.Chart(alt.NamedData(DATA)).transform_filter(f"isValid(datum.{measure})")
    kept = fields.transform_filter("datum.role != 'full'")
    x = alt.X(
        "budget:Q",
        title="capacity, pages or bytes" if measure == "hit_rate" else "budget, share of the tokens",
        scale=alt.Scale(type="log", base=2, nice=False, padding=12),
        axis=alt.Axis(labelExpr=_BUDGET, grid=False, values=sorted(set(budgets)), labelOverlap=True),
    )
    top = {} if measure == "nll" else {"domainMin": 0}
    y = alt.Y(f"{measure}:Q", title=TITLES[measure], scale=alt.Scale(zero=False, nice=True, **top))
    if measure in ("accuracy", "hit_rate"):
        y = y.axis(format=".0%")
    encodings = _encodings(alt, styles, colour, legend)
    tips = _tips(alt, measure)
    ends = {"y": alt.Y(f"{measure}_low:Q"), "y2": alt.Y2(f"{measure}_high:Q")}
    band = kept.transform_filter("datum.role == 'learned'").mark_area(opacity=0.16).encode(
        x=x, color=encodings["color"], **ends
    )  # fmt: skip
    whisker = kept.mark_rule().encode(x=x, color=encodings["color"], opacity=_faded(alt, 0.45, 0.08), **ends)
    drawn = {"x": x, "y": y, "color": encodings["color"], "strokeDash": encodings["dash"], "opacity": _faded(alt)}
    lines = [
        kept.transform_filter(f"datum.role {sign} 'learned'").mark_line(strokeWidth=width).encode(**drawn)
        for sign, width in (("!=", 1.5), ("==", 3))
    ]
    mark = kept.mark_point(filled=True, size=48).encode(
        x=x, y=y, color=encodings["color"], shape=encodings["shape"], tooltip=tips, opacity=_faded(alt)
    )
    full = fields.transform_filter("datum.role == 'full'").mark_rule(strokeDash=[2, 3], strokeWidth=1.5).encode(
        y=y, color=alt.value(colour("ink")), tooltip=tips
    )  # fmt: skip
    return _whole(alt.layer(band, full, whisker, *lines, mark), alt)


def frontier(cost: str, styles: Mapping[str, Style], colour: Colour, legend: bool = False) -> dict[str, Any]:
    """Accuracy against cost: a mark per configuration and budget, a staircase through those that nothing beats."""
    alt = altair()
    usable = alt.Chart(alt.NamedData(DATA)).transform_filter(f"isValid(datum.{cost}) && isValid(datum.accuracy)")
    x = alt.X(
        f"{cost}:Q", title=COSTS[cost], scale=alt.Scale(type="log", nice=False, padding=12),
        axis=alt.Axis(format="~s", grid=False, labelOverlap=True),
    )  # fmt: skip
    y = alt.Y("accuracy:Q", title=TITLES["accuracy"], axis=alt.Axis(format=".0%"), scale=alt.Scale(domainMin=0))
    encodings = _encodings(alt, styles, colour, legend)
    stairs = usable.transform_filter(f"datum.front_{cost}").mark_line(
        interpolate="step-after", strokeWidth=6, opacity=0.25
    ).encode(x=x, y=y, color=alt.value(colour("ink")))  # fmt: skip
    ends = {"y": alt.Y("accuracy_low:Q"), "y2": alt.Y2("accuracy_high:Q")}
    whisker = usable.mark_rule().encode(x=x, color=encodings["color"], opacity=_faded(alt, 0.4, 0.05), **ends)
    mark = usable.mark_point(filled=True).encode(
        x=x, y=y, color=encodings["color"], shape=encodings["shape"], opacity=_faded(alt),
        tooltip=_tips(alt, "accuracy", cost), size=alt.condition(f"datum.front_{cost}", alt.value(110), alt.value(40)),
    )  # fmt: skip
    return _whole(alt.layer(stairs, whisker, mark), alt)


def heads(value: str, farthest: float = 1.0) -> dict[str, Any]:
    """A field of layers and heads: ``slots`` that each holds, or ``gain`` in utility over the best heuristic.

    Args:
        value: slots or gain.
        farthest: from zero that any gain lies; the same for all selections, so that colours can be compared.
    """
    alt = altair()
    if value == "slots":
        shade = alt.Color(
            "slots:Q", title="slots", scale=alt.Scale(scheme="viridis", domainMin=0), legend=alt.Legend(format=",.0~f")
        )
    else:
        shade = alt.Color(
            "gain:Q",
            title="gain",
            scale=alt.Scale(scheme="blueorange", domain=[-farthest, farthest]),
            legend=alt.Legend(format="+.2~f"),
        )
    chart = alt.Chart(alt.NamedData("cells")).mark_rect().encode(
        x=alt.X("head:O", title="KV head", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        y=alt.Y("layer:O", title="layer", axis=alt.Axis(labelOverlap=True)),
        color=shade,
        tooltip=[alt.Tooltip("layer:O"), alt.Tooltip("head:O"), alt.Tooltip(f"{value}:Q", format=",.4~f")],
    )  # fmt: skip
    return _whole(chart, alt)


def parts(styles: Mapping[str, Style], colour: Colour) -> dict[str, Any]:
    """Accuracy by part of a context: turns of a dialogue, evictions so far."""
    alt = altair()
    encodings = _encodings(alt, styles, colour)
    shared = alt.Chart(alt.NamedData("parts")).encode(
        x=alt.X("part:N", title=None, sort=None, axis=alt.Axis(labelAngle=-35, labelOverlap=True)),
        y=alt.Y("accuracy:Q", title=TITLES["accuracy"], axis=alt.Axis(format=".0%"), scale=alt.Scale(domainMin=0)),
        color=encodings["color"],
        opacity=_faded(alt),
    )
    line = shared.mark_line().encode(strokeDash=encodings["dash"])
    tips = [
        alt.Tooltip("configuration:N", title="policy"),
        alt.Tooltip("part:N"),
        alt.Tooltip("accuracy:Q", format=".1%"),
    ]
    return _whole(
        alt.layer(line, shared.mark_point(filled=True, size=48).encode(shape=encodings["shape"], tooltip=tips)), alt
    )


def ablation(colour: Colour) -> dict[str, Any]:
    """What taking one thing away costs: accuracy of each variant with its interval."""
    alt = altair()
    shared = alt.Chart(alt.NamedData("ablations")).encode(
        y=alt.Y("variant:N", title=None, sort=None, axis=alt.Axis(labelLimit=220, grid=True))
    )
    axis = alt.Axis(format=".0%", tickCount=6, labelOverlap=True)
    x = alt.X("accuracy:Q", title=TITLES["accuracy"], axis=axis, scale=alt.Scale(zero=False))
    rule = shared.mark_rule(strokeWidth=2).encode(
        x=alt.X("low:Q", title=TITLES["accuracy"], axis=axis), x2="high:Q", color=alt.value(colour("slate"))
    )
    tips = [alt.Tooltip("variant:N"), alt.Tooltip("budget_text:N", title="budget"),
            alt.Tooltip("accuracy:Q", format=".1%"), alt.Tooltip("difference:Q", format="+.1%")]  # fmt: skip
    mark = shared.mark_point(filled=True, size=80).encode(x=x, color=alt.value(colour("blue")), tooltip=tips)
    return _whole(alt.layer(rule, mark), alt)


def _encodings(alt, styles: Mapping[str, Style], colour: Colour, legend: bool = False) -> dict[str, Any]:
    """Colour, shape and dash of every configuration."""
    configurations = list(styles)
    title: dict[str, Any] = {"title": None} | ({} if legend else {"legend": None})

    def scale(values: list) -> Any:
        return alt.Scale(domain=configurations, range=values)

    return {
        "color": alt.Color(
            "configuration:N", **title, scale=scale([colour(style.colour) for style in styles.values()])
        ),
        "shape": alt.Shape("configuration:N", **title, scale=scale([style.mark for style in styles.values()])),
        "dash": alt.StrokeDash("configuration:N", **title, scale=scale([style.dash for style in styles.values()])),
    }


def _faded(alt, shown: float = 1.0, faded: float = 0.1) -> Any:
    """Less of an configuration while the reader points at another one in the legend."""
    return alt.condition("highlight == '' || highlight == datum.configuration", alt.value(shown), alt.value(faded))


def _tips(alt, measure: str, cost: str = "") -> list:
    fields = [
        alt.Tooltip("configuration:N", title="policy"),
        alt.Tooltip("budget_text:N", title="budget"),
        alt.Tooltip(f"{measure}:Q", format=".3f" if measure in ("nll", "utility_kept") else ".1%"),
        alt.Tooltip(f"{measure}_low:Q", title="95 % from", format=".3f"),
        alt.Tooltip(f"{measure}_high:Q", title="to", format=".3f"),
        alt.Tooltip("runs:Q"),
    ]
    return [*fields, alt.Tooltip(f"{cost}:Q", format=",.4~r")] if cost else fields


def _whole(chart: Any, alt) -> dict[str, Any]:
    """The specification as a page needs it: its width follows the page, and a signal points at a configuration."""
    chart = chart.add_params(alt.param(name="highlight", value="")).properties(width="container", height=300)
    chart = chart.configure_view(stroke=None).configure_axis(labelFontSize=12, titleFontSize=12, titleFontWeight=500)
    chart = chart.configure_legend(symbolOpacity=1, labelLimit=260)
    return chart.to_dict()


def picture(rows: Sequence[Mapping], file: str | Path, measures: Iterable[str] = ("accuracy", "utility_kept")) -> None:
    """Measures against the budget side by side, a line for each configuration, written as PNG.

    Args:
        rows: results of one task.
        file: PNG to write.
        measures: accuracy, nll, utility_kept, hit_rate; those that no row has are left out.

    Raises:
        UserError: the extra `report` is not installed.
    """
    quality_picture(summaries(rows), file, measures)


def quality_picture(of_task: Sequence[dict], file: str | Path, measures: Iterable[str]) -> None:
    """The same from the points of one task."""
    drawn, seen = _drawn(of_task)
    budgets = [point["budget"] for point in drawn if point["role"] != "full"]
    shown = [name for name in measures if any(point[name] is not None for point in drawn)]
    write_png([quality(name, seen, light, budgets, legend=True) for name in shown], drawn, file)


def frontier_picture(of_task: Sequence[dict], file: str | Path) -> bool:
    """Accuracy against bytes and milliseconds; False, and nothing written, where neither is known."""
    drawn, seen = _drawn(of_task)
    known = [p for p in drawn if p["accuracy"] is not None]
    panels = [frontier(cost, seen, light, legend=True) for cost in COSTS if any(p[cost] is not None for p in known)]
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
    altair()
    import vl_convert

    kept = [{name: panel[name] for name in panel if name not in ("config", "$schema", "params")} for panel in panels]
    whole = {name: panels[0][name] for name in ("$schema", "config", "params")} | {
        "datasets": {DATA: data}, "background": "white", "padding": 12,
        "hconcat": [panel | {"width": WIDTH} for panel in kept],
    }  # fmt: skip
    with atomic_write(file) as part:
        part.write_bytes(vl_convert.vegalite_to_png(whole, scale=SCALE))


def light(name: str) -> str:
    """A colour on white paper."""
    return COLOURS[name][0]


def _drawn(of_task: Sequence[dict]) -> tuple[list[dict], dict[str, Style]]:
    seen = chart_styles(of_task)
    if len(seen) > MANY:
        seen = {label: style for label, style in seen.items() if style.prime}
    return [point for point in of_task if point["configuration"] in seen], seen
