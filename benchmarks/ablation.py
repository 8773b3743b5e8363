"""What makes `joint` good: one thing changed at a time, beside `end_to_end`, heuristics and rules of allocation.

    python benchmarks/ablation.py --out runs/ablation --jobs 2

Every variant is trained on the same contexts as the zoo (recorded by ``zoo.py`` into ``--traces``, five sets) and
judged on validation contexts, which are neither trained on nor held out: accuracy when decoding and utility kept in
replay, at totals from 1/8 to 1/64, one threshold over all slots unless the row names another rule. Mean and 95 %
interval (Student's t) over training seeds, and the same of the difference to the first row of the same seed.

Every variant and seed has a folder, named by all that it depends on, and is not done again: interrupted, or stopped by
``--minutes``, the same command goes on. Writes ``ablation.json``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from ablation_rows import FIRST, NAMED, VARIANTS, Variant, chosen
from ablation_runner import TOTALS, Runner, runner_of, work

from kv_gym.budgets import format_budget
from kv_gym.evaluation.rows import read_result, result, write_json
from kv_gym.evaluation.statistics import mean_interval
from kv_gym.evaluation.tasks import tasks_hash
from kv_gym.markdown import pipe_table

ATTENTION = ("h2o", "snapkv", "tova")  # of these the best is shown
HEURISTICS = ("keydiff", *ATTENTION)
RESULTS = Path(__file__).parent / "results"
MEASURED = {"accuracy": "", "utility_kept": "utility_kept_"}  # and how the names of its interval and difference begin


def values(found: dict[str, Any], rule: str, name: str) -> dict[float, float]:
    """A figure of one seed at every total, and its mean over them as total 0."""
    at = {row["budget"]: row[name] for row in found["rows"] if row["allocation"] == rule and row["policy"] == ""}
    return at | {0.0: fmean(at.values())}


def compared(ours: dict[int, dict], theirs: dict[int, dict], rule: str) -> list[dict[str, Any]]:
    """Figures of one row at every total (0: their mean), with their difference to the first row of the same seed.

    Args:
        ours: what was found, by seed; a heuristic has no seeds and one finding.
        theirs: what was found of the first row, by seed.
        rule: the allocation of our row; the first has its own.
    """
    paired = [(ours.get(seed, ours.get(None)), found) for seed, found in theirs.items()]
    rows = []
    for total in (*TOTALS, 0.0):
        row: dict[str, Any] = {"budget": total}
        for name, behind in MEASURED.items():
            each = [values(found, rule, name)[total] for found in ours.values()]
            row[name], row[f"{behind}interval"] = mean_interval(each)
            apart = [
                values(mine, rule, name)[total] - values(other, NAMED[FIRST].rules[-1], name)[total]
                for mine, other in paired
                if mine is not None
            ]
            row[f"{behind}difference"], row[f"{behind}difference_interval"] = mean_interval(apart)
        rows.append(row)
    return rows


def introduction(data: dict[str, Any]) -> str:
    """What the tables show."""
    return (
        f"Accuracy in percent on {data['questions']} validation questions (full cache {data['full_cache']:.1%}) at "
        "totals of the cache, and its mean over these totals; utility kept in replay, in percent, the same mean; "
        "differences in points to the first row, paired by seed. Half of the 95 % interval over training seeds behind "
        "±; heuristics have no seeds.\n"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table for each choice that rows vary."""
    lines: list[str] = []
    more = ("mean", "difference", "utility kept", "difference", "seeds", "seconds")
    for what in dict.fromkeys(row["what"] for row in rows):
        body = []
        configurations = dict.fromkeys((row["row"], row["allocation"]) for row in rows if row["what"] == what)
        for configuration in configurations:
            at = {row["budget"]: row for row in rows if (row["row"], row["allocation"]) == configuration}
            cells = [percent(at[total], "accuracy", "") for total in (*TOTALS, 0.0)]
            cells.append(percent(at[0.0], "difference", "difference_"))
            cells += [percent(at[0.0], f"utility_kept{end}", f"utility_kept{end}_") for end in ("", "_difference")]
            seconds = "" if at[0.0]["seconds"] is None else f"{at[0.0]['seconds']:.0f}"
            body.append([*configuration, *cells, str(at[0.0]["seeds"] or ""), seconds])
        lines += [f"\n**{what}**\n", pipe_table(["row", "allocation", *map(format_budget, TOTALS), *more], body, 2)]
    return "\n".join(lines) + "\n"


