"""What one scoring costs at 1k, 4k and 16k tokens, per policy: ``python benchmarks/score_cost.py``.

One layer of 8 KV heads of 64, 4 query heads each, float32, batch 1, one thread, random numbers, nothing evicted.
A score linear in tokens has a ratio 16k / 4k near 4, a quadratic one near 16; fixed costs lower it, and leaving the
processor's cache raises it, so only what takes notable time is marked as more than linear. Policies with memory also
pay for every query they observe: the last column is one block of 128 new queries at 16k tokens, attention not
included, which is computed for all of them alike. Oracles are left out, they never run live.
Times are medians of one thread's processor time, over repeated calls, so that a busy machine shows less; of a policy
over another score both are included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from kv_gym import CacheView, Policy, list_policies, make_policy
from kv_gym.policies import StatefulPolicy

LENGTHS = (1024, 4096, 16384)
KV_HEADS, GROUP, DIM, WIDTH, BLOCK = 8, 4, 64, 2048, 128
QUADRATIC, NOTABLE_MS = 10.0, 100.0  # from both on a policy is marked


def policies() -> dict[str, Policy]:
    named = {name: make_policy(name) for name in list_policies() if name != "scorer"}
    return {name: policy for name, policy in named.items() if not policy.needs_future}


def view_for(policy: Policy, tokens: int) -> CacheView:
    """A whole cache and what the policy declares that it needs; a quarter is the budget."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    slots = (1, KV_HEADS, tokens, DIM)
    view = CacheView.of(
        normal(*slots),
        normal(*slots),
        tokens // 4,
        queries=normal(1, KV_HEADS * GROUP, policy.needs_queries, DIM) if policy.needs_queries else None,
        hidden=normal(1, tokens, WIDTH) if policy.needs_hidden else None,
        output=normal(KV_HEADS * GROUP, DIM, WIDTH) if policy.needs_output else None,
    )
    return replace(view, state=policy.initial_state(view)) if isinstance(policy, StatefulPolicy) else view


def attention_modules(view: CacheView) -> torch.Tensor:
    """What a block of new queries might pay, `[1, query_heads, BLOCK, tokens]`."""
    tokens = view.keys.shape[2]
    shape = (1, KV_HEADS * GROUP, BLOCK, tokens)
    later = torch.ones(BLOCK, tokens, dtype=torch.bool).triu(tokens - BLOCK + 1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).masked_fill_(later, -1e9).softmax(-1)


def milliseconds(call: Callable[[], object], repeats: int, patience: float) -> float:
    """Median time of a call, of at most `repeats` and about `patience` seconds; the first warms up."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 2 or (len(times) <= repeats and time.perf_counter() - began < patience):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times[1:])


def measure(policy: Policy, lengths: tuple[int, ...], repeats: int, patience: float) -> dict:
    row: dict = {"score_ms": {}, "observe_ms": None}
    for tokens in lengths:
        view = view_for(policy, tokens)
        row["score_ms"][tokens] = milliseconds(lambda v=view: policy.score(v), repeats, patience)
    if isinstance(policy, StatefulPolicy) and view.state:
        paid = attention_modules(view)
        watch = policy.observe if policy.repetition is None else partial(policy.observe_again, hidden=None)
        row["observe_ms"] = milliseconds(lambda: watch(view, paid, view.state), repeats, patience)
    row["ratio"] = row["score_ms"][lengths[-1]] / row["score_ms"][lengths[-2]]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", help="names with commas; all that can run live unless given")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--patience", type=float, default=1.5, help="seconds per policy and length")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    if len(args.lengths) < 2 or min(args.lengths) < BLOCK:
        parser.error(f"give at least two lengths, each from {BLOCK}")
    torch.set_num_threads(1)
    chosen = {name: make_policy(name) for name in args.policies.split(",")} if args.policies else policies()
    lengths = tuple(args.lengths)
    heads = [f"{tokens // 1024}k ms" if tokens % 1024 == 0 else f"{tokens} ms" for tokens in lengths]
    columns = ["policy", *heads, "last / one before", f"{BLOCK} queries, ms"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    rows = {}
    with torch.inference_mode():
        for name, policy in chosen.items():
            row = rows[name] = measure(policy, lengths, args.repeats, args.patience)
            observed = "" if row["observe_ms"] is None else f"{row['observe_ms']:.1f}"
            steep = row["ratio"] >= QUADRATIC and row["score_ms"][lengths[-1]] >= NOTABLE_MS
            ratio = f"{row['ratio']:.1f}{' (more than linear)' if steep else ''}"
            cells = [name, *(f"{ms:.3g}" for ms in row["score_ms"].values()), ratio, observed]
            print(f"| {' | '.join(cells)} |", flush=True)
    if args.json:
        about = {
            "kv_heads": KV_HEADS, "query_heads": KV_HEADS * GROUP, "head_dim": DIM, "batch": 1, "dtype": "float32",
            "threads": 1, "observed_queries": BLOCK, "torch": torch.__version__,
        }  # fmt: skip
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
