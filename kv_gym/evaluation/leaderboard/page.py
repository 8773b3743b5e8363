"""The page of a leaderboard, made of its rows and of nothing else."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence

from kv_gym.budgets import format_budget
from kv_gym.evaluation.rows import FULL
from kv_gym.evaluation.summary import CONFIGURATION, NULLS, smallest_budgets, summarise
from kv_gym.markdown import pipe_table

_WITHOUT_BUDGET = tuple(name for name in CONFIGURATION if name != "budget")


def page(rows: Iterable[Mapping], title: str = "Benchmark") -> str:
    """A leaderboard's rows as Markdown.

    Args:
        rows: of any number of tasks, replay among them, see :func:`kv_gym.evaluation.leaderboard.leaderboard`.
        title: the heading.

    Returns:
        For each task a table of accuracy at every budget, one of what the configurations cost and gain at the middle
        budget, and one of its parts where it has any; then utility kept in replay, hit rates of page policies, what was
        refused, and where all comes from.
    """
    rows = sorted(rows, key=lambda row: row["task"])
    lines = summarise(rows)
    smallest = smallest_budgets(lines)
    out = [f"# {title}", "", *(_about(rows) if lines else ())]
    for task in dict.fromkeys(line["task"] for line in lines):
        shown = [line for line in lines if line["task"] == task and _is_shown(line, lines)]
        out += ["", f"## {_text(task)}", "", *_overview(shown), "", *_accuracy(shown, smallest)]
        out += ["", *_details(shown), *_parts(shown)]
    out += _utility(rows) + _hit_rates(rows) + _refused(rows) + _origin(rows)
    return "\n".join(out) + "\n"


def accuracy_table(rows: Iterable[Mapping], task: str) -> str:
    """Accuracy at every budget and the smallest budget that is enough, for the rows of one task, as on the page."""
    lines = [line for line in summarise(rows) if line["task"] == task]
    return "\n".join(_accuracy([line for line in lines if _is_shown(line, lines)], smallest_budgets(lines)))


def _about(rows: Sequence[Mapping]) -> list[str]:
    runs = [{row.get("seed") for row in rows if row["policy"] == name} for name in _learned(rows)]
    seeds = max(map(len, runs), default=0)
    trained = f"Learned policies (bold) are means over up to {seeds} training runs. " if seeds else ""
    return [
        "Greedy exact match of the whole answer, in percent. A budget is a share of the tokens, over all layers and "
        "heads of the model. " + trained + "Heuristics have the allocation, protected ends and window with which they "
        "answered most on validation contexts; `random` and `recency` stand there plain, too, and with "
        "protected ends. Intervals are of 95 %: Student's t over training runs for learned policies, a bootstrap over "
        "contexts else. `smallest` is the least budget at and above which the lower end stays within a point of the "
        "full cache."
    ]  # fmt: skip


def _learned(rows: Sequence[Mapping]) -> list[str]:
    return list(dict.fromkeys(row["policy"] for row in rows if row.get("seed") is not None))


def _is_shown(line: Mapping, lines: Sequence[Mapping]) -> bool:
    """Of a heuristic the setting that was chosen for it, where one was; null hypotheses with equal heads, too."""
    if line["learned"] or line["policy"] == FULL or line["chosen_on_validation"]:
        return True
    if line["policy"] in NULLS and line["allocation"] == "uniform":
        return True
    same = [each for each in lines if (each["task"], each["policy"]) == (line["task"], line["policy"])]
    return not any(each["chosen_on_validation"] for each in same)


def _overview(lines: Sequence[Mapping]) -> list[str]:
    first = lines[0]
    full = next((line for line in lines if line["policy"] == FULL), None)
    right = (
        f" With the full cache {_percent(full['accuracy'])} % are right, at {full['cache_bytes']:,.0f} bytes."
        if full
        else ""
    )
    return [
        f"{first['n']:.0f} contexts, {first['questions']:.0f} answers; "
        f"slots are evicted by `{first['trigger']}`.{right}"
    ]


def _accuracy(lines: Sequence[Mapping], smallest: Mapping[tuple, float | None]) -> list[str]:
    budgets, configurations = _budgets(lines), _by_configuration(lines)
    total = {key: sum(line["accuracy"] for line in by_budget.values()) for key, by_budget in configurations.items()}
    body = []
    for key in sorted(configurations, key=lambda key: -total[key]):
        by_budget = configurations[key]
        first = next(iter(by_budget.values()))
        cells = [_percent(by_budget[budget]["accuracy"]) if budget in by_budget else "" for budget in budgets]
        sufficient = smallest.get((first["task"], *key))
        body.append([*_name(first), *cells, "-" if sufficient is None else format_budget(sufficient)])
    return [pipe_table(["policy", "allocation", *map(format_budget, budgets), "smallest"], body, 2)]


def _details(lines: Sequence[Mapping]) -> list[str]:
    """What configurations cost and gain at the middle one of the budgets; nothing where the full cache stands alone."""
    budgets = _budgets(lines)
    if not budgets:
        return []
    budget = budgets[len(budgets) // 2]
    at_budget = sorted((line for line in lines if line["budget"] == budget), key=lambda line: -line["accuracy"])
    priced = any(line["tokens_read"] is not None for line in at_budget)  # episodes read a context for themselves
    body = []
    for line in at_budget:
        gain = line["gain"]
        body.append(
            [
                *_name(line), f"{_percent(line['accuracy'])} [{_percent(line['low'])}, {_percent(line['high'])}]",
                f"{_points(gain['mean'])} [{_points(gain['low'])}, {_points(gain['high'])}]" if gain else "",
                "" if line["nll"] is None else f"{line['nll']:.3f}", f"{line['cache_bytes']:,.0f}",
                f"{line['policy_bytes']:,.0f}" if line["policy_bytes"] else "", f"{line['milliseconds']:.0f}",
                *([f"{line['tokens_read']:,.0f}" if line["tokens_read"] else "shared"] if priced else []),
            ]
        )  # fmt: skip
    best = next((line["gain"]["against"] for line in at_budget if line["gain"]), None)
    against = f"; `gain` is the difference to {best}, the best heuristic there, paired over contexts" if best else ""
    head = ["policy", "allocation", "accuracy", "gain", "NLL", "cache bytes", "policy bytes", "ms"]
    price = (
        "; `tokens read` are those of a context's episodes, probes included, which the others read once for all of them"
        if priced
        else ""
    )
    head += ["tokens read"] * priced
    return [
        f"At {format_budget(budget)}{against}; `ms` is CPU time of a context for the cut and all that came "
        f"after{price}:",
        "",
        pipe_table(head, body, 2),
    ]


def _parts(lines: Sequence[Mapping]) -> list[str]:
    names = list(dict.fromkeys(part for line in lines for row in line["rows"] for part in row.get("parts") or ()))
    budgets = _budgets(lines)
    if not names or not budgets:
        return []
    budget = budgets[len(budgets) // 2]
    shown = [line for line in lines if line["budget"] == budget or line["policy"] == FULL]
    body = [
        [*_name(line), *(_percent(_part(line["rows"], name)) for name in names)]
        for line in sorted(shown, key=lambda line: -line["accuracy"])
    ]
    return [
        "",
        f"The same by part, at {format_budget(budget)}:",
        "",
        pipe_table(["policy", "allocation", *names], body, 2),
    ]


def _part(rows: Sequence[Mapping], name: str) -> float:
    parts = [row["parts"][name] for row in rows]
    return sum(part["correct"] for part in parts) / sum(part["questions"] for part in parts)


def _utility(rows: Sequence[Mapping]) -> list[str]:
    lines = summarise(rows, "utility_kept")
    out = []
    for task in dict.fromkeys(line["task"] for line in lines):
        same = [line for line in lines if line["task"] == task]
        budgets, body = _budgets(same), []
        configurations = _by_configuration(same).values()
        for by_budget in sorted(configurations, key=lambda lines: -sum(x["utility_kept"] for x in lines.values())):
            cells = [f"{by_budget[b]['utility_kept']:.3f}" if b in by_budget else "" for b in budgets]
            body.append([*_name(next(iter(by_budget.values()))), *cells])
        out += [
            "", f"## Utility kept, {_text(task)}", "",
            f"Share of the recorded future attention on the slots that stay, {same[0]['n']:.0f} contexts; oracles see "
            f"that future, and bound this and not accuracy.", "",
            pipe_table(["policy", "allocation", *map(format_budget, budgets)], body, 2),
        ]  # fmt: skip
    return out


def _hit_rates(rows: Sequence[Mapping]) -> list[str]:
    lines = summarise(rows, "hit_rate")
    out = []
    for task in dict.fromkeys(line["task"] for line in lines):
        same = [line for line in lines if line["task"] == task]
        capacities = sorted({line["budget"] for line in same})
        by_policy: dict[str, dict[float, Mapping]] = {}
        for line in same:
            by_policy.setdefault(line["policy"], {})[line["budget"]] = line
        body = [
            [_text(policy), *(f"{100 * found[c]['hit_rate']:.2f}" if c in found else "" for c in capacities)]
            for policy, found in sorted(by_policy.items(), key=lambda p: -sum(x["hit_rate"] for x in p[1].values()))
        ]
        out += [
            "", f"## Hit rates, {_text(task)}", "",
            f"Percent of {same[0]['n']:,.0f} accesses found in a cache of that size, means over seeds.", "",
            pipe_table(["policy", *(f"{capacity:,}" for capacity in capacities)], body),
        ]  # fmt: skip
    return out


def _refused(rows: Sequence[Mapping]) -> list[str]:
    refused: dict[str, list[str]] = {}
    for row in rows:
        if row.get("refused"):
            how = "" if row["task"].startswith("pages ") else f", {', '.join(_ways(row))}"
            refused.setdefault(row["refused"], []).append(f"{row['policy']}{how} ({row['task']})")
    lines = [f"- {', '.join(map(_text, dict.fromkeys(who)))}: {_text(why)}" for why, who in refused.items()]
    return ["", "## Refused", "", *lines] if lines else []


def _origin(rows: Sequence[Mapping]) -> list[str]:
    commands = sorted({row["command"] for row in rows if row.get("command")})
    found: dict[str, list[str]] = {}
    for row in rows:
        for name, version in (row.get("versions") or {}).items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    models = dict.fromkeys(row["model_hash"][:12] for row in rows if row.get("model_hash"))
    packages = ", ".join(f"{name} {' and '.join(each)}" for name, each in found.items())
    return [
        "", "## Made by", "", *(f"    {shlex.join(shlex.split(command))}" for command in commands), "",
        f"Model {', '.join(models)}; {packages}." if models else f"{packages}.",
    ]  # fmt: skip


def _budgets(lines: Sequence[Mapping]) -> list[float]:
    return sorted({line["budget"] for line in lines if line["policy"] != FULL}, reverse=True)


def _by_configuration(lines: Sequence[Mapping]) -> dict[tuple, dict[float, Mapping]]:
    """Lines by configuration and budget, without the full cache."""
    found: dict[tuple, dict[float, Mapping]] = {}
    for line in lines:
        if line["policy"] != FULL:
            found.setdefault(tuple(line[name] for name in _WITHOUT_BUDGET), {})[line["budget"]] = line
    return found


def _name(line: Mapping) -> tuple[str, str]:
    """Policy and how its slots are dealt out."""
    name = _text(line["policy"])
    how = _ways(line)
    if line["sinks"] is not None or line["recent"] is not None:
        how.append(f"ends {line['sinks']} + {line['recent']}")
    if line["window"] is not None:
        how.append(f"window {line['window']}")
    return f"**{name}**" if line["learned"] else name, _text(", ".join(how))


def _ways(row: Mapping) -> list[str]:
    """How a cache is held: the allocation, and what else is not as usual."""
    others = [row.get("evicted") or "drop", row.get("select") or "all", f"episodes {row.get('episodes') or 'none'}"]
    return [row["allocation"], *(name for name in others if name not in ("drop", "all", "episodes none"))]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _text(text: str) -> str:
    """Names and sentences of users as Markdown shows them literally, on one line."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>#|" else letter for letter in plain)
