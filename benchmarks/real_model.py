"""How much of the cache a real language model needs: SmolLM2-135M-Instruct, questions in natural language.

    make real-model
    python benchmarks/real_model.py --out runs/real_model --publish benchmarks/results/real_model

One command records contexts of the training wordings, trains `joint` with each of five utilities and takes the one that
ranks best on validation wordings, trains its other seeds, `end_to_end` from each of them and `rloo` (KVP), chooses the
settings of every heuristic on validation contexts, and measures all of them on test wordings: a context is read once,
and every question is asked from a fork of the compressed cache. Test contexts are measured in portions, a few of every
task at a time, and rows are published after each portion, so that the command may be stopped at any time; it goes on
where it was. ``--contexts`` says how many are wanted in all.

CPU minutes, of which two cores do two a minute: recording 4; `joint` 2.5 for each seed, `rloo` as many, `end_to_end`
7; the choice of settings 3. Of 1,024 tokens, reading a context takes 0.08, its second reading by KVzip 0.2, and a
question 0.003 for each of about 100 configurations: four contexts of `needles` 7 in all. So the README's table with 35
contexts and three seeds is an hour on two cores (``--tasks needles --contexts 35 --targets layers --workers 2``), and
35 contexts of all tasks are four. A GPU measures 200 contexts in two minutes; contexts are then better read many at a
time, by several processes, and more of them can be trained on: ``--workers 8 --rows 25 --portion 50 --training 6``.

The model is a 4-bit copy of the published one, dequantised to float32 (`benchmarks/get_real_model.py`).
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from kv_gym.evaluation import evaluate
from kv_gym.evaluation.leaderboard import leaderboard, publish, read_rows
from kv_gym.evaluation.rows import FULL
from kv_gym.evaluation.summary import join_portions
from kv_gym.evaluation.tasks import parse_tasks
from kv_gym.evaluation.tasks.natural_language import TEXTS, ChatFrame
from kv_gym.evaluation.tasks.prompts import prompts_of_tasks
from kv_gym.files import read_json
from kv_gym.models import load_model
from kv_gym.models.loading import text_ids
from kv_gym.policies.scoring.inputs import WHEREVER
from kv_gym.traces import prompts_from_text, record
from kv_gym.training import train
from kv_gym.workers import WorkerPool

TRAINING = {  # tasks and how many contexts of each
    "needle:640:keys=4:split=train": 16,
    "needle:1024:keys=4:split=train:seed=1": 8,
    "told_once:640:split=train": 10,
    "json:640:split=train": 4,
}
PROSE = {"context_tokens": 640, "continuation_tokens": 64, "count": 8}
SETTINGS: dict[str, Any] = {"steps": 200, "every": 50, "contexts": 4}
FINE_TUNING: dict[str, Any] = {
    "steps": 120, "every": 40, "contexts": 4, "rate": 0.003, "smallest": 1 / 64, "largest": 1 / 4,
}  # fmt: skip
TARGETS = ("value", "mean", "output", "layers", "kvzip")
TRIED = "targets.json"  # what the policies of each utility answer on validation wordings
TASKS = {  # by the name of --tasks
    "needle": "needle:{tokens}",
    "pair": "needle:{tokens}:keys=2",
    "needles": "needle:{tokens}:keys=4",
    "told_once": "told_once:{tokens}",
    "json": "json:{tokens}",
    "quote": "quote:{tokens}",
    "continue": "continue:{tokens}",
    "validation": "needle:{tokens}:keys=4:split=validation:seed=1",  # which agent is best, before test wordings tell
}
AGENTS = ("joint", "rloo", "end_to_end")
LONG = "long"  # folder of what --long records and trains
FITTED = "fit/fit/policy"  # what `real_model_fit.py` wrote
HEURISTICS = ("keydiff", "snapkv", "h2o", "tova", "expected_attention")
EQUAL = ("rloo", "joint, equal budgets", "end_to_end, equal budgets")
VALIDATION = "needle:1024:keys=4:split=validation:rows={rows}"  # chooses the settings of heuristics, for any length
BUDGETS = ("1/2", "1/4", "1/8", "1/16", "1/32")
TWICE = "kvzip, reads twice"  # its name in tables
REPEAT = "\n\nRepeat the previous context exactly."  # KVzip's own words (arXiv 2505.23416, code)
COPY = "4-bit copy of SmolLM2-135M-Instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/models/smollm2-135m-instruct", help="folder or hub id")
    parser.add_argument("--out", type=Path, default=Path("runs/real_model"))
    parser.add_argument(
        "--tasks",
        default=",".join(list(TASKS)[:-1]),
        help="which, in the order of measuring; told_once:8 takes 8 contexts of it",
    )
    parser.add_argument("--tokens", default="1024", help="lengths of contexts, such as 1024,2048")
    parser.add_argument("--contexts", type=int, default=100, help="test contexts of each task")
    parser.add_argument("--budgets", default=",".join(BUDGETS), help="shares of all slots")
    parser.add_argument("--learned-only", action="store_true", help="leave KVzip and heuristics out")
    parser.add_argument("--portion", type=int, default=4, help="contexts that are measured before rows are written")
    parser.add_argument("--rows", type=int, default=4, help="contexts of 1,024 tokens that a process measures at once")
    parser.add_argument("--validation", type=int, default=4, help="contexts that settings are chosen on")
    parser.add_argument("--training", type=int, default=1, help="so many times the contexts, and steps, of training")
    parser.add_argument(
        "--long", type=int, help="train one more `joint` on contexts of so many tokens, as few as usual"
    )
    parser.add_argument("--fitted", action="store_true", help="measure the policy of real_model_fit.py, too")
    parser.add_argument("--agents", default=",".join(AGENTS), help="that are trained")
    parser.add_argument("--seeds", type=int, default=3, help="training runs")
    parser.add_argument("--targets", default=",".join(TARGETS), help="utilities of `joint` to choose from")
    parser.add_argument("--trained", action="store_true", help="measure the policies in --out, trained elsewhere")
    parser.add_argument("--workers", type=int, help="processes; by default this one")
    parser.add_argument("--publish", type=Path, help="folder for compact rows, such as benchmarks/results/real_model")
    arguments = parser.parse_args()

    kvzip, target = prepare(arguments)
    counts = {}
    for tokens in arguments.tokens.split(","):
        for item in arguments.tasks.split(","):
            name, _, count = item.partition(":")
            counts[TASKS[name].format(tokens=tokens), int(tokens)] = int(count or arguments.contexts)
    for portion in range(-(-max(counts.values()) // arguments.portion)):
        spec = specification(arguments, counts, portion + 1, kvzip, target)
        rows = leaderboard(spec, arguments.out / "rows", arguments.workers)
        if arguments.publish is not None:
            measured = named(join_portions(rows), kvzip, target)
            known = {replaced(row) for row in measured}
            others = [row for row in read_rows(arguments.publish) if replaced(row) not in known]
            publish([*measured, *others], arguments.publish)
            if (arguments.out / TRIED).is_file():
                shutil.copyfile(arguments.out / TRIED, arguments.publish / TRIED)
        done = {row["task"]: row["n"] for row in join_portions(rows) if row["policy"] == FULL}
        print(", ".join(f"{task}: {n} contexts" for task, n in done.items()), flush=True)


def prepare(arguments: argparse.Namespace) -> tuple[str, str]:
    """Record, train, and choose the utility of `joint`: the names of KVzip with its instruction, and of the utility."""
    out, agents, targets = arguments.out, arguments.agents.split(","), arguments.targets.split(",")
    seeds, times = range(arguments.seeds), arguments.training
    model, tokenizer = load_model(arguments.model)
    words = REPEAT + ChatFrame.of(tokenizer).answer
    kvzip = f"kvzip:instruction={' '.join(map(str, text_ids(tokenizer, words)))}"
    stats = (kvzip,) if "kvzip" in targets else ()  # a second reading's score, as a teacher
    if arguments.trained:
        return kvzip, chosen_target(model, tokenizer, arguments, targets)
    record_all(model, tokenizer, out / "traces", stats, times, None, arguments.workers)
    settings = SETTINGS | {name: times * SETTINGS[name] for name in ("steps", "every")}
    own = settings | {"inputs": list(WHEREVER)}  # KVP reads keys as they are cached
    if len(targets) > 1:
        train_all(arguments, model, [Run("joint", 0, f"joint-{each}-0", own | {"target": each}) for each in targets])
    best = chosen_target(model, tokenizer, arguments, targets)
    joint = [f"joint-{best}-{seed}" for seed in seeds]
    runs = [Run("joint", seed, joint[seed], own | {"target": best}) for seed in seeds]
    runs += [Run("rloo", seed, f"rloo-{seed}", settings) for seed in seeds if "rloo" in agents]
    if arguments.long is not None:
        record_all(model, tokenizer, out / LONG / "traces", (), 1, arguments.long, arguments.workers)
        runs.append(Run("joint", 0, f"{LONG}/joint", own | {"target": best}, traces=f"{LONG}/traces"))
    train_all(arguments, model, runs)
    if "end_to_end" in agents:
        finer = FINE_TUNING | {name: times * FINE_TUNING[name] for name in ("steps", "every")}
        train_all(
            arguments, model, [Run("end_to_end", seed, f"end_to_end-{seed}", finer, joint[seed]) for seed in seeds]
        )
    return kvzip, best


def record_all(
    model: Any, tokenizer: Any, out: Path, stats: tuple[str, ...], times: int, tokens: int | None, workers: int | None
) -> None:
    """Record the training contexts, so many times as many as usual, of their own lengths or all of `tokens` tokens."""
    tasks = [f"{task}:count={times * count}" for task, count in TRAINING.items()]
    prose = PROSE | {"count": times * PROSE["count"]}
    if tokens is not None:
        tasks = [re.sub(r":\d+", f":{tokens}", task, count=1) for task in tasks]
        prose["context_tokens"] = tokens
    prompts = list(prompts_of_tasks(parse_tasks(",".join(tasks), tokenizer)))
    prompts += prompts_from_text(TEXTS / "train.txt", tokenizer, **prose)
    recipe = {"tasks": tasks, "prose": prose["count"]}
    record(model, prompts, out, tokenizer=tokenizer, stats=stats, recipe=recipe, workers=workers)


class Run(NamedTuple):
    """A training run: agent, seed, folder, settings, the folder of the policy that it starts from, and of traces."""

    agent: str
    seed: int
    folder: str
    settings: dict[str, Any]
    start: str | None = None
    traces: str = "traces"


def train_all(arguments: argparse.Namespace, model: Any, runs: list[Run]) -> None:
    """Train what is not there yet, by several processes; what is there is checked to be the same run's."""
    done = [run for run in runs if (arguments.out / run.folder / "policy.json").is_file()]
    missing = [run for run in runs if run not in done]
    check = trainer(model, arguments.out)
    for run in done:
        check(run)
    pool: WorkerPool = WorkerPool(
        loaded_trainer, lambda: (arguments.model, arguments.out), arguments.workers, here=check, tasks=len(missing)
    )
    with pool:
        for _ in pool.run(missing):
            pass


