"""Two methods over their settings: how little a query may read, and how long a decision may wait.

    python benchmarks/seed_settings.py --json benchmarks/results/seed_settings.json   # and writes docs/seed-settings.md
    python benchmarks/seed_settings.py --page                                         # writes the page alone

*Reading* (MPCache, Quest): the cache holds all of a context with needles, and the queries of an unseen question read a
fifth of the groups beside the first and the newest one. *Waiting* (Attendre): a cache of 512 slots judges tokens when
W others have come, on dialogues cut at every turn.
All settings that are measured are shown, and none was chosen on other contexts. A configuration that is in the file
already is not measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measured_page import measure_or_write

from kv_gym import make_policy
from kv_gym.evaluation.configurations import Configuration, full_cache
from kv_gym.evaluation.measure import measure
from kv_gym.evaluation.rows import FULL, read_result, result, write_json
from kv_gym.evaluation.statistics import paired_difference
from kv_gym.evaluation.tasks import parse_tasks
from kv_gym.live.selection import parse_selection
from kv_gym.markdown import pipe_table
from kv_gym.models import load_model
from kv_gym.reference import MODEL

RESULTS, PAGE = Path("benchmarks/results/seed_settings.json"), Path("docs/seed-settings.md")
READING = {
    "multi_key:512": (
        "mpcache:0.2", "mpcache:0.2:wide=1", "mpcache:0.2:wide=1:alpha=0.5", "mpcache:0.2:wide=1:alpha=0.8",
        "mpcache:0.2:wide=1:alpha=1", "mpcache:0.2:group=8", "mpcache:0.2:group=8:wide=1", "mpcache:0.2:group=4",
        "mpcache:0.2:group=4:wide=1", "quest:0.2", "quest:0.2:group=8",
        "quest:0.2:group=4",
    ),
    "multi_key:1024": (
        "mpcache:0.2", "mpcache:0.2:wide=1", "mpcache:0.2:group=8:wide=1", "mpcache:0.2:group=4:wide=1", "quest:0.2",
    ),
}  # fmt: skip
WAITING, SLOTS, DELAYS = ("dialogue:1024", "copy:1008"), 512, (0, 16, 64, 256)  # half of a budget at most is protected


def configurations() -> dict[str, list[Configuration]]:
    """What is measured, by task."""
    reading = {
        task: [Configuration("keydiff", make_policy("keydiff"), select=parse_selection(name)) for name in names]
        for task, names in READING.items()
    }
    waiting = {
        task: [
            Configuration(name, make_policy(name), SLOTS, sinks=0, recent=delay)
            for name in ("lra", "lfa")
            for delay in DELAYS
        ]
        for task in WAITING
    }
    return {task: [full_cache(), *others] for task, others in (reading | waiting).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, default=12, help="of each task")
    measure_or_write(parser, RESULTS, PAGE, run, page)


def run(file: Path, contexts: int) -> None:
    """Measure what the file does not hold yet, task by task."""
    rows = read_result(file)["rows"] if file.is_file() else []
    model, tokenizer = load_model(MODEL)
    for name, wanted in configurations().items():
        tasks = parse_tasks(name, tokenizer, contexts)
        measured = [(row["policy"], row["select"], row["recent"]) for row in rows if row["task"] == tasks[0].name]
        missing = [each for each in wanted if (each.name, each.select.name, each.recent) not in measured]
        if missing:
            rows += measure(model, tasks, missing)
            write_json(file, result(rows, model="reference"))


def page(data: Mapping[str, Any]) -> str:
    """The page, of committed results alone."""
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for row in data["rows"]:
        by_task.setdefault(row["task"], []).append(row)
    reading = [line for same in by_task.values() for line in _reading(same)]
    waiting = [line for same in by_task.values() for line in _waiting(same)]
    contexts = {row["n"] for same in by_task.values() for row in same}
    parts = [
        "# Settings of two methods",
        f"Made by `python benchmarks/seed_settings.py --json {RESULTS}` with the bundled model, on "
        f"{' or '.join(map(str, sorted(contexts)))} held-out contexts of each task. Differences are paired over "
        "contexts, with their 95 % interval. Every setting that was measured is shown.",
        "## How little a query may read",
        "The cache holds all slots (`keydiff` at budget 1.0) and the question is not seen before. *Read* counts the "
        "slots that a question's queries read, and *with bounds* adds the two bounds of every group, which are as many "
        "numbers as one slot. `group` is the slots of a group (16 as published), `wide` the share of the pairs of "
        "groups that are opened (0.5 as published), `alpha` the weight of a group's maximum (0.6 as published).",
        pipe_table(
            ("select", "task", "accuracy, %", "held", "read", "with bounds", "less reading all, points"),
            reading, None,
        ),
        "## What waiting is worth",
        f"Accuracy in percent of caches of {SLOTS} slots for each KV head which judge tokens when W others have come "
        "(`delay=W`), by Attendre's two policies, and the difference between the longest wait and none. The model "
        "copies no list so long that W = 256 could be tried on it, even with its full cache: the rows say nothing.",
        pipe_table(
            ("policy", "task", *(f"W = {delay}" for delay in DELAYS), "full cache", f"W = {DELAYS[-1]} less W = 0"),
            waiting, None,
        ),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _reading(rows: Sequence[Mapping[str, Any]]) -> list[Sequence[str]]:
    (full,), lines = [row for row in rows if row["policy"] == FULL], []
    for row in rows:
        if row["policy"] != "keydiff":
            continue
        held = sum(map(sum, row["slots"])) / sum(map(len, row["slots"]))
        bounds = held / parse_selection(row["select"]).group
        read = row["slots_read"]
        accuracy, difference = f"{100 * row['accuracy']:.1f}", _difference(row, full)
        lines.append(
            (row["select"], row["task"], accuracy, f"{held:.0f}", f"{read:.0f}", f"{read + bounds:.0f}", difference)
        )
    return lines


def _waiting(rows: Sequence[Mapping[str, Any]]) -> list[Sequence[str]]:
    (full,), lines = [row for row in rows if row["policy"] == FULL], []
    for name in dict.fromkeys(row["policy"] for row in rows if row["budget"] == SLOTS):
        found = {row["recent"]: row for row in rows if row["policy"] == name}
        accuracies = [f"{100 * row['accuracy']:.1f}" for row in (*(found[delay] for delay in DELAYS), full)]
        lines.append((name, full["task"], *accuracies, _difference(found[DELAYS[-1]], found[0])))
    return lines


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    found = paired_difference([ours], [theirs])
    assert found is not None
    return f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


if __name__ == "__main__":
    main()
