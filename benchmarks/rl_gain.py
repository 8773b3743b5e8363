"""What reinforcement learning adds to a supervised start, in the states that evictions really produce.

    python benchmarks/rl_gain.py --out runs/rl_gain

Dialogues of the bundled model: 384 words are the context, the next 64 and two questions the continuation, recorded in
ten blocks; before each block every head is cut to a quarter of the context, new tokens included (KVEvict-v0 in eviction
mode). Reported is what the environment pays on unseen dialogues.

Arms from scratch take the same number of steps (`foresight`, on the same number of states a step; `joint` as its file
says), those that go on from `joint` half as many. Where rankings are sampled each state is ranked `group` times: the
table says how many rankings a configuration has seen. Five seeds, differences paired by seed, 95 % intervals (Student's
t). Goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch

from kv_gym.evaluation.rows import result, write_json
from kv_gym.evaluation.statistics import mean_interval
from kv_gym.markdown import pipe_table
from kv_gym.reference import MODEL
from kv_gym.reference.generator import FIRST_HELD_OUT_SEED, make_context
from kv_gym.reference.tokenizer import encode, word_ids
from kv_gym.traces import TraceSet, load_model, record
from kv_gym.traces.prompts import Prompt
from kv_gym.training import train
from kv_gym.training.on_policy_states import OnPolicyStates

CONTEXT, AHEAD = 384, 64  # words; a head keeps 96 slots, of which new tokens take more and more
BUDGET = 1 / 4
BLOCKS = 10  # that a continuation is recorded in, and a cut before each
STEPS = 300
UNSEEN = FIRST_HELD_OUT_SEED + 2_000_000
SUPERVISED, MIXED, REINFORCED = {"distill": 1.0}, {"distill": 0.5}, {"distill": 0.0}
CONFIGURATIONS: dict[str, tuple[dict, str | None]] = {
    "golden order": ({**SUPERVISED, "steps": STEPS}, None),
    "golden order, then RL": ({**MIXED, "steps": STEPS}, None),
    "RL from scratch": ({**REINFORCED, "steps": STEPS}, None),
    "joint": ({"steps": STEPS}, None),
    "joint, then golden order": ({**SUPERVISED, "steps": STEPS // 2, "rate": 3e-3}, "joint"),
    "joint, then RL": ({**REINFORCED, "steps": STEPS // 2, "rate": 3e-3}, "joint"),
}
PAIRS = (
    ("golden order, then RL", "golden order"),
    ("golden order, then RL", "RL from scratch"),
    ("joint, then RL", "joint"),
    ("joint, then RL", "joint, then golden order"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/rl_gain"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/rl_gain.json"))
    arguments = parser.parse_args()
    model, tokenizer = load_model(MODEL)
    unseen = dialogues(model, tokenizer, arguments.out / "unseen", UNSEEN, 32, "test").load()
    judge = OnPolicyStates(unseen, BUDGET, 1, 1)
    paid: dict[str, list[float]] = {name: [] for name in CONFIGURATIONS}
    rankings: dict[str, int] = {}
    for seed in range(arguments.seeds):
        traces = dialogues(model, tokenizer, arguments.out / f"train-{seed}", seed * 1_000_000 + 700_000, 96, "train")
        for name, (settings, start) in CONFIGURATIONS.items():
            folder = arguments.out / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
            agent = "joint" if name == "joint" else "foresight"
            own = {} if name == "joint" else {"budget": BUDGET, "contexts": 2}
            init = arguments.out / f"{start}-{seed}" if start else None
            policy = train(agent, traces, folder, seed=seed, init=init, **own, **settings)
            rankings[name] = policy.training["samples"]
            with torch.no_grad():
                paid[name].append(judge.reward(policy.network))
    bounds = {name: judge.reward(score) for name, score in BASELINES.items()}
    bounds["golden order (sees the future)"] = judge.reward(None)
    differences = {f"{a} - {b}": paired(paid[a], paid[b]) for a, b in PAIRS}
    rows = [
        {"configuration": name, "budget": BUDGET, "reward": statistics.mean(values),
         "interval": mean_interval(values)[1],
         "rankings": rankings[name], "by_seed": values}
        for name, values in paid.items()
    ] + [{"configuration": name, "budget": BUDGET, "reward": value} for name, value in bounds.items()]  # fmt: skip
    write_json(arguments.json, result(rows, differences=differences, seeds=arguments.seeds))
    print(markdown(rows, differences))


def _random(inputs: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    return torch.rand(inputs.shape[:2], generator=torch.Generator().manual_seed(0))


BASELINES = {
    "recency": lambda inputs, heads: -inputs[..., -1],  # the last input grows with a slot's age
    "random": _random,
}


def dialogues(model, tokenizer, folder: Path, first: int, count: int, split: str) -> TraceSet:
    """Dialogues that stop at a decision, with what comes after it."""
    prompts = []
    for number in range(count):
        made = make_context("dialogue", 512, first + number, 2)
        asked = [word for question in made.questions for word in (*question.question, *question.answer, ".")]
        prompts.append(
            Prompt(
                id=f"dialogue-{first + number}",
                context_ids=[word_ids()["<bos>"], *encode(made.words[:CONTEXT])],
                continuation_ids=[encode((*made.words[CONTEXT : CONTEXT + AHEAD], *asked))],
                task="dialogue",
                split=split,
                text_hash=f"dialogue-{first + number}",
            )
        )
    return record(model, prompts, folder, tokenizer=tokenizer, blocks=BLOCKS)


def paired(ours: list[float], theirs: list[float]) -> dict:
    gaps = np.subtract(ours, theirs).tolist()
    return {"mean": statistics.mean(gaps), "interval": mean_interval(gaps)[1]}


def markdown(rows: list[dict], differences: dict[str, dict]) -> str:
    body = []
    for row in sorted(rows, key=lambda row: -row["reward"]):
        spread = f" +- {row['interval']:.3f}" if row.get("interval") is not None else ""
        seen = f"{row['rankings']:,}" if "rankings" in row else ""
        body.append([row["configuration"], f"{row['reward']:.3f}{spread}", seen])
    apart = []
    for name, gap in differences.items():
        spread = "" if gap["interval"] is None else f" +- {gap['interval']:.3f}"
        apart.append([name, f"{gap['mean']:+.3f}{spread}"])
    paid = pipe_table(["policy", "paid", "rankings seen"], body)
    return f"{paid}\n\n{pipe_table(['difference', 'mean'], apart)}"


if __name__ == "__main__":
    main()
