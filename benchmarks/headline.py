"""The figures that are claimed, from a leaderboard's rows: smallest totals, their ratios, the way to the oracle.

    python benchmarks/headline.py runs/headline/rows runs/headline/equal runs/headline/utility \
        --publish benchmarks/results/headline

The rows are those of ``headline.yml``, ``headline_equal.yml`` and ``headline_utility.yml``; the head of the first says
how to make them. A
smallest total is the least budget at and above which the lower end of the accuracy's 95 % interval stays within a point
of the full cache. The way to the oracle: (utility kept - the best heuristic's) / (the oracle's - the best heuristic's),
each at its best allocation, at every total from 1/4 to 1/32, and their mean.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

from kv_gym.budgets import format_budget
from kv_gym.evaluation.leaderboard import publish, read_rows
from kv_gym.evaluation.rows import result, write_json
from kv_gym.evaluation.summary import smallest_budgets, summarise
from kv_gym.markdown import pipe_table

RATIOS = (
    ("end_to_end", "rloo", 0.4),
    ("end_to_end, family unseen", "rloo, family unseen", 0.4),
)
ORACLE, RANKED_BY_UTILITY = "oracle", "joint, utility"
UTILITY_TOTALS = (1 / 4, 1 / 32)  # from, to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", help="folders of rows")
    parser.add_argument("--publish", type=Path, help="folder for compact rows, from which the README's table is made")
    arguments = parser.parse_args()
    rows = list({row["cell"]: row for folder in arguments.rows for row in read_rows(folder)}.values())
    lines = summarise(rows)
    least = smallest_of(lines)
    claims = {
        "smallest": least,
        "ratios": ratios(least, {line["policy"]: line["learned"] for line in lines}),
        "way_to_the_oracle": way_to_the_oracle(summarise(rows, "utility_kept")),
    }
    print(markdown(lines, claims))
    if arguments.publish is not None:
        publish(rows, arguments.publish)
        write_json(arguments.publish / "claims.json", result([], **claims))


def smallest_of(lines: list[dict]) -> dict[str, float | None]:
    """By policy, the smallest total over its allocations and settings; None where no measured budget holds."""
    least: dict[str, float | None] = {}
    for place, budget in smallest_budgets(lines).items():
        policy, known = place[1], least.get(place[1])
        least[policy] = min(known, budget) if known and budget else known or budget
    return least


def ratios(least: dict[str, float | None], learned: dict[str, bool]) -> list[dict]:
    """What the learned policy needs, as a share of what another does; where that one never holds, of more than all."""
    heuristics = {name: budget for name, budget in least.items() if not learned.get(name) and budget}
    best = min(heuristics, key=heuristics.__getitem__, default=None)
    pairs = [*RATIOS, ("end_to_end", best, 0.25), ("end_to_end, family unseen", best, 0.25)]
    table = []
    for ours, theirs, asked in pairs:
        if ours in least:
            mine, other = least[ours], least.get(theirs) if theirs else None
            found = mine / other if mine and other else None
            table.append({"policy": ours, "against": theirs, "asked": asked, "found": found})
    return table


def way_to_the_oracle(lines: list[dict]) -> dict:
    """Share of the distance from the best heuristic to the oracle, by total, and the mean."""
    best: dict[tuple[str, float], float] = {}
    for line in lines:
        kind = line["policy"] if line["learned"] or line["policy"] == ORACLE else "heuristic"
        place = kind, line["budget"]
        best[place] = max(best.get(place, 0.0), line["utility_kept"])
    shares = {
        format_budget(budget): (best[RANKED_BY_UTILITY, budget] - best["heuristic", budget])
        / (best[ORACLE, budget] - best["heuristic", budget])
        for kind, budget in best
        if kind == ORACLE and UTILITY_TOTALS[1] <= budget <= UTILITY_TOTALS[0] and (RANKED_BY_UTILITY, budget) in best
    }
    return {"policy": RANKED_BY_UTILITY, "by_total": shares, "mean": fmean(shares.values()) if shares else None}


def markdown(lines: list[dict], claims: dict) -> str:
    budgets = sorted({line["budget"] for line in lines if line["policy"] != "full_cache"}, reverse=True)
    configurations: dict[tuple, dict[float, dict]] = {}
    for line in lines:
        place = line["policy"], line["allocation"], line["sinks"], line["recent"], line["window"]
        configurations.setdefault(place, {})[line["budget"]] = line
    body = []
    for (policy, rule, *_), found in sorted(
        configurations.items(), key=lambda configuration: -sum(x["accuracy"] for x in configuration[1].values())
    ):
        if policy != "full_cache":
            cells = [_cell(found[budget]) if budget in found else "" for budget in budgets]
            body.append([policy, rule, *cells])
    full = [line["accuracy"] for line in lines if line["policy"] == "full_cache"]
    out = [pipe_table(["policy", "allocation", *map(format_budget, budgets)], body, 2)]
    out += ["", f"Full cache {100 * full[0]:.2f} %, {max(line['questions'] for line in lines):.0f} questions."]
    for policy, budget in sorted(claims["smallest"].items(), key=lambda item: item[1] or 2):
        out.append(f"- smallest total of {policy}: {format_budget(budget) if budget else 'none measured'}")
    for ratio in claims["ratios"]:
        found = "one of the two never holds" if ratio["found"] is None else f"{ratio['found']:.2f}"
        out.append(f"- {ratio['policy']} to {ratio['against']}: {found} (asked: at most {ratio['asked']})")
    way = claims["way_to_the_oracle"]
    if way["mean"] is not None:
        text = ", ".join(f"{total} {share:.0%}" for total, share in way["by_total"].items())
        out.append(f"- {way['policy']}, way from the best heuristic to the oracle: {way['mean']:.1%} ({text})")
    return "\n".join(out)


def _cell(line: dict) -> str:
    return f"{100 * line['accuracy']:.1f} ({100 * line['low']:.1f})"


if __name__ == "__main__":
    main()
