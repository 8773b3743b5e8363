"""Decoding on a GPU: step time against the bytes that must move, tokens per second at the largest batch that fits.

A model of the shape of Llama-3-8B with random weights in bfloat16; contexts of 32k and 128k tokens; the full cache and
totals of 1/4, 1/8 and 1/32, with equal and with ragged heads. The bound of a step is the bytes of weights and cache
divided by the bandwidth that a large copy reaches in the same run. Contexts are not read by the model: random keys and
values of the kept size are put into the cache, since a step's time depends on nothing else. `--read` also times the
reading of a prompt (time to the first token, peak bytes) under ``block:2048``.

No GPU has run this yet. On a CPU it runs with `--tiny`, which is how its own test runs it.

Run: ``python benchmarks/gpu_decode.py --json benchmarks/results/gpu_decode.json``
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kv_gym import EvictingCache
from kv_gym.live.slots import RaggedSlots

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 1 << 18,
}  # fmt: skip
TINY = SHAPE | {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second that a copy of `size` bytes moves, reading and writing."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(6):
        wait(device)
        began = time.perf_counter()
        target.copy_(source)
        wait(device)
        times.append(time.perf_counter() - began)
    return 2 * size / min(times)


def filled(model, batch: int, slots: int, ragged: bool):
    """A cache whose heads hold `slots` random tokens each, or 1 : 15 around that number where `ragged`."""
    config, device, dtype = model.config, model.device, model.dtype
    heads, dim = config.num_key_value_heads, config.head_dim
    cache = EvictingCache(model, "recency", 1.0)
    parts = torch.linspace(1, 15, heads) if ragged else torch.ones(heads)
    lengths = (parts / parts.sum() * slots * heads).long().clamp(min=1).expand(batch, heads)
    for layer in cache.layers:
        state = layer.state
        n = int(lengths.sum()) if ragged else batch * heads * slots
        pairs = {name: torch.randn(n, dim, device=device, dtype=dtype) for name in ("keys", "values")}
        positions = torch.arange(n, device=device)
        if ragged:
            state.slots = RaggedSlots(pairs | {"positions": positions}, lengths.clone(), lengths.clone())
        else:
            shaped = {name: tensor.view(batch, heads, slots, dim) for name, tensor in pairs.items()}
            state.slots.append(shaped | {"positions": positions.view(batch, heads, slots)}, 0)
        state.tokens_seen, state.evicted_at, layer.seen = [slots] * batch, [slots] * batch, slots
        layer.lazy_initialization(pairs["keys"])
    return cache


def full(model, batch: int, tokens: int) -> DynamicCache:
    config, cache = model.config, DynamicCache()
    shape = batch, config.num_key_value_heads, tokens, config.head_dim
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


@torch.no_grad()
def step_seconds(model, cache, batch: int, steps: int) -> float:
    token = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    for _ in range(3):
        model(token, past_key_values=cache, logits_to_keep=1)
    times = []
    for _ in range(steps):
        wait(model.device)
        began = time.perf_counter()
        model(token, past_key_values=cache, logits_to_keep=1)
        wait(model.device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measured(model, kind: str, context: int, share: float, batch: int, steps: int, speed: float) -> dict:
    slots = max(1, int(context * share))
    config = model.config
    cache = full(model, batch, slots) if kind == "full" else filled(model, batch, slots, kind == "ragged")
    seconds = step_seconds(model, cache, batch, steps)
    if kind != "full":
        cache.detach()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    pairs = 2 * batch * slots * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    bound = (weights + pairs * model.dtype.itemsize) / speed
    return {
        "kind": kind, "context": context, "share": share, "batch": batch, "ms": 1e3 * seconds, "bound_ms": 1e3 * bound,
        "of_bound": bound / seconds, "tokens_per_second": batch / seconds,
    }  # fmt: skip


def largest_batch(model, kind: str, context: int, share: float, steps: int, speed: float) -> dict:
    """The row of the largest batch, doubled until memory ends."""
    best, batch = {}, 1
    while batch <= 4096:
        try:
            best = measured(model, kind, context, share, batch, steps, speed)
        except torch.cuda.OutOfMemoryError:
            break
        finally:
            torch.cuda.empty_cache()
        batch *= 2
    return best


@torch.no_grad()
def reading(model, context: int, share: float) -> dict:
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, model.config.vocab_size, (1, context), device=model.device)
    with EvictingCache(model, "keydiff", max(1, int(context * share)), trigger="block:2048") as cache:
        wait(model.device)
        began = time.perf_counter()
        for chunk in ids.split(8192, 1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
        wait(model.device)
        seconds = time.perf_counter() - began
        held = cache.nbytes()
    peak = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else 0
    return {"context": context, "share": share, "first_token_s": seconds, "cache_bytes": held, "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--context", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--read", action="store_true", help="also time reading a prompt")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on any device")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.tiny:
        parser.error("no GPU is here; --tiny runs the script on a CPU to see that it works")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**(TINY if args.tiny else SHAPE))).to(torch.bfloat16).eval()
    speed = bandwidth(device, 1 << (24 if args.tiny else 32))
    rows, configurations = (
        [],
        [("full", 1.0), *((kind, share) for kind in ("equal", "ragged") for share in (1 / 4, 1 / 8, 1 / 32))],
    )
    print("| context | cache | share | batch | ms per step | of the bound | tokens/s |\n|---|---|---|---|---|---|---|")
    for context in args.context:
        for kind, share in configurations:
            found = [measured(model, kind, context, share, 1, args.steps, speed)]
            if device.type == "cuda":
                found.append(largest_batch(model, kind, context, share, max(5, args.steps // 3), speed))
            for row in filter(None, found):
                rows.append(row)
                print(
                    f"| {context} | {kind} | {share:.4g} | {row['batch']} | {row['ms']:.2f} | {row['of_bound']:.0%} "
                    f"| {row['tokens_per_second']:.0f} |",
                    flush=True,
                )
    read = (
        [reading(model, context, share) for context in args.context for share in (1 / 4, 1 / 32)] if args.read else []
    )
    for row in read:
        print(json.dumps(row))
    if args.json:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        about = {"device": name, "bandwidth": speed, "torch": torch.__version__}
        args.json.write_text(json.dumps(about | {"rows": rows, "reading": read}, indent=1) + "\n")


if __name__ == "__main__":
    main()