def loaded_trainer(model_name: str, out: Path) -> Callable[[Run], None]:
    """What a process of its own does: it loads the model once, and trains."""
    return trainer(load_model(model_name)[0], out)


def trainer(model: Any, out: Path) -> Callable[[Run], None]:
    """Does a training run."""

    def run(run: Run) -> None:
        start = None if run.start is None else out / run.start
        train(run.agent, out / run.traces, out / run.folder, seed=run.seed, init=start, model=model, **run.settings)

    return run


def chosen_target(model: Any, tokenizer: Any, arguments: argparse.Namespace, targets: list[str]) -> str:
    """The utility whose ranking answers most questions of validation wordings under one threshold; ties: lower NLL."""
    if len(targets) == 1:
        return targets[0]
    out, count = arguments.out, arguments.validation
    file, tasks = out / TRIED, parse_tasks(f"needle:1024:keys=4:split=validation:count={count}", tokenizer)
    policies = {target: out / f"joint-{target}-0" for target in targets}
    known = read_json(file) if file.is_file() else {"rows": [], "contexts": 0}
    if known["contexts"] != count or {row["policy"] for row in known["rows"]} != {FULL, *targets}:
        evaluate(
            policies, ["1/8", "1/16"], model=model, tasks=tasks, allocations=["global"], json=file,
            workers=arguments.workers,
        )  # fmt: skip
    quality: dict[str, tuple[float, float]] = {}
    for row in read_json(file)["rows"]:
        before = quality.get(row["policy"], (0.0, 0.0))
        quality[row["policy"]] = (before[0] + row["accuracy"], before[1] - row["nll"])
    return max(targets, key=quality.__getitem__)


