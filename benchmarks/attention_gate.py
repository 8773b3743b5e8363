"""Attention-Gate beside other policies, at equal slots, on every task of the bundled model.

    python benchmarks/attention_gate.py --out runs/attention_gate --json benchmarks/results/attention_gate.json

Trains gates towards a half and an eighth of the tokens, `kvzap`, and `end_to_end` (a third of its steps), all on the
same contexts of all seven tasks (training seeds, seed 0), with the settings of their files. Then all of them, H2O and
StreamingLLM answer the same pinned held-out contexts. `section` is the part of docs/seeds.md that shows it, with a
picture of what the gates keep by layer and head. Goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from zoo import training_contexts

from kv_gym import EvictingCache, make_policy
from kv_gym.budgets import parse_allocation
from kv_gym.evaluation.configurations import Configuration, full_cache
from kv_gym.evaluation.measure import measure
from kv_gym.evaluation.rows import read_result, result, write_json
from kv_gym.evaluation.statistics import paired_difference
from kv_gym.evaluation.tasks import parse_tasks
from kv_gym.files import atomic_write
from kv_gym.markdown import pipe_table
from kv_gym.models import load_model
from kv_gym.policies import Policy
from kv_gym.reference import MODEL
from kv_gym.reference.generator import TASKS
from kv_gym.reference.heldout import held_out
from kv_gym.reference.tokenizer import encode, word_ids
from kv_gym.training import train

HALF, EIGHTH = "attention_gate, keeps 1/2", "attention_gate, keeps 1/8"
LEARNED: dict[str, tuple[str, dict[str, Any]]] = {
    HALF: ("attention_gate", {"steps": 300, "every": 50}),
    EIGHTH: ("attention_gate", {"steps": 300, "every": 50, "keep_rate": 0.125}),
    "kvzap": ("kvzap", {}),
    "end_to_end": ("end_to_end", {"steps": 400}),
}
HEURISTICS = ("h2o", "streaming_llm")
BUDGETS = (1 / 2, 1 / 4, 1 / 8)
WORDS = 512
FLAGS = "threshold:0"
PICTURE = "attention_gate.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/attention_gate"))
    parser.add_argument("--json", type=Path, help="write the rows to this file, and the picture beside it")
    parser.add_argument("--contexts", type=int, default=8, help="of each task")
    arguments = parser.parse_args()
    model, tokenizer = load_model(MODEL)
    traces = training_contexts(model, tokenizer, arguments.out / "contexts", list(TASKS), 0, hidden=True)
    learned: dict[str, Policy] = {}
    for name, (agent, settings) in LEARNED.items():
        folder = arguments.out / name.replace(", ", "-").replace(" ", "-").replace("/", "-")
        learned[name] = train(agent, traces, folder, model=model, **settings)
    file = arguments.json or arguments.out / "rows.json"
    rows = read_result(file)["rows"] if file.is_file() else []
    gates = {name: policy for name, policy in learned.items() if name in (HALF, EIGHTH)}
    for task in TASKS:
        measured = {row["policy"] for row in rows if row["task"].startswith(f"{task} ") and row["n"]}
        if len(measured) == 1 + len(LEARNED) + len(HEURISTICS):
            continue
        rows += measure(model, parse_tasks(f"{task}:{WORDS}", tokenizer, arguments.contexts), configurations(learned))
        write_json(file, result(rows))
    rates = {name: keep_rates(model, policy, arguments.contexts) for name, policy in gates.items()}
    write_json(file, result(rows, keep_rates=rates, weights={name: p.nbytes() for name, p in learned.items()}))
    draw(rates, file.with_name(PICTURE))
    print(section(file))


def configurations(learned: Mapping[str, Policy]) -> list[Configuration]:
    """All that is measured on a task."""
    everywhere, flags = parse_allocation("global"), parse_allocation(FLAGS)
    found = [full_cache()]
    for budget in BUDGETS:
        found += [Configuration(name, policy, budget, everywhere) for name, policy in learned.items()]
        found += [Configuration(name, make_policy(name), budget) for name in HEURISTICS]
    return found + [Configuration(name, learned[name], 1 / 2, flags) for name in (HALF, EIGHTH)]


@torch.no_grad()
def keep_rates(model, policy: Policy, contexts: int) -> dict[str, list[list[float]]]:
    """The share of the tokens that each head's flags keep, `[layers][heads]` by task, over held-out contexts."""
    rates = {}
    for task in TASKS:
        kept, count = 0.0, 0
        for context in held_out(task, WORDS, contexts).make(contexts):
            ids = [word_ids()["<bos>"], *encode(context.words)]
            with EvictingCache(model, policy, 1 / 2, FLAGS) as cache:
                model(torch.tensor([ids]), past_key_values=cache)
                kept, count = kept + cache.kept()[:, 0].double() / len(ids), count + 1
        rates[task] = (kept / count).tolist()
    return rates


