"""What recording costs beside the plain forward, and how its memory grows: ``python benchmarks/record_overhead.py``.

One context of 3,584 tokens and a continuation of 512, batch 1, on a random Llama (hidden 512, 4 layers, 8 query and
4 KV heads of 64). Plain: the decoder's forward of the context and then of the continuation on its cache. Recording is
timed in memory (`record_sequence`), without and with H2O's statistics over all context queries, interleaved with the
plain forward in one run. Peak memory is that of a process which records one context, less that of one that only
loads the model.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kv_gym.traces import Prompt, record_sequence

CONTEXT, CONTINUATION = 3584, 512
LENGTHS = (1024, 2048, 4096, 8192)
TARGETS = {"without statistics": 1.5, "with h2o": 2.5}


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4, head_dim=64, max_position_embeddings=16384,
        )
    ).eval()  # fmt: skip


def make_prompt(context: int, continuation: int = CONTINUATION) -> Prompt:
    ids = torch.randint(0, 512, (context + continuation,), generator=torch.Generator().manual_seed(1)).tolist()
    return Prompt("p", ids[:context], [ids[context:]])


@torch.inference_mode()
def plain(model: LlamaForCausalLM, prompt: Prompt) -> None:
    cache = DynamicCache(config=model.config)
    model.base_model(torch.tensor([prompt.context_ids]), past_key_values=cache)
    model.base_model(torch.tensor([prompt.continuation_ids[0]]), past_key_values=cache)


def time_ratios(repeats: int) -> dict:
    model, prompt = make_model(), make_prompt(CONTEXT)
    ways = {
        "plain forward": lambda: plain(model, prompt),
        "without statistics": lambda: record_sequence(model, prompt, stats=()),
        "with h2o": lambda: record_sequence(model, prompt, stats=("h2o",)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):  # the first warms up and is dropped
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    base = seconds["plain forward"]
    return {
        name: {
            "seconds": statistics.median(taken),
            "ratio": statistics.median(one / plain for one, plain in zip(taken, base, strict=True)),
        }
        for name, taken in seconds.items()
    }


def peak_of(way: str, context: int) -> None:
    """In a process of its own: print its peak resident memory in MiB."""
    model = make_model()
    record_sequence(model, make_prompt(64, 16))  # what imports and first calls take is not the context's
    if way == "plain":
        plain(model, make_prompt(context))
    elif way == "record":
        record_sequence(model, make_prompt(context))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measured_peak(way: str, context: int) -> float:
    command = [sys.executable, __file__, "--peak-of", way, str(context)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def memory() -> list[dict]:
    baseline = measured_peak("load", 0)
    return [
        {
            "context": context,
            "recording_mib": measured_peak("record", context) - baseline,
            "plain_mib": measured_peak("plain", context) - baseline,
        }
        for context in LENGTHS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="also write the numbers to this file")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak_of:
        peak_of(arguments.peak_of[0], int(arguments.peak_of[1]))
        return

    # memory first: a child's peak begins at what this process held when it was started
    result = {"memory": memory(), "time": time_ratios(arguments.repeats), "torch": torch.__version__}
    table = Table(title=f"{CONTEXT} + {CONTINUATION} tokens, one thread")
    for column in ("", "seconds", "times plain", "target"):
        table.add_column(column)
    for name, row in result["time"].items():
        table.add_row(name, f"{row['seconds']:.2f}", f"{row['ratio']:.2f}", str(TARGETS.get(name, "")))
    peaks = Table(title="peak memory above the loaded model, MiB")
    for column in ("context", "recording", "per token, KiB", "plain forward"):
        peaks.add_column(column)
    for row in result["memory"]:
        each = row["recording_mib"] * 1024 / (row["context"] + CONTINUATION)
        peaks.add_row(str(row["context"]), f"{row['recording_mib']:.0f}", f"{each:.1f}", f"{row['plain_mib']:.0f}")
    Console(stderr=True).print(table, peaks)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
