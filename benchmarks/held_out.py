"""The held-out result: every policy at equal budgets on unseen multi-key recall, 512 and 1,024 words.

    python benchmarks/held_out.py --out runs/held_out

Records training contexts (never the held-out seeds), trains `joint` and `expected`, replays and decodes all
policies on the pinned held-out contexts, checks the claims made of them, and writes ``held_out.json`` (rows, claims,
training seconds) and a report. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import chain
from pathlib import Path

from kv_gym.evaluation import evaluate, write_report
from kv_gym.evaluation.result import read_json, result, write_json
from kv_gym.evaluation.tasks import reference_tasks
from kv_gym.reference import MODEL
from kv_gym.reference.prompts import reference_prompts
from kv_gym.traces import load_model, record
from kv_gym.training import train

HEURISTICS = ("uniform_order", "recency", "streaming_llm", "h2o", "snapkv", "tova", "knorm", "keydiff")
BUDGETS = (1 / 4, 1 / 8, 1 / 16)
LENGTHS = (512, 1024)
AGENTS = ("joint", "expected")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/held_out"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--task", default="multi_key")
    arguments = parser.parse_args()
    out, seed, task = arguments.out, arguments.seed, arguments.task
    model, _ = load_model(MODEL)

    prompts = chain(
        reference_prompts(task, 512, 192, 8, "train", seed), reference_prompts(task, 1024, 64, 8, "train", seed + 500)
    )
    training = record(model, list(prompts), out / f"train-{seed}")
    folders, seconds = {}, {}
    for agent in AGENTS:
        began = time.monotonic()
        train(agent, training, out / f"{agent}-{seed}", seed=seed)
        seconds[agent] = round(time.monotonic() - began, 1)
        folders[agent] = out / f"{agent}-{seed}"

    results, claims = [], {}
    arms = folders | {name: name for name in HEURISTICS}
    for tokens in LENGTHS:
        held_out = record(model, list(reference_prompts(task, tokens, 64, 8, "test")), out / f"test-{tokens}")
        replayed = evaluate(arms | {"oracle": "oracle"}, BUDGETS, traces=held_out)
        live = evaluate(arms, BUDGETS, model=model, tasks=reference_tasks(task, tokens))
        claims[tokens] = {agent: check(agent, replayed["rows"], live["rows"]) for agent in AGENTS}
        for one in (replayed, live):
            for row in one["rows"]:
                row["task"] = f"{row['task']} {tokens}"
        results += [replayed, live]
    rows = [row for one in results for row in one["rows"]]
    file = write_json(out / "held_out.json", result(rows, claims=claims, training_seconds=seconds, seed=seed))
    print(json.dumps({"claims": claims, "training_seconds": seconds}, indent=1))
    print(write_report([read_json(file)], out, title="Held-out recall at equal budgets").read_text())


def check(agent: str, replayed: list[dict], live: list[dict]) -> dict:
    """The figures of one agent, in points of accuracy and shares of the distance to the oracle."""
    accuracy = {(row["policy"], row["budget"]): 100 * row["accuracy"] for row in live}
    utility = {(row["policy"], row["budget"]): row["utility_kept"] for row in replayed}
    attention = ("h2o", "snapkv", "tova", "knorm", "streaming_llm")
    best = max(utility[name, 1 / 8] for name in HEURISTICS)
    return {
        "points below the full cache at 1/4": accuracy["full_cache", 1.0] - accuracy[agent, 1 / 4],
        "points above the best heuristic at 1/4": accuracy[agent, 1 / 4] - max(accuracy[n, 1 / 4] for n in attention),
        "points above the best heuristic at 1/8": accuracy[agent, 1 / 8] - max(accuracy[n, 1 / 8] for n in attention),
        "points above keydiff at 1/8": accuracy[agent, 1 / 8] - accuracy["keydiff", 1 / 8],
        "share of the distance to the oracle at 1/8": (utility[agent, 1 / 8] - best)
        / (utility["oracle", 1 / 8] - best),
    }


if __name__ == "__main__":
    main()