def draw(rates: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], file: Path) -> None:
    """A square for each layer and head: the share of the tokens that the flags keep, as a mean over the tasks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(rates), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, by_task) in zip(figure.subplots(1, len(rates), squeeze=False)[0], rates.items(), strict=True):
        mean = torch.tensor([by_task[task] for task in TASKS]).mean(0)
        axes.imshow(mean, vmin=0, vmax=1, cmap="Blues")
        for layer, row in enumerate(mean.tolist()):
            for head, share in enumerate(row):
                axes.text(head, layer, f"{100 * share:.0f} %", ha="center", va="center", color="wk"[share < 0.6])
        axes.set(title=name.partition(", ")[2], xlabel="KV head", ylabel="layer")
        axes.set_xticks(range(mean.shape[1]))
        axes.set_yticks(range(mean.shape[0]))
    with atomic_write(file) as part:
        figure.savefig(part, format="png", dpi=110)


def section(file: Path) -> str:
    """The part of docs/seeds.md, of committed results alone."""
    data = read_result(file)
    rows = {(row["task"].split()[0], row["policy"], row["budget"], row["allocation"]): row for row in data["rows"]}
    full = {task: row for (task, policy, *_), row in rows.items() if policy == "full_cache"}
    lines = []
    for task in TASKS:
        ours, theirs = rows[task, HALF, 0.5, "global"], [rows[task, name, 0.5, "uniform"] for name in HEURISTICS]
        differences = [found for other in theirs if (found := paired_difference([ours], [other]))]
        accuracies = [f"{100 * row['accuracy']:.1f}" for row in (full[task], ours, *theirs)]
        spread = [f"{100 * d.mean:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f})" for d in differences]
        lines.append((task, *accuracies, *spread, _verdict(differences)))
    table = []
    for name in (*LEARNED, *HEURISTICS):
        rule = "global" if name in LEARNED else "uniform"
        cells = [_mean(rows[task, name, budget, rule] for task in TASKS) for budget in BUDGETS]
        table.append((name, rule, f"{data['weights'].get(name, 0):,}", *cells))
    table += [
        (name, FLAGS, f"{data['weights'][name]:,}", _mean(rows[task, name, 0.5, FLAGS] for task in TASKS), "", "")
        for name in (HALF, EIGHTH)
    ]
    parts = [
        "## Attention-Gate on all tasks",
        "Made by `python benchmarks/attention_gate.py --json benchmarks/results/attention_gate.json`. The paper "
        "([2410.12876](https://arxiv.org/abs/2410.12876)): with about half of the tokens evicted, accuracy is above "
        "that of H2O and StreamingLLM. The gate was trained here towards a half of the tokens, on training contexts of "
        f"all tasks; accuracy in percent on {next(iter(full.values()))['n']} held-out contexts of {WORDS} words each, "
        "question unseen, at half of all slots; differences with 95 % intervals, paired over contexts.",
        pipe_table(
            ("task", "full cache", "gate", "H2O", "StreamingLLM", "gate - H2O", "gate - StreamingLLM", "no worse"),
            lines, None,
        ),
        "Beside other policies that were trained on the same contexts: mean accuracy over the tasks, and in "
        "parentheses the kilobytes of a context's cache. `end_to_end` had a third of its steps, all had one training "
        f"run. With `{FLAGS}` the gates' flags decide, whatever the budget. A gate keeps what it was trained to keep: "
        "the one for a half does not say which eighth to keep.",
        pipe_table(
            ("policy", "allocation", "bytes of weights", "1/2", "1/4", "1/8"), table, None,
        ),
        "What the flags keep, by layer and KV head, as a mean over the tasks:",
        f"![share of the tokens kept by layer and head](../benchmarks/results/{PICTURE})",
    ]  # fmt: skip
    return "\n\n".join(parts)


def _verdict(differences: Sequence[Any]) -> str:
    if any(each.high < 0 for each in differences):
        return "no"
    return "yes" if all(each.mean >= 0 for each in differences) else "open"


def _mean(rows) -> str:
    found = list(rows)
    accuracy, size = (sum(row[name] for row in found) / len(found) for name in ("accuracy", "cache_bytes"))
    return f"{100 * accuracy:.1f} ({size / 1000:,.0f})"


if __name__ == "__main__":
    main()
