"""Length transfer: policies trained on short contexts, used on long ones, beside policies that were trained there.

    python benchmarks/transfer.py --out runs/transfer

Multi-key recall, one threshold over all slots at totals of 1/16 and 1/32. `end_to_end` is trained for 400 steps on 256
contexts of 512 words, and, with the same settings, on 128 contexts of 1,024 words; all are used on held-out contexts of
1,024 to 2,048 words. Five seeds, paired by seed: mean difference in points and its 95 % interval (Student's t). The
bundled model answers everything at 1,024 words, five sixths at 1,536 and little at 2,048, where its own range has
ended: the row of the full cache says so. Goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from zoo import training_contexts

from kv_gym.budgets import format_budget
from kv_gym.evaluation import evaluate
from kv_gym.evaluation.rows import read_result, result, write_json
from kv_gym.evaluation.statistics import mean_interval
from kv_gym.evaluation.tasks import reference_tasks
from kv_gym.markdown import pipe_table
from kv_gym.models import load_model
from kv_gym.reference import MODEL
from kv_gym.training import train

AGENTS = ("end_to_end",)
STEPS = 400  # a third of the agent's own, and enough for these totals
TRAINED_ON = {"512": ((512, 256),), "1024": ((1024, 128),)}
USED_AT = (1024, 1536, 2048)
BUDGETS = (1 / 16, 1 / 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--count", type=int, default=32, help="held-out contexts of each length, of 8 questions each")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/transfer.json"))
    arguments = parser.parse_args()
    model, tokenizer = load_model(MODEL)
    rows: list[dict] = []
    for seed in range(arguments.seeds):
        for lengths, contexts in TRAINED_ON.items():
            folder = arguments.out / f"train-{lengths}-{seed}"
            training = training_contexts(model, tokenizer, folder, ["multi_key"], seed, contexts)
            for agent in AGENTS:
                policy = arguments.out / f"{agent}-{lengths}-{seed}"
                train(agent, training, policy, seed=seed, model=model, steps=STEPS)
                rows += answered(model, policy, agent, lengths, seed, arguments.count)
    about = {"seeds": arguments.seeds, "differences": differences(rows)}
    named = [{"agent" if name == "policy" else name: value for name, value in row.items()} for row in rows]
    write_json(arguments.json, result(named, **about))
    print(markdown(about["differences"]))


def answered(model, policy: Path, agent: str, lengths: str, seed: int, count: int) -> list[dict]:
    """Rows of one trained policy at every length it is used at, kept in a file beside it."""
    file = policy / f"answered-{count}.json"
    if not file.exists():
        rows = []
        for words in USED_AT:
            tasks = reference_tasks("multi_key", words, count)
            found = evaluate({agent: policy}, BUDGETS, model=model, tasks=tasks, allocations=["global"])["rows"]
            rows += [row | {"words": words, "trained_on": lengths, "seed": seed} for row in found]
        write_json(file, result(rows))
    return read_result(file)["rows"]


def differences(rows: list[dict]) -> list[dict]:
    """What training on short contexts costs on long ones, by agent, length and budget: points, paired by seed."""
    right = {
        (row["policy"], row["words"], row["budget"], row["trained_on"], row["seed"]): 100 * row["accuracy"]
        for row in rows
    }
    table = []
    for agent in AGENTS:
        for words in USED_AT:
            full = statistics.mean(v for k, v in right.items() if k[:2] == ("full_cache", words))
            for budget in BUDGETS:
                seeds = sorted({key[4] for key in right if key[:3] == (agent, words, budget)})
                short = [right[agent, words, budget, "512", seed] for seed in seeds]
                there = [right[agent, words, budget, "1024", seed] for seed in seeds]
                gaps = [a - b for a, b in zip(short, there, strict=True)]
                mean, spread = mean_interval(gaps)
                table.append(
                    {"agent": agent, "words": words, "budget": budget, "full_cache": full,
                     "trained_on_512": statistics.mean(short), "trained_on_1024": statistics.mean(there),
                     "difference": mean, "interval": spread}
                )  # fmt: skip
    return table


def markdown(table: list[dict]) -> str:
    body = []
    for row in table:
        spread = "" if row["interval"] is None else f" +- {row['interval']:.1f}"
        rights = [f"{row[name]:.1f}" for name in ("full_cache", "trained_on_512", "trained_on_1024")]
        total = format_budget(row["budget"])
        body.append([row["agent"], f"{row['words']:,}", total, *rights, f"{row['difference']:+.1f}{spread}"])
    head = ["agent", "words", "total", "full cache", "trained on 512", "trained on 1,024", "difference"]
    return pipe_table(head, body)


if __name__ == "__main__":
    main()
