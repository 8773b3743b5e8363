"""Write what the benchmarks found into the repository's pages; nothing is typed by hand.

    python benchmarks/publish.py                      # the pages, from the results and policies that are committed
    python benchmarks/publish.py --run runs/held_out  # before that takes over the zoo that zoo.py trained there
    python benchmarks/publish.py --check              # says which pages are stale, and exits with 1

The pages: what stands between the markers of README.md and of real-model.md, results.md and live-cache.md in docs;
docs/clients.md, agents/README.md and the cards of its policies, BENCHMARK.md and benchmarks/RESULTS.md. They are made
of ``benchmarks/results/`` and agents/trained/ alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import clients
import gpu_page
import real_model_page
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
        stale = [str(file.relative_to(ROOT)) for file, make in pages(ROOT).items() if not is_fresh(file, make())]
        sys.exit(f"stale: {', '.join(stale)}; run python benchmarks/publish.py" if stale else 0)
    if arguments.run is not None:
        for settings in sorted((ROOT / "agents").glob("*.yml")):
            if (arguments.run / f"{settings.stem}-0" / "policy.json").is_file():
                policy = Scorer.from_pretrained(arguments.run / f"{settings.stem}-0")
                policy.save_pretrained(ROOT / "agents" / "trained" / settings.stem)
    for file, make in pages(ROOT).items():
        file.write_text(make(), encoding="utf-8")
    headline = read_rows(ROOT / RESULTS / "headline")
    picture([row for row in headline if row["task"] == TASK], ROOT / RESULTS / "headline.png", ["accuracy"])
    real_model_page.draw(ROOT / RESULTS)


def pages(root: Path) -> dict[Path, Callable[[], str]]:
    """Every generated page of a checkout, and what makes it."""
    results, trained, docs = root / RESULTS, root / "agents" / "trained", root / "docs"
    rows = cache(lambda folder: read_rows(results / folder))
    real = cache(lambda: real_model_page.rows_of(results))

    def between(file: Path, text: Callable[[], str]) -> tuple[Path, Callable[[], str]]:
        return file, lambda: between_markers(file, text())

    made = dict(
        [
            between(root / "README.md", lambda: real_model_page.first_screen(real())),
            between(docs / "results.md", lambda: headline_table(rows("headline"))),
            between(docs / "real-model.md", lambda: real_model_page.page(real(), results)),
            between(docs / "live-cache.md", lambda: gpu_page.page(results)),
            (root / "agents" / "README.md", lambda: zoo(rows("leaderboard"), trained)),
            (docs / "clients.md", lambda: clients.page(results / "clients.json")),
            (root / "BENCHMARK.md", lambda: page(rows("leaderboard"))),
            (root / "benchmarks" / "RESULTS.md", lambda: findings(results)),
        ]
    )
    for folder in sorted(trained.iterdir()):
        made[folder / "README.md"] = lambda folder=folder: Scorer.from_pretrained(folder).card()
    return made


def is_fresh(file: Path, text: str) -> bool:
    """Whether a page says what it should."""
    return file.is_file() and file.read_text(encoding="utf-8") == text


def between_markers(file: Path, text: str) -> str:
    """A page with `text` in place of what stands between its markers."""
    page = file.read_text(encoding="utf-8")
    return f"{page.split(START)[0]}{START}\n{text}{END}{page.split(END)[1]}"


def headline_table(rows: Sequence[Mapping]) -> str:
    """The table of docs/results.md: accuracy at every budget, with the picture."""
    full = next((row for row in rows if row["policy"] == FULL and row["task"] == TASK), None)
    if full is None:
        return ""
    seeds = {row["seed"] for row in rows if row.get("seed") is not None}
    return (
        f"{accuracy_table(rows, TASK)}\n\n"
        f"Accuracy in percent on {full['questions']:,} held-out questions of multi-key recall in 512 words (full cache "
        f"{full['accuracy']:.1%}). The question is not seen while the cache is cut. A budget is a share of all slots "
        f"of the model. Learned policies (bold) are means over {len(seeds)} training runs. Heuristics use the "
        f"allocation, protected ends and window that were best on validation contexts. `smallest` is the smallest "
        f"budget within one point of the full cache, at the lower end of a 95 % interval. *Family unseen*: trained on "
        f"all other families of tasks. *Hidden states*: the only input of the scorer.\n\n"
        f"![accuracy over budget](../benchmarks/results/headline.png)\n"
    )


def zoo(rows: Sequence[Mapping], trained: Path) -> str:
    """The page of agents/: the policies in `trained`, and the results of agents trained with the same settings."""
    lines = [line for line in summarise(rows) if line["task"] == TASK]
    least = smallest_budgets(lines)
    out = [
        "# Trained agents", "",
        "`<agent>.yml` holds the settings of an agent, `trained/<agent>/` a policy for the bundled model (seed 0), and "
        "`trained/smollm2/` one of `end_to_end` for SmolLM2-135M-Instruct as `make real-model` puts it there (a 4-bit "
        "copy; the published weights are another model to it): [docs/real-model.md](../docs/real-model.md).",
        "The kernels of the tier `less:FOLDER` are trained by a command of their own, `kv-gym train-less`: "
        "[docs/write-an-agent.md](../docs/write-an-agent.md#kernels-of-a-tier).",
        "This page is written by `python benchmarks/publish.py`.", "",
    ]  # fmt: skip
    body = []
    for folder in sorted(trained.iterdir()):
        if not (ROOT / "agents" / f"{folder.name}.yml").is_file():
            continue  # it is for another model
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
    questions = max((line["questions"] for line in lines), default=0)
    out += [
        "",
        f"Accuracy in percent on {questions:.0f} held-out questions of multi-key recall in 512 words, means over "
        f"{seeds} training runs. `smallest` is the smallest budget within one point of the full cache. Seconds are "
        "those of the run in `trained/`, on two CPU cores shared with other work.",
    ]
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    main()