def specification(
    arguments: argparse.Namespace, counts: dict[tuple[str, int], int], portions: int, kvzip: str, target: str
) -> dict:  # fmt: skip
    """What the first portions of all tasks compare; `counts` says, by task and length, how many contexts it has."""
    out, agents, tasks = arguments.out, arguments.agents.split(","), []
    for first in range(0, portions * arguments.portion, arguments.portion):
        for (name, tokens), wanted in counts.items():
            count = min(arguments.portion, wanted - first)
            if count > 0:
                place = f":first={first}" if first else ""
                rows = max(1, arguments.rows * 1024 // tokens)  # of about as many bytes at any length
                tasks.append(
                    {
                        "task": f"{name}:count={count}:rows={rows}{place}",
                        "validation": VALIDATION.format(rows=arguments.rows),
                    }
                )
    learned = {
        "joint": [str(out / f"joint-{target}-{{seed}}")],
        "joint, equal budgets": [str(out / f"joint-{target}-0")],
    }
    for agent in agents[1:]:
        learned[agent] = [str(out / f"{agent}-{{seed}}")]
    if arguments.long is not None:
        learned[f"joint, trained at {arguments.long} tokens"] = [str(out / LONG / "joint")]
    if arguments.fitted:
        learned["end_to_end, fitted"] = [str(out / FITTED)]
    if "end_to_end" in agents:
        learned["end_to_end, equal budgets"] = [str(out / "end_to_end-0")]
    return {
        "model": arguments.model,
        "tasks": tasks,
        "budgets": arguments.budgets.split(","),
        "policies": ["recency"] if arguments.learned_only else [kvzip, *HEURISTICS],
        "allocations": ["global"],
        # heuristics run as chosen on validation contexts
        "allocations_of": {name: [] for name in HEURISTICS} | {name: ["uniform"] for name in EQUAL},
        "learned": learned,
        "seeds": list(range(arguments.seeds)),
        "validation": {
            "contexts": arguments.validation,
            "budgets": ["1/4"],
            "allocations": ["uniform", "global", "global:softmax"],
            "protections": ["own", [4, 64]],
            "windows": [128],
        },
    }


def replaced(row: dict) -> tuple:
    """What a new row has in common with the published ones that it replaces; other budgets and policies stay."""
    return row["task"], row["policy"], row["budget"]


def named(rows: list[dict], kvzip: str, target: str) -> list[dict]:
    """Rows as they are published: KVzip by its name, and what was chosen and which weights were used beside them."""
    about = {"weights": COPY, "target": target}
    return [row | about | ({"policy": TWICE, "instruction": REPEAT} if row["policy"] == kvzip else {}) for row in rows]


if __name__ == "__main__":
    main()
