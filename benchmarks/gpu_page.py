"""What stands in docs/live-cache.md of the figures that `benchmarks/gpu/run.py` found on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kv_gym.budgets import format_budget
from kv_gym.files import read_json
from kv_gym.markdown import pipe_table

NAMES = {"full": "transformers' full cache", "equal": "equal heads", "ragged": "heads 1 : 15"}
TESTS = {
    "kernel_equals_reference": "the kernel against softmax in float64, in three types, numbers and codes",
    "ragged_equals_padded": "uneven heads in every form of attention against the padded form",
    "live_equals_masked": "a live cache against hidden tokens of a full one, nine families, float64",
    "captured_equals_usual": "replayed steps and cuts against usual ones, and those of the compiled model",
    "memory_is_freed": "bytes that an eviction frees, by the allocator",
    "record_train_export_decode": "record, train, export and decode on the device",
}


def page(results: Path) -> str:
    """The figures as tables."""
    folder = results / "gpu"
    found: Mapping[str, Any] = read_json(folder / "h200.json")
    peer = read_json(folder / "h200_kvpress.json")
    versions = found["versions"]
    about = (
        f"{found['card']}, {found['started'][:10]}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}; `python benchmarks/gpu/run.py --minutes 8 --out runs/gpu` "
        "(`benchmarks/results/gpu/`). Random weights in the shape of Llama-3-8B, bfloat16. Bounds are bytes moved "
        "(weights and cached pairs), divided by the bandwidth of a large copy in the same run."
    )
    return "\n\n".join(
        [
            about,
            _tests(found),
            "**One decoding step, one sequence.** Driven by Python, a step of any cache takes as long as Python needs "
            "to issue it. `CapturedSteps` replays it as a CUDA graph; `compiled=True` compiles the model for it, which "
            f"took {found['compiled_steps']['rows'][0]['compilation_s']:.0f} s.",
            _steps(found["decoding_step"]["rows"], found["compiled_steps"]["rows"]),
            "**The largest batch that fits, contexts of 131,072 tokens.**",
            _batches(found["largest_batches"]["rows"]),
            "**The kernel alone**, eight KV heads, as a share of its bound. Below about 16,000 slots a head it is the "
            "latency of two kernels that counts.",
            _kernel(found["kernel_bound"]["rows"]),
            "**Steps of which every 64th evicts**, keydiff; mean and median of 64 steps, and what the eviction took "
            "beyond a median step, beside kvpress's decoding press with the same policy (its versions: transformers "
            f"{peer['versions']['transformers']}). Evictions of captured steps with equal heads are replayed too. "
            "Steps of Python vary by more than an eviction takes.",
            _cuts(peer["steps_with_cuts"]["rows"]),
            _rest(found),
            "",
        ]
    )


def _tests(found: Mapping[str, Any]) -> str:
    lines = [f"- {words}: {'passed' if found[name].get('passed') else 'FAILED'}" for name, words in TESTS.items()]
    return "\n".join(["Tests that need a device:", "", *lines])


def _steps(rows: list[dict], compiled: list[dict]) -> str:
    quickest = {(row["context"], row["kind"], row["share"]): row for row in compiled}
    table = []
    for row in rows:
        kept = "all" if row["share"] == 1 else format_budget(row["share"])
        replayed = f"{row['replayed_ms']:.1f} ({row['of_bound']:.0%})" if "replayed_ms" in row else "-"
        fast = quickest.get((row["context"], row["kind"], row["share"]))
        best = "-" if fast is None else f"{fast['compiled_ms']:.1f} ({fast['of_bound']:.0%})"
        times = f"{row['ms']:.0f}", replayed, best, f"{row['bound_ms']:.1f}"
        table.append([f"{row['context']:,}", NAMES[row["kind"]], kept, *times])
    columns = ["tokens", "cache", "kept", "Python, ms", "captured, ms (of the bound)", "compiled too", "bound, ms"]
    return pipe_table(columns, table)


def _batches(rows: list[dict]) -> str:
    return pipe_table(
        ["cache", "kept", "sequences", "step, ms", "tokens per second", "of the bound"],
        [
            [NAMES[row["kind"]], "all" if row["share"] == 1 else format_budget(row["share"]), str(row["batch"]),
             f"{row.get('replayed_ms', row['ms']):.0f}", f"{row['tokens_per_second']:,.0f}", f"{row['of_bound']:.0%}"]
            for row in rows
        ],
    )  # fmt: skip


def _kernel(rows: list[dict]) -> str:
    slots = sorted({row["slots"] for row in rows})
    table = []
    for kind in ("equal", "ragged"):
        of = {row["slots"]: row for row in rows if row["kind"] == kind}
        table.append([NAMES[kind], *(f"{of[n]['of_bound']:.0%} ({of[n]['us']:.0f} us)" for n in slots)])
    return pipe_table(["slots a head", *(f"{n:,}" for n in slots)], table)


def _cuts(rows: list[dict]) -> str:
    return pipe_table(
        ["", "slots a head", "allocation", "steps", "mean, ms", "median, ms", "an eviction, ms"],
        [
            [row["of"], f"{row['slots']:,}", row.get("allocation", "-"), steps, f"{row['mean_ms']:.1f}",
             f"{row['step_ms']:.1f}", f"{row['cut_ms']:.0f}" if row.get("captured") else "-"]
            for row in rows
            for steps in ["captured" if row.get("captured") else "Python"]
        ],
    )  # fmt: skip


def _rest(found: Mapping[str, Any]) -> str:
    cuts = found["cost_of_a_cut"]["rows"]
    costs = ", ".join(f"{row['policy']} {row['allocation']} {row['ms']:.0f} ms" for row in cuts)
    reads = ", ".join(
        f"{row['allocation']} {row['trigger']} {row['first_token_s']:.1f} s (peak {row['peak_bytes'] / 1e9:.0f} GB)"
        for row in found["first_token"]["rows"]
    )
    seconds = {row["policy"]: row["s"] for row in found["reading"]["rows"]}
    small, large = found["record_train_export_decode"], found["training_of_1b"]["rows"]
    steps = ", ".join(f"{row['agent']} {row['steps_per_s']:.1f}" for row in large)
    plain, recorded = found["recording"]["rows"]
    return "\n".join(
        [
            f"- One cut of a whole context of {cuts[0]['context']:,} tokens to 1/8, all layers: {costs}.",
            f"- Reading {found['reading']['rows'][0]['context']:,} tokens: {seconds['keydiff']:.1f} s, with h2o's "
            f"statistics {seconds['h2o']:.1f} s.",
            f"- First token after 32,768 tokens at 1/8, keydiff: {reads}.",
            f"- Recording {recorded['tokens']:,} tokens with `slots=512`: {found['recording']['ratio']:.2f} times the "
            f"plain forward ({plain['s']:.2f} s), peak {recorded['peak_bytes'] / 1e9:.1f} GB against "
            f"{plain['peak_bytes'] / 1e9:.1f} GB.",
            f"- Optimiser steps per second, with setting up: on the bundled model end_to_end "
            f"{small['end_to_end_steps_per_s']:.0f} and joint {small['joint_steps_per_s']:.0f}; on a model of 1B "
            f"parameters and {large[0]['tokens']:,} tokens {steps}.",
        ]
    )
