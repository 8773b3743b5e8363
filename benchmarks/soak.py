"""100,000 decoded tokens at a fixed budget: memory flat, time per token flat, positions right.

A small random Llama decodes one token after another with an evicting cache. Every thousandth step the script checks
what each head holds in full precision: its number of slots, and that positions are distinct, below the tokens seen,
with the protected first and last ones among them. In the last run evicted pairs stay in 4 bits, at most 256 for each
head. The time of the first tenth (after a warm-up) is compared with that of the last one.

Run: ``python benchmarks/soak.py --json benchmarks/results/soak.json``
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kv_gym import EvictingCache


def random_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=256, max_position_embeddings=1 << 20,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def check(cache: EvictingCache, total: int, slots: int, sinks: int, recent: int) -> None:
    seen, held = cache.seen, cache.kept()
    assert seen == total, f"{seen} tokens seen, {total} decoded"
    assert int(held.sum()) == slots, f"{int(held.sum())} slots held, {slots} expected"
    for layer in cache.evicting_layers:
        for kept in cache.kept_positions(layer)[0]:
            there = kept[kept >= 0]
            assert (there.diff() > 0).all(), "a position is held twice"
            assert there[:sinks].tolist() == list(range(sinks)), "a protected first token is gone"
            assert there[-recent:].tolist() == list(range(seen - recent, seen)), "a protected last token is gone"


@torch.no_grad()
def soak(tokens: int, policy: str, allocation: str, trigger: str, evicted: str = "drop", budget: int = 128) -> dict:
    model, sinks, recent = random_model(), 4, 16
    every = int(trigger.partition(":")[2])
    due = 2 * 2 * budget  # layers, heads
    with EvictingCache(model, policy, budget, allocation, trigger, sinks, recent, evicted) as cache:
        model(torch.zeros(1, budget + every, dtype=torch.int64), past_key_values=cache)
        times, sizes, step = [], [], torch.randint(0, 256, (1, 1))
        for number in range(1, tokens + 1):
            began = time.perf_counter()
            step = model(step, past_key_values=cache).logits[:, -1:].argmax(-1)
            times.append(time.perf_counter() - began)
            if number % 1000 == 0:
                late = number % every  # tokens that came since the last firing
                check(cache, budget + every + number, due + 2 * 2 * late, sinks, recent)
                sizes.append(cache.nbytes())
    tenth = tokens // 10
    first, last = statistics.median(times[tenth // 5 : tenth]), statistics.median(times[-tenth:])
    return {
        "tokens": tokens, "policy": policy, "allocation": allocation, "trigger": trigger, "evicted": evicted,
        "budget": budget,
        "bytes_first": sizes[0], "bytes_largest": max(sizes), "bytes_last": sizes[-1],
        "ms_first_tenth": 1e3 * first, "ms_last_tenth": 1e3 * last, "ratio": last / first,
        "peak_process_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }  # fmt: skip


ROWS = (
    ("keydiff", "uniform", "every:1", "drop"),
    ("h2o", "global", "every:16", "drop"),
    ("keydiff", "uniform", "every:16", "bits:4:most=256"),
)
"""Policy, allocation, trigger and tier of each run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file; rows that it has stay")
    args = parser.parse_args()
    rows = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
    for settings in ROWS:
        key = dict(zip(("policy", "allocation", "trigger", "evicted"), settings, strict=True)) | {"tokens": args.tokens}
        if not any(key.items() <= row.items() for row in rows):
            rows.append(soak(args.tokens, *settings))
            if args.json:
                args.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    print("| policy | allocation | trigger | evicted | tokens | bytes first / largest / last | ms of tenths | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['policy']} | {row['allocation']} | {row['trigger']} | {row['evicted']} | {row['tokens']:,} "
            f"| {row['bytes_first']:,} / {row['bytes_largest']:,} / {row['bytes_last']:,} "
            f"| {row['ms_first_tenth']:.2f} / {row['ms_last_tenth']:.2f} | {row['ratio']:.2f} |"
        )


if __name__ == "__main__":
    main()
