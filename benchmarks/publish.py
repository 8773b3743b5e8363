"""Write what the benchmarks found into the repository's pages; nothing is typed by hand.

    python benchmarks/publish.py                      # the pages, from the results and policies that are committed
    python benchmarks/publish.py --run runs/held_out  # before that takes over the zoo that zoo.py trained there
    python benchmarks/publish.py --check              # says which pages are stale, and exits with 1

The pages: what stands between the markers of README.md, agents/README.md and the cards of its policies, BENCHMARK.md
and benchmarks/RESULTS.md. They are made of ``benchmarks/results/`` and agents/trained/ alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from findings import findings

from kv_gym.budgets import format_budget
from kv_gym.evaluation.leaderboard import accuracy_table, page, read_rows
from kv_gym.evaluation.report import picture
from kv_gym.evaluation.summary import FULL, smallest_budgets, summarise
from kv_gym.markdown import pipe_table
from kv_gym.policies.scorer import Scorer

ROOT = Path(__file__).parents[1]
RESULTS = Path("benchmarks/results")
START, END = "<!-- results -->", "<!-- /results -->"
TASK = "multi_key 512"
SHOWN = (1 / 8, 1 / 16, 1 / 32, 1 / 64)  # of the zoo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of zoo.py: take over the policies of seed 0")
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    if arguments.check:
        stale = [str(file.relative_to(ROOT)) for file, text in pages(ROOT).items() if not is_fresh(file, text)]
        sys.exit(f"stale: {', '.join(stale)}; run python benchmarks/publish.py" if stale else 0)
    if arguments.run is not None:
        for settings in sorted((ROOT / "agents").glob("*.yml")):
            if (arguments.run / f"{settings.stem}-0" / "policy.json").is_file():
                policy = Scorer.from_pretrained(arguments.run / f"{settings.stem}-0")
                policy.save_pretrained(ROOT / "agents" / "trained" / settings.stem)
    for file, text in pages(ROOT).items():
        file.write_text(text, encoding="utf-8")
    headline = read_rows(ROOT / RESULTS / "headline")
    picture([row for row in headline if row["task"] == TASK], ROOT / RESULTS / "headline.png", ["accuracy"])


def pages(root: Path) -> dict[Path, str]:
    """Every generated page of a checkout, and what it should say."""
    headline, board = read_rows(root / RESULTS / "headline"), read_rows(root / RESULTS / "leaderboard")
    front = (root / "README.md").read_text(encoding="utf-8")
    before, after = front.split(START)[0], front.split(END)[1]
    made = {
        root / "README.md": f"{before}{START}\n{first_screen(headline)}{END}{after}",
        root / "agents" / "README.md": zoo(board, root / "agents" / "trained"),
        root / "BENCHMARK.md": page(board),
    }
    if found := findings(root / RESULTS):
        made[root / "benchmarks" / "RESULTS.md"] = found
    for folder in sorted((root / "agents" / "trained").iterdir()):
        made[folder / "README.md"] = Scorer.from_pretrained(folder).card()
    return made


def is_fresh(file: Path, text: str) -> bool:
    """Whether a page says what it should."""
    return file.is_file() and file.read_text(encoding="utf-8") == text


def first_screen(rows: Sequence[Mapping]) -> str:
    """The README's table and picture: how little of the cache is enough."""
    full = next((row for row in rows if row["policy"] == FULL and row["task"] == TASK), None)
    if full is None:
        return ""
    seeds = {row["seed"] for row in rows if row.get("seed") is not None}
    return (
        f"How little of the cache is enough? Multi-key recall in 512 words, {full['questions']:,} held-out questions, "
        f"unseen while the cache is cut, in percent (full cache {full['accuracy']:.1%}). A budget is a share of all "
        f"slots of the model; learned policies (bold) are means over {len(seeds)} training runs; heuristics have the "
        f"allocation, protected ends and window that did best on validation contexts; `smallest` is the least budget "
        f"that stays within a point of the full cache, at the lower end of a 95 % interval. *Family unseen*: trained "
        f"on all other families of tasks. *Hidden states*: all that it sees of a token. "
        f"[How it is made](benchmarks/headline.yml); all policies and tasks: "
        f"[BENCHMARK.md](BENCHMARK.md).\n\n{accuracy_table(rows, TASK)}\n\n"
        f"![accuracy against the budget](benchmarks/results/headline.png)\n"
    )


def zoo(rows: Sequence[Mapping], trained: Path) -> str:
    """The zoo's page: what the agents in `trained` are, and how agents trained as they are did."""
    lines = [line for line in summarise(rows) if line["task"] == TASK]
    least = smallest_budgets(lines)
    out = [
        "# The zoo", "",
        "Settings are in `<agent>.yml`; `trained/<agent>/` holds a policy for the bundled reference model (seed 0).",
        "This page is written by `python benchmarks/publish.py`.", "",
    ]  # fmt: skip
    body = []
    for folder in sorted(trained.iterdir()):
        policy = Scorer.from_pretrained(folder)
        about = policy.training
        seconds = f"{about['seconds']:.0f}" if "seconds" in about else "-"
        trained = (str(about["settings"]["steps"]), str(policy.network.hidden), f"{policy.nbytes():,}", seconds)
        configurations: dict[str, dict[float, Mapping]] = {}
        for line in lines:
            if line["learned"] and line["policy"] == folder.name:
                configurations.setdefault(line["allocation"], {})[line["budget"]] = line
        for rule, at in sorted(configurations.items()):
            cells = [f"{100 * at[budget]['accuracy']:.1f}" if budget in at else "" for budget in SHOWN]
            enough = next(v for k, v in least.items() if (k[1], k[2]) == (folder.name, rule))
            found = format_budget(enough) if enough else "-"
            body.append([folder.name, ", ".join(policy.inputs), rule, *trained, *cells, found])
        if not configurations:
            body.append([folder.name, ", ".join(policy.inputs), "", *trained, *[""] * (len(SHOWN) + 1)])
    head = (
        "agent",
        "inputs",
        "allocation",
        "steps",
        "width",
        "bytes",
        "seconds",
        *map(format_budget, SHOWN),
        "smallest",
    )
    out.append(pipe_table(head, body, 3))
    seeds = max((line["seeds"] for line in lines if line["learned"]), default=0)
    asked = max((line["questions"] for line in lines), default=0)
    out += [
        "",
        f"Percent right of {asked:.0f} held-out questions of multi-key recall in 512 words, means over {seeds} ",
    ]
    out[-1] += "training runs; seconds are those of the run in `trained/`, on two CPU cores that other work shared."
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    main()
