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
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from kv_gym.budgets import format_budget
from kv_gym.errors import UserError
from kv_gym.evaluation.leaderboard import leaderboard, publish, read_rows
from kv_gym.evaluation.statistics import mean_interval
from kv_gym.evaluation.summary import FULL, NULLS
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
    parser.add_argument("--publish", type=Path, default=Path("benchmarks/results/novels"), help="for compact rows")
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
    publish(rows, arguments.publish)
    print(markdown(read_rows(arguments.publish)))


def contexts(model, tokenizer, novels: Path, folder: Path, seed: int) -> TraceSet:
    """Contexts of three lengths from two novels of a seed's own, each with what came after it."""
    names = sorted(file.stem for file in novels.glob("*.txt") if file.stem not in (*HELD_OUT, *VALIDATION))
    prompts = []
    for name in (names[(2 * seed + i) % len(names)] for i in range(2)):
        for tokens in LENGTHS:
            windows = prompts_from_text(novels / f"{name}.txt", tokenizer, tokens, AHEAD, 24, "train")
            prompts += [replace(window, id=f"{window.id}-{tokens}") for window in windows]
    return record(model, prompts, folder, tokenizer=tokenizer)


def markdown(rows: list[dict]) -> str:
    """NLL in nats per token over all stretches, and what the smallest cache costs, paired by stretch.

    Heuristics have the setting that did best on the validation novel, null hypotheses and learned policies all.
    """
    tuned = {row["policy"] for row in rows if row.get("chosen_on_validation")} - set(NULLS)
    configurations: dict[tuple[str, str], dict[float, dict[str, list[float]]]] = {}
    for row in rows:
        if row.get("contexts") and (row["policy"] not in tuned or row.get("chosen_on_validation")):
            ends = f", ends {row['sinks']} + {row['recent']}" if row["sinks"] is not None else ""
            stretches = configurations.setdefault((row["policy"], row["allocation"] + ends), {}).setdefault(
                row["budget"], {}
            )
            for name, (_, asked, lost) in row["contexts"].items():
                stretches.setdefault(f"{row['task']} {name}", []).append(lost / asked)
    means = {
        configuration: {b: {k: fmean(v) for k, v in of.items()} for b, of in found.items()}
        for configuration, found in configurations.items()
    }
    (full,) = means.pop((FULL, "uniform")).values()
    budgets = sorted({budget for found in means.values() for budget in found}, reverse=True)
    body = []
    for (policy, rule), found in sorted(means.items(), key=lambda item: fmean(item[1][budgets[-1]].values())):
        cells = [f"{fmean(found[budget].values()):.3f}" for budget in budgets]
        gap, half = mean_interval([nats - full[name] for name, nats in found[budgets[-1]].items()])
        body.append([policy, rule, *cells, f"{gap:+.3f} ± {half:.3f}"])
    body.insert(0, [FULL, "", *[f"{fmean(full.values()):.3f}"] * len(budgets), ""])
    head = ["policy", "allocation", *map(format_budget, budgets), f"cost at {format_budget(budgets[-1])}"]
    return pipe_table(head, body, 2)


if __name__ == "__main__":
    main()
