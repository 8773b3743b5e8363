"""Bytes that an evicting cache really holds, against budget times the bytes of a slot.

Held: the distinct storages behind every tensor that is reachable from the cache object, weights aside. Due: all slots
times the bytes of a slot (key, value, an int64 position, and what the policy keeps beside it), evicted pairs times the
bytes that their tier states, and three int64 numbers a head (start, length, capacity) where heads differ in length,
which ``nbytes`` leaves out. After `compress` they must be equal. While decoding, buffers have the stated slack: room
for what comes until the next firing, at least 16 tokens, or an eighth of the budget where that is unknown; 16 tokens
more for heads that differ in length.

The second table reads prompts of growing length in one forward under ``block:256`` and shows the largest cache on the
way, which must not grow with the prompt.

Run: ``python benchmarks/cache_memory.py --json benchmarks/results/cache_memory.json``
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kv_gym import EvictingCache, make_policy
from kv_gym.live.layer_state import LayerState
from kv_gym.live.tiers.low_precision import LowPrecision
from kv_gym.policies import Policy

LAYERS, HEADS, DIM = 2, 4, 32
SLOT = 2 * DIM * 4 + 8  # float32 key and value, int64 position
BESIDE = {"knorm": 4, "keydiff": 0, "h2o": 4}  # knorm stores its scores where cuts are repeated, h2o its sums


def random_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, head_dim=DIM, vocab_size=256, max_position_embeddings=1 << 20,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def held(cache: EvictingCache) -> int:
    """Bytes of the distinct storages reachable from the cache's layers, but for weights."""
    found, todo, visited = {}, list(cache.layers), set()
    while todo:
        item = todo.pop()
        if id(item) in visited or isinstance(item, torch.nn.Parameter | Policy):
            continue
        visited.add(id(item))
        if isinstance(item, torch.Tensor):
            found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple):
            todo += item
        elif hasattr(item, "__dict__") and not isinstance(item, type):
            todo += vars(item).values()
    return sum(found.values())


@torch.no_grad()
def after_each(
    trigger: str, allocation: str, policy: str, evicted: str = "drop", budget: int = 256, prompt: int = 2048
) -> dict:
    model = random_model()
    rule = allocation if make_policy(policy).comparable or allocation == "uniform" else f"{allocation}:zscore"
    with EvictingCache(model, policy, budget, allocation=rule, trigger=trigger, evicted=evicted) as cache:
        model(torch.randint(0, 256, (1, prompt)), past_key_values=cache, logits_to_keep=1)
        for _ in range(40):
            model(torch.randint(0, 256, (1, 1)), past_key_values=cache)
        decoding, tokens, seen = held(cache), int(cache.kept().sum()), cache.seen
        cache.compress()
        compressed = held(cache)
        reported = cache.nbytes()
    heads, slot = LAYERS * HEADS, SLOT + (0 if policy == "knorm" and trigger == "prefill" else BESIDE[policy])
    bits = int(evicted.partition(":")[2]) if evicted.startswith("bits") else 0
    beside = heads * (seen - budget) * LowPrecision(bits).nbytes(DIM) if bits else 0
    beside += 4 * heads if evicted == "merge" else 0  # the running mean of similarities that D2O's threshold is
    lengths = 0 if rule == "uniform" else 24 * heads * (2 if bits else 1)
    due = heads * budget * slot + beside + lengths
    assert reported == compressed - lengths, f"the cache says {reported} bytes and holds {compressed}"
    due_decoding = tokens * slot + beside
    return {
        "trigger": trigger, "allocation": rule, "policy": policy, "evicted": evicted, "due": due,
        "compressed": compressed, "decoding": decoding, "slots_while_decoding": tokens,
        "slack": decoding / due_decoding - 1,
    }  # fmt: skip


@torch.no_grad()
def largest_while_reading(prompt: int, budget: int = 256, block: int = 256) -> dict:
    model, sizes = random_model(), []
    append = LayerState.append

    def recorded(state, *arguments):
        append(state, *arguments)
        sizes.append(state.slots.longest)

    LayerState.append = recorded
    try:
        with EvictingCache(model, "keydiff", budget, trigger=f"block:{block}") as cache:
            model(torch.randint(0, 256, (1, prompt)), past_key_values=cache, logits_to_keep=1)
            return {"prompt": prompt, "largest_slots_per_head": max(sizes), "bytes_after": held(cache)}
    finally:
        LayerState.append = append


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    rows = [
        after_each(trigger, allocation, policy)
        for policy in BESIDE
        for allocation in ("uniform", "global")
        for trigger in ("prefill", "every:16", "block:64", "lagged:16")
    ]
    rows += [
        after_each(trigger, allocation, "keydiff", evicted)
        for evicted in ("merge", "merge:values", "bits:2", "bits:4", "bits:8")
        for allocation in ("uniform", "global")
        for trigger in ("prefill", "every:16")
    ]
    print(
        "| policy | allocation | trigger | evicted | due | after compress | while decoding | slack |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        print(
            f"| {row['policy']} | {row['allocation']} | {row['trigger']} | {row['evicted']} | {row['due']:,} "
            f"| {row['compressed']:,} | {row['decoding']:,} | {row['slack']:.1%} |"
        )
    reading = [largest_while_reading(prompt) for prompt in (2048, 4096, 8192, 16384, 32768)]
    print("\n| prompt in one forward | most slots in a head | bytes at its end |\n|---|---|---|")
    for row in reading:
        print(f"| {row['prompt']:,} | {row['largest_slots_per_head']} | {row['bytes_after']:,} |")
    wrong = [row for row in rows if row["compressed"] != row["due"]]
    print(f"\n{len(rows) - len(wrong)} of {len(rows)} caches hold exactly what is due after compress.")
    if args.json:
        args.json.write_text(
            json.dumps({"torch": torch.__version__, "rows": rows, "reading": reading}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
