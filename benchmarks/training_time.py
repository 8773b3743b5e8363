"""What a training step costs beside the arithmetic that it cannot do without.

The yardstick is three baddbmm with their biases and two ReLU, forward and backward, for all heads at once, on inputs
that lie ready: no drawing of slots, no loss, no optimiser. Both are timed in turns in one run, and the table shows
medians. The aim is a ratio of at most 1.5, whatever the number of heads.

Run: ``OMP_NUM_THREADS=1 python benchmarks/training_time.py --json benchmarks/results/training_time.json``
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kv_gym.policies.scorer import GroupedScorer
from kv_gym.policies.scoring.inputs import POSITION_FEATURES
from kv_gym.training.learner import ContextLearner, TrainingContext
from kv_gym.training.registry import agent_settings, learner_class


def learner(agent: str, heads: int, dim: int, tokens: int, contexts: int) -> ContextLearner:
    """The agent with its own settings, on random contexts."""
    settings = agent_settings(agent)
    made = learner_class(agent)(settings, 0, GroupedScorer(heads, dim, settings.hidden))
    assert isinstance(made, ContextLearner)
    shape = (heads, tokens, 2 * dim + POSITION_FEATURES)
    made.contexts = [TrainingContext(torch.randn(shape), torch.rand(shape[:2])) for _ in range(contexts)]
    return made


def yardstick(heads: int, slots: int, width: int, hidden: int) -> Callable[[], None]:
    """Forward and backward of the networks alone."""
    x = torch.randn(heads, slots, width)
    sizes = ((width, hidden), (hidden, hidden), (hidden, 1))
    weights = [(torch.randn(heads, i, o) / i**0.5).requires_grad_() for i, o in sizes]
    biases = [torch.zeros(heads, 1, o, requires_grad=True) for _, o in sizes]
    upstream = torch.randn(heads, slots, 1)

    def run() -> None:
        y: Tensor = x
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            y = torch.baddbmm(bias, y, weight).relu()
        y = torch.baddbmm(biases[-1], y, weights[-1])
        torch.autograd.grad(y, [*weights, *biases], upstream)

    return run


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--heads", type=int, nargs="+", default=[8, 32, 128, 256])
    parser.add_argument("--agents", nargs="+", default=["joint", "expected"])
    parser.add_argument("--dim", type=int, default=32, help="head dimension")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a context")
    parser.add_argument("--contexts", type=int, default=8, help="contexts in memory")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    rows = []
    print("| agent | heads | step ms | baddbmm ms | ratio |\n|---|---|---|---|---|")
    for agent in args.agents:
        for heads in args.heads:
            ours = learner(agent, heads, args.dim, args.tokens, args.contexts)
            slots = ours.settings.contexts * min(ours.settings.slots, args.tokens)
            least = yardstick(heads, slots, 2 * args.dim + POSITION_FEATURES, ours.settings.hidden)
            step, bound = [], []
            for i in range(-2, args.rounds):
                pair = seconds(lambda i=i, ours=ours: ours.step(i + 2)), seconds(least)
                if i >= 0:  # those before warm up the memory allocator
                    step.append(pair[0])
                    bound.append(pair[1])
            # of the pairs, not of the medians: a busy machine slows both of a pair
            ratio = statistics.median(a / b for a, b in zip(step, bound, strict=True))
            row = {"agent": agent, "heads": heads, "step_ms": 1e3 * statistics.median(step),
                   "yardstick_ms": 1e3 * statistics.median(bound), "ratio": ratio}  # fmt: skip
            rows.append(row)
            print(f"| {agent} | {heads} | {row['step_ms']:.1f} | {row['yardstick_ms']:.1f} | {ratio:.2f} |", flush=True)
            del ours, least
    if args.json:
        about = {"dim": args.dim, "tokens": args.tokens, "threads": torch.get_num_threads(), "torch": torch.__version__}
        args.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
