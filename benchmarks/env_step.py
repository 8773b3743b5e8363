"""How long a step of the vector environment takes, against the least that it could take.

The yardstick is one NumPy batch that copies the same observations, sorts the scores (argsort) and sums rewards. Both
are timed in turns in one run, and the table shows medians. The aim is a ratio of at most 2.0 in ranking mode.

Run: ``python benchmarks/env_step.py``
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import gymnasium as gym
import numpy as np

import kv_gym  # noqa: F401  (registers KVEvict-v0)
from kv_gym.traces.sequence import Continuation, Sequence


def synthetic(contexts: int, tokens: int, dim: int, layers: int = 2, heads: int = 4) -> list[Sequence]:
    rng = np.random.default_rng(0)
    shape = (layers, heads, tokens)
    return [
        Sequence(
            id=str(i),
            tokens=rng.integers(0, 1000, tokens),
            keys=rng.normal(size=(*shape, dim)).astype(np.float32),
            values=rng.normal(size=(*shape, dim)).astype(np.float32),
            queries=np.zeros((layers, heads, 1, dim), np.float32),
            continuations=(Continuation(np.zeros(16, int), rng.random((*shape, 4, 2), np.float32), 4),),
            layers=tuple(range(layers)),
            scaling=(dim**-0.5,) * layers,
        )
        for i in range(contexts)
    ]


def yardstick(observation: dict[str, np.ndarray], scores: np.ndarray, worth: np.ndarray) -> np.ndarray:
    copied = {name: array.copy() for name, array in observation.items()}
    order = scores.argsort(-1)
    ranked = np.take_along_axis(worth, order, -1)
    assert len(copied) == len(observation)
    return ranked.sum(-1)


def seconds(call, *arguments) -> float:
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--dim", type=int, default=32, help="head dimension")
    parser.add_argument("--contexts", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    rows = []
    print("| tokens | mode | step ms | copy + argsort + sum ms | ratio |\n|---|---|---|---|---|")
    for tokens in args.tokens:
        traces = synthetic(args.contexts, tokens, args.dim)
        for mode, settings in (("ranking", {}), ("eviction 1/4", {"budget": 0.25})):
            env = gym.make_vec("KVEvict-v0", num_envs=args.num_envs, traces=traces, **settings)
            observation, _ = env.reset(seed=0)
            worth = np.random.default_rng(1).random((args.num_envs, tokens), np.float32)
            ours, least = [], []
            for i in range(-args.rounds // 5, args.rounds):
                scores = np.random.default_rng(abs(i)).uniform(-1, 1, worth.shape).astype(np.float32)
                pair = seconds(yardstick, observation, scores, worth), seconds(env.step, scores)
                if i >= 0:  # those before warm up the memory allocator
                    least.append(pair[0])
                    ours.append(pair[1])
            step, bound = 1e3 * statistics.median(ours), 1e3 * statistics.median(least)
            print(f"| {tokens} | {mode} | {step:.2f} | {bound:.2f} | {step / bound:.2f} |")
            rows.append({"tokens": tokens, "mode": mode, "step_ms": step, "yardstick_ms": bound, "ratio": step / bound})
    if args.json:
        args.json.write_text(json.dumps({"num_envs": args.num_envs, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
