"""Attention-Gate beside other policies, at equal slots, on every task of the bundled model.

    python benchmarks/attention_gate.py --out runs/attention_gate --json benchmarks/results/attention_gate.json

Trains `attention_gate`, the same towards a single keep rate, and `kvzap` three times each, and `end_to_end` once (a
third of its steps), with the settings of their files, on the same contexts of all seven tasks (training seeds). Then
all of them, H2O and StreamingLLM answer the same pinned held-out contexts. `section` is the part of docs/seeds.md that
shows it, with a picture of what the gates keep by layer and head. Goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from zoo import training_contexts

from kv_gym import EvictingCache, make_policy
from kv_gym.budgets import parse_allocation
from kv_gym.evaluation.configurations import Configuration, full_cache
from kv_gym.evaluation.measure import measure
from kv_gym.evaluation.rows import FULL, read_result, result, write_json
from kv_gym.evaluation.statistics import paired_difference
from kv_gym.evaluation.tasks import parse_tasks
from kv_gym.files import atomic_write
from kv_gym.markdown import pipe_table
from kv_gym.models import load_model
from kv_gym.policies import Policy
from kv_gym.policies.scorer import Scorer
from kv_gym.reference import MODEL
from kv_gym.reference.generator import TASKS
from kv_gym.reference.heldout import held_out
from kv_gym.reference.tokenizer import encode, word_ids
from kv_gym.training import train

GATE, HALF = "attention_gate, keeps 1/8 to 1/2", "attention_gate, keeps 1/2"
LEARNED: dict[str, tuple[str, dict[str, Any], int]] = {  # agent, settings, training runs
    GATE: ("attention_gate", {"steps": 300, "every": 100}, 3),
    HALF: ("attention_gate", {"steps": 300, "every": 100, "keep_rate": 0.5, "eviction": "hinge"}, 3),
    "kvzap": ("kvzap", {}, 3),
    "end_to_end": ("end_to_end", {"steps": 400, "every": 100}, 1),
}
HEURISTICS = ("h2o", "streaming_llm")
BUDGETS = (1 / 2, 1 / 4, 1 / 8)
WORDS = 512
FLAGS = {(GATE, 1 / 2): "threshold:0", (GATE, 1 / 8): "threshold:1.95", (HALF, 1 / 2): "threshold:0"}  # ln 7 is 1.95
PICTURE = "attention_gate.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/attention_gate"))
    parser.add_argument("--json", type=Path, help="write the rows to this file, and the picture beside it")
    parser.add_argument("--contexts", type=int, default=16, help="of each task")
    arguments = parser.parse_args()
    model, tokenizer = load_model(MODEL)
    traces = training_contexts(model, tokenizer, arguments.out / "contexts", list(TASKS), 0, hidden=True)
    learned: dict[tuple[str, int], Scorer] = {}
    for name, (agent, settings, runs) in LEARNED.items():
        for seed in range(runs):
            folder = arguments.out / f"{name.replace(', ', '-').replace(' ', '-').replace('/', '-')}-{seed}"
            learned[name, seed] = train(agent, traces, folder, seed=seed, model=model, **settings)
    file = arguments.json or arguments.out / "rows.json"
    before, rows = read_result(file)["rows"] if file.is_file() else [], []
    wanted = configurations(learned)
    for task in TASKS:
        same = [row for row in before if row["task"].startswith(f"{task} ") and row["n"] == arguments.contexts]
        if {(row["policy"], row["seed"]) for row in same} == {(each.name, each.seed) for each in wanted}:
            rows += same
        else:
            rows += measure(model, parse_tasks(f"{task}:{WORDS}", tokenizer, arguments.contexts), wanted)
            write_json(file, result(rows))
    rates = {name: keep_rates(model, learned[name, 0], arguments.contexts) for name in (GATE, HALF)}
    weights = {name: policy.nbytes() for (name, _), policy in learned.items()}
    seconds = {f"{name}, seed {seed}": policy.training["seconds"] for (name, seed), policy in learned.items()}
    write_json(file, result(rows, keep_rates=rates, weights=weights, training_seconds=seconds))
    draw(rates, file.with_name(PICTURE))
    print(section(file))


def configurations(learned: Mapping[tuple[str, int], Policy]) -> list[Configuration]:
    """All that is measured on a task; learned policies by name and seed."""
    everywhere, found = parse_allocation("global"), [full_cache()]
    for budget in BUDGETS:
        found += [Configuration(name, p, budget, everywhere, seed=seed) for (name, seed), p in learned.items()]
        found += [Configuration(name, make_policy(name), budget) for name in HEURISTICS]
    return found + [
        Configuration(name, policy, budget, parse_allocation(rule), seed=seed)
        for (gate, budget), rule in FLAGS.items()
        for (name, seed), policy in learned.items()
        if name == gate
    ]


@torch.no_grad()
def keep_rates(model, policy: Policy, contexts: int) -> dict[str, list[list[float]]]:
    """The share of the tokens that each head's flags keep, `[layers][heads]` by task, over held-out contexts."""
    rates = {}
    for task in TASKS:
        kept, count = 0.0, 0
        for context in held_out(task, WORDS, contexts).make(contexts):
            ids = [word_ids()["<bos>"], *encode(context.words)]
            with EvictingCache(model, policy, 1 / 2, "threshold:0") as cache:
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
    found: dict[tuple[str, str, float, str], list[Mapping[str, Any]]] = {}
    for row in data["rows"]:
        key = row["task"].split()[0], row["policy"], row["budget"], row["allocation"]
        found.setdefault(key, []).append(row)
    gate, *_ = learned = list(dict.fromkeys(row["policy"] for row in data["rows"] if row["policy"] in data["weights"]))
    lines = []
    for task in TASKS:
        full, ours = found[task, FULL, 1.0, "uniform"], found[task, gate, 0.5, "global"]
        theirs = [found[task, name, 0.5, "uniform"] for name in HEURISTICS]
        differences = [gap for other in theirs if (gap := paired_difference(ours, other))]
        accuracies = [f"{100 * fmean(row['accuracy'] for row in rows):.1f}" for rows in (full, ours, *theirs)]
        spread = [f"{100 * d.mean:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f})" for d in differences]
        lines.append((task, *accuracies, *spread, _verdict(differences)))
    table = []
    for name in (*learned, *HEURISTICS):
        rule, weights = "global" if name in learned else "uniform", f"{data['weights'].get(name, 0):,}"
        cells = [_mean(found[task, name, budget, rule] for task in TASKS) for budget in BUDGETS]
        table.append((name, rule, weights, _runs(found[TASKS[0], name, 0.5, rule]), *cells))
    for task, name, budget, rule in found:
        if task == TASKS[0] and rule.startswith("threshold:"):
            mean = _mean(found[each, name, budget, rule] for each in TASKS)
            cells = [mean if each == budget else "" for each in BUDGETS]
            table.append((name, rule, f"{data['weights'][name]:,}", _runs(found[task, name, budget, rule]), *cells))
    contexts, runs = found[TASKS[0], FULL, 1.0, "uniform"][0]["n"], len(found[TASKS[0], gate, 0.5, "global"])
    parts = [
        "## Attention-Gate on all tasks",
        "Made by `python benchmarks/attention_gate.py --json benchmarks/results/attention_gate.json`. The paper "
        "([2410.12876](https://arxiv.org/abs/2410.12876)): with about half of the tokens evicted, accuracy is above "
        f"that of H2O and StreamingLLM. The gate of this table (*{gate}* of the tokens) was trained on training "
        f"contexts of all tasks; training runs: {runs}. Accuracy in percent on {contexts} held-out contexts of {WORDS} "
        "words each, question unseen, at half of all slots; differences with 95 % intervals over contexts and training "
        "runs, paired over contexts.",
        pipe_table(
            ("task", "full cache", "gate", "H2O", "StreamingLLM", "gate - H2O", "gate - StreamingLLM", "no worse"),
            lines, None,
        ),
        "Beside other policies that were trained on the same contexts: mean accuracy over the tasks, and in "
        "parentheses the kilobytes of a context's cache. `end_to_end` had a third of its steps. With `threshold:SCORE` "
        "the flags of the gates decide, whatever the budget; 0 is the threshold of a gate's only or highest keep rate, "
        "and 1.95 (the logit of 7/8) that of an eighth where the highest is a half; the kilobytes say how much the "
        "flags really keep. A gate that was trained towards one rate, as in the paper, does not say what to keep at "
        "another.",
        pipe_table(
            ("policy", "allocation", "bytes of weights", "training runs", "1/2", "1/4", "1/8"), table, None,
        ),
        "What the flags at 0 keep, by layer and KV head, as a mean over the tasks, in the first training run:",
        f"![share of the tokens kept by layer and head](../benchmarks/results/{PICTURE})",
    ]  # fmt: skip
    return "\n\n".join(parts)


def _verdict(differences: Sequence[Any]) -> str:
    if any(each.high < 0 for each in differences):
        return "no"
    return "yes" if all(each.mean >= 0 for each in differences) else "open"


def _runs(rows: Sequence[Mapping[str, Any]]) -> str:
    return "" if rows[0]["seed"] is None else str(len(rows))


def _mean(tasks: Iterable[Sequence[Mapping[str, Any]]]) -> str:
    rows = [row for same in tasks for row in same]
    accuracy, size = (fmean(row[name] for row in rows) for name in ("accuracy", "cache_bytes"))
    return f"{100 * accuracy:.1f} ({size / 1000:,.0f})"


if __name__ == "__main__":
    main()
