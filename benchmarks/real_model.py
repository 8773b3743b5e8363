"""How much of the cache a real language model needs: SmolLM2-135M-Instruct, questions in natural language.

    make real-model
    python benchmarks/real_model.py --out runs/real_model --publish benchmarks/results/real_model

One command records contexts of the training wordings, trains `joint` with each of five utilities and takes the one that
ranks best on validation wordings, trains its other seeds and `rloo` (KVP), chooses the settings of every heuristic on
validation contexts, and measures all of them on test wordings: a context is read once, and every question is asked from
a fork of the compressed cache. Test contexts are measured in portions, a few of every task at a time, and rows are
published after each portion, so that the command may be stopped at any time; it goes on where it was. ``--contexts``
says how many are wanted in all.

Recording and training with one seed take eight CPU minutes, the choice of settings four, and a portion of four contexts
of `needles` and four of `needle` five, two of them for the second readings of KVzip: ``--tasks needles,needle
--contexts 40 --workers 2`` is about an hour on two idle cores with three seeds.

The model is a 4-bit copy of the published one, dequantised to float32 (`benchmarks/get_real_model.py`).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from kv_gym.evaluation import evaluate
from kv_gym.evaluation.leaderboard import leaderboard, publish
from kv_gym.evaluation.rows import FULL
from kv_gym.evaluation.summary import join_portions
from kv_gym.evaluation.tasks import parse_tasks
from kv_gym.evaluation.tasks.natural_language import TEXTS, ChatFrame
from kv_gym.evaluation.tasks.prompts import prompts_of_tasks
from kv_gym.files import read_json
from kv_gym.models import load_model
from kv_gym.models.loading import text_ids
from kv_gym.traces import prompts_from_text, record
from kv_gym.training import train

TRAINING = (
    "needle:640:keys=4:split=train:count=16",
    "needle:1024:keys=4:split=train:first=16:count=8",
    "told_once:640:split=train:count=12",
)
PROSE = {"context_tokens": 640, "continuation_tokens": 64, "count": 8}
SETTINGS: dict[str, Any] = {"steps": 200, "contexts": 4}
TARGETS = ("value", "mean", "output", "layers", "kvzip")
TRIED = "targets.json"  # what the policies of each utility answer on validation wordings
TASKS = {  # by the name of --tasks
    "needle": "needle:{tokens}",
    "needles": "needle:{tokens}:keys=4",
    "told_once": "told_once:{tokens}",
    "json": "json:{tokens}",
    "quote": "quote:{tokens}",
    "continue": "continue:{tokens}",
}
HEURISTICS = ("keydiff", "snapkv", "h2o", "tova", "expected_attention")
EQUAL = ("rloo", "joint, equal budgets")
VALIDATION = "needle:{tokens}:keys=4:split=validation"  # chooses the settings of heuristics
BUDGETS = ("1/2", "1/4", "1/8", "1/16")
TWICE = "kvzip, reads twice"  # its name in tables
REPEAT = "\n\nRepeat the previous context exactly."  # KVzip's own words (arXiv 2505.23416, code)
COPY = "4-bit copy of SmolLM2-135M-Instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/models/smollm2-135m-instruct", help="folder or hub id")
    parser.add_argument("--out", type=Path, default=Path("runs/real_model"))
    parser.add_argument(
        "--tasks", default=",".join(TASKS), help="which, in the order of measuring; told_once:8 takes 8 contexts of it"
    )
    parser.add_argument("--tokens", type=int, default=1024, help="length of a context")
    parser.add_argument("--contexts", type=int, default=100, help="test contexts of each task")
    parser.add_argument("--portion", type=int, default=4, help="contexts that are measured before rows are written")
    parser.add_argument("--seeds", type=int, default=3, help="training runs")
    parser.add_argument("--targets", default=",".join(TARGETS), help="utilities of `joint` to choose from")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--publish", type=Path, help="folder for compact rows, such as benchmarks/results/real_model")
    arguments = parser.parse_args()

    kvzip, target = prepare(arguments.model, arguments.out, arguments.targets.split(","), arguments.seeds)
    counts = {}
    for item in arguments.tasks.split(","):
        name, _, count = item.partition(":")
        counts[name] = int(count or arguments.contexts)
    for portion in range(-(-max(counts.values()) // arguments.portion)):
        spec = specification(arguments, counts, portion + 1, kvzip, target)
        rows = leaderboard(spec, arguments.out / f"rows-{arguments.tokens}", arguments.workers)
        if arguments.publish is not None:
            publish(named(join_portions(rows), kvzip, target), arguments.publish)
            if (arguments.out / TRIED).is_file():
                shutil.copyfile(arguments.out / TRIED, arguments.publish / TRIED)
        done = {row["task"]: row["n"] for row in join_portions(rows) if row["policy"] == FULL}
        print(", ".join(f"{task}: {n} contexts" for task, n in done.items()), flush=True)


def prepare(model_name: str, out: Path, targets: list[str], seeds: int) -> tuple[str, str]:
    """Record, train, and choose the utility of `joint`: the names of KVzip with its instruction, and of the utility."""
    model, tokenizer = load_model(model_name)
    prompts = list(prompts_of_tasks(parse_tasks(",".join(TRAINING), tokenizer)))
    prompts += prompts_from_text(TEXTS / "train.txt", tokenizer, **PROSE)
    recipe = {"tasks": list(TRAINING), "prose": PROSE["count"]}
    words = REPEAT + ChatFrame.of(tokenizer).answer
    kvzip = f"kvzip:instruction={' '.join(map(str, text_ids(tokenizer, words)))}"
    stats = (kvzip,) if "kvzip" in targets else ()  # a second reading's score, as a teacher
    traces = record(model, prompts, out / "traces", tokenizer=tokenizer, stats=stats, recipe=recipe)
    for target in targets:
        train("joint", traces, out / f"joint-{target}-0", model=model, target=target, **SETTINGS)
    best = chosen_target(model, tokenizer, out, targets)
    for seed in range(seeds):
        train("joint", traces, out / f"joint-{best}-{seed}", seed=seed, model=model, target=best, **SETTINGS)
        train("rloo", traces, out / f"rloo-{seed}", seed=seed, **SETTINGS)
    return kvzip, best


def chosen_target(model: Any, tokenizer: Any, out: Path, targets: list[str]) -> str:
    """The utility whose ranking answers most questions of validation wordings under one threshold; ties: lower NLL."""
    if len(targets) == 1:
        return targets[0]
    file = out / TRIED
    policies = {target: out / f"joint-{target}-0" for target in targets}
    if not file.is_file() or {row["policy"] for row in read_json(file)["rows"]} != {FULL, *targets}:
        tasks = parse_tasks("needle:1024:keys=4:split=validation:count=4", tokenizer)
        evaluate(policies, ["1/8", "1/16"], model=model, tasks=tasks, allocations=["global"], json=file)
    quality: dict[str, tuple[float, float]] = {}
    for row in read_json(file)["rows"]:
        known = quality.get(row["policy"], (0.0, 0.0))
        quality[row["policy"]] = (known[0] + row["accuracy"], known[1] - row["nll"])
    return max(targets, key=quality.__getitem__)


def specification(
    arguments: argparse.Namespace, counts: dict[str, int], portions: int, kvzip: str, target: str
) -> dict:  # fmt: skip
    """What the first portions of all tasks compare; `counts` says how many contexts each task has in all."""
    out, tasks = arguments.out, []
    for first in range(0, portions * arguments.portion, arguments.portion):
        for name, wanted in counts.items():
            count = min(arguments.portion, wanted - first)
            if count > 0:
                place = f":first={first}" if first else ""
                tasks.append(
                    {
                        "task": f"{TASKS[name].format(tokens=arguments.tokens)}:count={count}{place}",
                        "validation": VALIDATION.format(tokens=arguments.tokens),
                    }
                )
    return {
        "model": arguments.model,
        "tasks": tasks,
        "budgets": list(BUDGETS),
        "policies": [kvzip, *HEURISTICS],
        "allocations": ["global"],
        # heuristics run as chosen on validation contexts
        "allocations_of": {name: [] for name in HEURISTICS} | {name: ["uniform"] for name in EQUAL},
        "learned": {
            "joint": [str(out / f"joint-{target}-{{seed}}")],
            "joint, equal budgets": [str(out / f"joint-{target}-0")],
            "rloo": [str(out / "rloo-{seed}")],
        },
        "seeds": list(range(arguments.seeds)),
        "validation": {
            "contexts": 4,
            "budgets": ["1/4"],
            "allocations": ["uniform", "global", "global:softmax"],
            "protections": ["own", [4, 64]],
            "windows": [128],
        },
    }


def named(rows: list[dict], kvzip: str, target: str) -> list[dict]:
    """Rows as they are published: KVzip by its name, and what was chosen and which weights were used beside them."""
    about = {"weights": COPY, "target": target}
    return [row | about | ({"policy": TWICE, "instruction": REPEAT} if row["policy"] == kvzip else {}) for row in rows]


if __name__ == "__main__":
    main()
