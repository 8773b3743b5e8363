"""Perplexity of held-out novels under bounded caches, with a real pretrained model of 260,000 parameters.

    python benchmarks/novels.py --data ../shared/data --out runs/novels

The model (stories260K, Llama architecture) was trained on 512 tokens. Stretches of 512 tokens are read in blocks of 32,
and the cache is cut after each to a share of the stretch. Learned policies are trained on other novels: contexts of
128, 256 and 384 tokens with the 64 tokens that came after each. Five seeds. All policies run, every heuristic with the
allocation and the protected ends that cost least on a third set of novels. Needs the data folder (it is no part of the
project); goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from kv_gym.budgets import format_budget
from kv_gym.errors import UserError
from kv_gym.evaluation.leaderboard import leaderboard
from kv_gym.evaluation.leaderboard.rows import write_rows
from kv_gym.markdown import pipe_table
from kv_gym.traces import TraceSet, load_model, prompts_from_text, record
from kv_gym.training import train

AGENTS = ("joint", "end_to_end", "rloo")
BUDGETS = ("1/2", "1/4", "1/8", "1/16")
HELD_OUT = ("Woolf_Lighthouse_1927", "Stevenson_Treasure_1883", "Hardy_Tess_1891", "Kipling_Kim_1901")
VALIDATION = ("Trollope_Warden_1855",)
STRETCH = "tokens=512:block=32"
LENGTHS = (128, 256, 384)
AHEAD = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with models/stories260K and corpora/novels")
    parser.add_argument("--out", type=Path, default=Path("runs/novels"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--stretches", type=int, default=12, help="of each held-out novel")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/results/novels.jsonl"))
    arguments = parser.parse_args()
    novels = arguments.data / "corpora" / "novels"
    folder = arguments.data / "models" / "stories260K"
    for needed in (novels, folder):
        if not needed.is_dir():
            raise UserError(f"{needed} is not there; give the folder that holds it with --data")
    model, tokenizer = load_model(folder)
    for seed in range(arguments.seeds):
        traces = contexts(model, tokenizer, novels, arguments.out / f"train-{seed}", seed)
        for agent in AGENTS:
            train(agent, traces, arguments.out / f"{agent}-{seed}", seed=seed, model=model)
    rows = leaderboard(
        {
            "model": str(folder),
            "tasks": [
                {
                    "task": f"text:{novels / name}.txt:{STRETCH}:count={arguments.stretches}",
                    "validation": f"text:{novels / VALIDATION[0]}.txt:{STRETCH}",
                }
                for name in HELD_OUT
            ],
            "budgets": list(BUDGETS),
            "allocations": ["uniform", "global"],
            "policies": ["all"],
            "learned": {agent: [str(arguments.out / f"{agent}-{{seed}}")] for agent in AGENTS},
            "seeds": list(range(arguments.seeds)),
            "validation": {"contexts": 4, "budgets": ["1/8"], "protections": ["own", [0, 0], [4, 32]]},
        },
        arguments.out / "results",
        arguments.workers,
    )
    kept = ("policy", "seed", "budget", "allocation", "sinks", "recent", "task", "n", "asked", "nll", "refused")
    write_rows(arguments.rows, [{name: row[name] for name in kept if name in row} for row in rows])
    print(markdown(rows))


def contexts(model, tokenizer, novels: Path, folder: Path, seed: int) -> TraceSet:
    """Contexts of three lengths from two novels of a seed's own, each with what came after it."""
    names = sorted(file.stem for file in novels.glob("*.txt") if file.stem not in (*HELD_OUT, *VALIDATION))
    prompts = []
    for name in (names[(2 * seed + i) % len(names)] for i in range(2)):
        for tokens in LENGTHS:
            windows = prompts_from_text(novels / f"{name}.txt", tokenizer, tokens, AHEAD, 24, "train")
            prompts += [replace(window, id=f"{window.id}-{tokens}") for window in windows]
    return record(model, prompts, folder, tokenizer=tokenizer)


def read(file: Path) -> list[dict]:
    """The rows that were written."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def markdown(rows: list[dict]) -> str:
    """NLL in nats per token over all held-out novels, by policy and allocation; the best settings of each policy."""
    sums: dict[tuple[str, str], dict[float, list[float]]] = {}
    for row in rows:
        if row.get("nll") is not None:
            sums.setdefault((row["policy"], row["allocation"]), {}).setdefault(row["budget"], []).append(row["nll"])
    budgets = sorted({budget for found in sums.values() for budget in found if budget < 1}, reverse=True)
    table = {arm: {b: sum(v) / len(v) for b, v in found.items()} for arm, found in sums.items()}
    body = []
    for (policy, rule), found in sorted(table.items(), key=lambda item: sum(item[1].values()) / len(item[1])):
        cells = [f"{found.get(budget, found.get(1.0, float('nan'))):.3f}" for budget in budgets]
        body.append([policy, rule, *cells])
    return pipe_table(["policy", "allocation", *map(format_budget, budgets)], body, 2)


if __name__ == "__main__":
    main()