def percent(row: dict[str, Any], name: str, behind: str) -> str:
    """A figure in percent or points, and half its interval where several seeds tell one."""
    if row[name] is None:
        return ""
    sign = "+" if "difference" in name else ""
    half = row[f"{behind}interval"]
    return f"{100 * row[name]:{sign}.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def summary(runner: Runner, variants: list[Variant], seeds: int) -> list[dict[str, Any]]:
    """Rows of all that is done."""
    found: dict[str, dict[int, dict]] = {}
    for variant in variants:
        files = {seed: runner.place(variant, seed) / "rows.json" for seed in range(seeds)}
        found[variant.name] = {seed: read_result(file) for seed, file in files.items() if file.is_file()}
    rows = []
    for variant in (each for each in VARIANTS if found.get(each.name)):
        about = {
            "row": variant.name,
            "what": variant.what,
            "seeds": len(found[variant.name]),
            "seconds": fmean(each["seconds"] for each in found[variant.name].values()),
            "settings": next(iter(found[variant.name].values()))["settings"],
        }
        for rule in variant.rules:
            same = compared(found[variant.name], found[FIRST], rule)
            rows += [about | known(variant.name, rule) | row for row in same]
    heuristics = {name: runner.heuristic(name) for name in HEURISTICS}
    best = max(ATTENTION, key=lambda name: max_of(heuristics[name]))
    for name in (*(name for name in HEURISTICS if name not in ATTENTION), best):
        about = {"row": name, "what": "heuristics", "seeds": None, "seconds": None, "settings": None}
        for rule in dict.fromkeys(row["allocation"] for row in heuristics[name]["rows"] if row["policy"] == ""):
            same = compared({None: heuristics[name]}, found[FIRST], rule)
            rows += [about | known(name, rule) | row for row in same]
    return rows


def known(name: str, rule: str) -> dict[str, str]:
    """The allocation of a row, and what `kv-gym report` calls it."""
    return {"allocation": rule, "variant": name if rule == "global" else f"{name} ({rule})"}


def max_of(found: dict[str, Any]) -> float:
    """Mean accuracy over the totals under the rule that is best."""
    rules = {row["allocation"] for row in found["rows"] if row["policy"] == ""}
    return max(values(found, rule, "accuracy")[0.0] for rule in rules)


def main() -> None:
    """Train and judge what is missing, by seed, then write the table of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--traces", type=Path, default=Path("runs/held_out"), help="where zoo.py has put contexts")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--contexts", type=int, default=32, help="validation contexts, of 8 questions each")
    parser.add_argument("--only", action="append", metavar="ROW", help="one row; may be given again")
    parser.add_argument("--steps", type=int, help="training steps of every row, for a trial run")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing after so many")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of ablation.json")
    arguments = parser.parse_args()
    until = time.time() + 60 * arguments.minutes
    variants = chosen(arguments.only)
    shared = json.dumps(
        {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    )
    runner = runner_of(shared)
    runner.record_all(variants)

    # all rows of a seed before the next seed; those that start from others when these are there
    first = [
        (shared, variant.name, seed, until)
        for seed in range(arguments.seeds)
        for variant in variants
        if not variant.init
    ]
    then = [
        (shared, variant.name, seed, until) for seed in range(arguments.seeds) for variant in variants if variant.init
    ]
    first += [(shared, name, 0, float("inf")) for name in HEURISTICS]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for jobs in (first, then):
            left = 0
            for line in pool.imap_unordered(work, jobs):
                left += not line
                print(line, end="\n" if line else "", flush=True)
            if left:
                print(f"{left} of {len(jobs)} are left: run the same command again")
    rows = summary(runner, variants, arguments.seeds)
    full = next(row for row in runner.heuristic(HEURISTICS[0])["rows"] if row["policy"] == "full_cache")
    about = {
        "full_cache": full["accuracy"], "questions": full["questions"], "contexts": arguments.contexts,
        "seeds": arguments.seeds, "tasks": tasks_hash(runner.tasks), "traces": [
            runner.hash(runner.folder(seed, False)) for seed in range(arguments.seeds)
        ],
    }  # fmt: skip
    means = [row for row in rows if not row["budget"]]
    data = result([row for row in rows if row["budget"]], means=means, **about)
    write_json(arguments.results / "ablation.json", data)
    print(introduction(data) + table(rows))


if __name__ == "__main__":
    main()
