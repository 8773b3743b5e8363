"""What the division of a total among heads is worth: ``python benchmarks/allocation.py --json FILE``.

The reference model on the pinned held-out contexts of multi-key recall, 512 words; policies as they are, their own
protection, every allocation at the same total. Utility by replay, accuracy by decoding with the live cache, question
unseen while compressing. `ada` and `global` compare scores as they are where these are comparable; elsewhere
``global:raw`` does it all the same, to show what that costs. `calibrated` holds thresholds that were found on other
contexts, for comparable scores; its total floats, and the table says where it came out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from kv_gym import make_policy
from kv_gym.budgets import format_budget
from kv_gym.evaluation import evaluate
from kv_gym.evaluation.calibrate import calibrate, realised
from kv_gym.evaluation.measure import replay
from kv_gym.evaluation.report import merged
from kv_gym.evaluation.rows import result, write_json
from kv_gym.evaluation.tasks import reference_tasks, tasks_hash
from kv_gym.markdown import pipe_table
from kv_gym.models import load_model
from kv_gym.reference import MODEL
from kv_gym.reference.prompts import reference_prompts
from kv_gym.traces import open_traces, record

TASK, TOKENS = "multi_key", 512
BUDGETS = (1 / 8, 1 / 16, 1 / 32)
COMPARABLE = ("uniform", "global", "global:zscore", "global:softmax", "ada", "ada:zscore", "pyramid", "cake", "d2o")
OTHERS = ("uniform", "global:raw", "global:zscore", "global:softmax", "ada:zscore", "pyramid", "cake", "d2o")
ALL = tuple(dict.fromkeys((*COMPARABLE, *OTHERS, "calibrated")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, default=32, help="of eight questions each")
    parser.add_argument("--agent", type=Path, default=Path(__file__).parent.parent / "agents" / "trained" / "joint")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    began = time.perf_counter()
    model, tokenizer = load_model(MODEL)
    policies = {name: make_policy(name) for name in ("h2o", "snapkv", "keydiff", "value_norm", "random")}
    policies = {"joint": make_policy(arguments.agent)} | policies
    tasks = reference_tasks(TASK, TOKENS, arguments.contexts)
    with TemporaryDirectory() as folder:
        sets = {}
        for split in ("train", "test"):
            # training contexts of a seed of their own, which no agent was trained on
            prompts = list(reference_prompts(TASK, TOKENS, arguments.contexts, 8, split, 700))
            record(model, prompts, Path(folder) / split, tokenizer=tokenizer, progress=False)
            sets[split] = open_traces(Path(folder) / split)
        rows, floating = [], []
        for rules, group in groups(policies, sets["train"]):
            rows += replay(group, sets["test"], BUDGETS, allocations=rules)
            rows += evaluate(group, BUDGETS, model=model, tasks=tasks, allocations=rules, progress=False)["rows"]
            if not isinstance(rules[0], str):
                floating += came_out(group, rules[0], sets["test"])
        rows = merged({"rows": rows})
        for row, where in ((row, where) for row in rows for where in floating):
            if all(row[name] == where[name] for name in where if name != "kept_share"):
                row["kept_share"] = where["kept_share"]
        about = {"traces": sets["test"].hash, "calibrated_on": sets["train"].hash, "tasks": tasks_hash(tasks)}
    print(markdown(rows))
    print(f"\n{len(tasks)} contexts, {time.perf_counter() - began:.0f} s")
    if arguments.json:
        write_json(arguments.json, result(rows, **about, contexts=len(tasks)))


def groups(policies: dict, training) -> list[tuple]:
    """Allocations, and the policies that they can serve."""
    comparable = {name: policy for name, policy in policies.items() if policy.comparable}
    others = {name: policy for name, policy in policies.items() if not policy.comparable}
    alone = [
        ([calibrate(policy, training, BUDGETS, progress=False)], {name: policy}) for name, policy in comparable.items()
    ]
    return [(COMPARABLE, comparable), (OTHERS, others), *alone]


def came_out(group: dict, rule, sequences) -> list[dict]:
    """The share of its slots that a context keeps on average under thresholds fixed ahead."""
    ((name, policy),) = group.items()
    kept = realised(rule, policy, sequences, list(BUDGETS), *policy.protection).mean(0).tolist()
    return [
        {"policy": name, "budget": budget, "allocation": rule.name, "kept_share": share}
        for budget, share in zip(BUDGETS, kept, strict=True)
    ]


def markdown(rows: list[dict]) -> str:
    """One table per budget: accuracy in percent, and utility kept; a floating total beside them."""
    at = {(row["policy"], row["budget"], row["allocation"]): row for row in rows}
    full = next(row for row in rows if row["policy"] == "full_cache")
    lines = [
        f"Full cache: {full['accuracy']:.1%} of {full['questions']} questions. "
        "Cells: accuracy in percent / utility kept."
    ]
    for budget in BUDGETS:
        body = []
        for policy in dict.fromkeys(row["policy"] for row in rows if row["policy"] != "full_cache"):
            cells = [cell(at.get((policy, budget, rule))) for rule in ALL]
            body.append([policy, *cells])
        lines += ["", pipe_table([f"{format_budget(budget)} of the slots", *ALL], body)]
    return "\n".join(lines)


def cell(row: dict | None) -> str:
    if row is None:
        return ""
    floating = f" (kept {row['kept_share']:.4f})" if row.get("kept_share") is not None else ""
    return f"{100 * row['accuracy']:.1f} / {row['utility_kept']:.3f}{floating}"


if __name__ == "__main__":
    main()
