"""What a trace costs by the length of its context, whole and sampled, and whether a sample trains as well.

    python benchmarks/trace_scale.py --text FILE_OR_FOLDER --out runs/trace_scale

**Sizes**: for each length one context of a text with a continuation of 128 tokens, without statistics, each in a
process of its own: the plain forward of context and continuation, `record`, and `record --slots 512`. Time is the
processor's on a CPU (one thread), and elapsed with `--device cuda`; memory is the process's peak above what it held
once the model was loaded and had recorded a short context (host memory, on a GPU too).

**Training** (`--part training`): agents on contexts of the bundled model: whole, at a quarter of their slots, and
sampled so from four times as many contexts, which takes as many bytes. Judged on whole contexts that nobody trained on
by the utility kept. Differences are paired by seed and context; the interval joins the spread over both.

Goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from kv_gym.evaluation.measure import replay
from kv_gym.evaluation.rows import result, write_json
from kv_gym.evaluation.statistics import paired_difference
from kv_gym.files import read_json
from kv_gym.markdown import pipe_table
from kv_gym.reference import MODEL
from kv_gym.reference.prompts import reference_prompts
from kv_gym.traces import info, load_model, open_traces, prompts_from_text, record
from kv_gym.traces.writer import TraceWriter
from kv_gym.training import train

LENGTHS = (1024, 4096, 8064)  # with the continuation, the last is all positions of SmolLM2
CONTINUATION, SLOTS = 128, 512
WAYS = ("plain forward", "whole", "slots")
TOKENS, CONTEXTS, SAMPLE = 512, 48, 128  # of the training part: words, contexts, sampled slots
SETS = {"whole": (CONTEXTS, None), "sampled": (CONTEXTS, SAMPLE), "sampled, same bytes": (4 * CONTEXTS, SAMPLE)}
AGENTS = {"joint": "global", "rloo": "uniform"}
BUDGETS = (1 / 4, 1 / 8, 1 / 16)
KVP = {"layers": 32, "kv_heads": 8, "head_dim": 128, "tokens": 32768}  # an 8B model of the Llama 3 family


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/models/smollm2-135m-instruct")
    parser.add_argument("--text", type=Path, help="a text, or a folder of them; needed for sizes")
    parser.add_argument("--out", type=Path, default=Path("runs/trace_scale"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/trace_scale.json"))
    parser.add_argument("--part", choices=("sizes", "training", "all"), default="all")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measure:
        print(json.dumps(measure(arguments, arguments.measure[0], int(arguments.measure[1]))))
        return
    found = read_json(arguments.json) if arguments.json.is_file() else {}
    sizes, training = found.get("rows", []), found.get("training", [])
    if arguments.part != "training":
        for length in arguments.lengths:
            for way in WAYS:
                if not any((row["tokens"], row["way"]) == (length, way) for row in sizes):
                    sizes.append(measured_apart(way, length))
                    write_json(arguments.json, result(sizes, training=training, **on_paper()))
    if arguments.part != "sizes":
        training = compare_training(arguments.out, arguments.seeds, arguments.steps)
    write_json(arguments.json, result(sizes, training=training, **on_paper()))
    print(size_table(sizes), training_table(training), json.dumps(on_paper(), indent=2), sep="\n\n")


def measured_apart(way: str, tokens: int) -> dict:
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", way, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout)


def measure(arguments: argparse.Namespace, way: str, tokens: int) -> dict:
    """Seconds, peak memory and, where something is recorded, bytes of one context."""
    model, tokenizer = load_model(arguments.model, device=arguments.device)
    texts = sorted(arguments.text.glob("*.txt")) if arguments.text.is_dir() else [arguments.text]
    prompt = next(prompts_from_text(texts[0], tokenizer, tokens, CONTINUATION, count=1))
    short = next(prompts_from_text(texts[0], tokenizer, 64, 16, count=1))
    folder = arguments.out / f"{way}-{tokens}"
    shutil.rmtree(folder, ignore_errors=True)
    settings = {"stats": (), "progress": False, "slots": SLOTS if way == "slots" else None}
    record(model, [short], folder / "warm-up", **settings)
    plain(model, short)

    def run() -> None:
        if way == "plain forward":
            plain(model, prompt)
        else:
            record(model, [prompt], folder / "set", **settings)

    if arguments.device != "cpu":  # what is compiled or allocated at first is not the context's
        run()
        shutil.rmtree(folder / "set", ignore_errors=True)
        torch.cuda.synchronize()
    held = reset_peak()
    clock = time.process_time if arguments.device == "cpu" else time.perf_counter
    began = clock()
    run()
    if arguments.device != "cpu":
        torch.cuda.synchronize()
    row = {"way": way, "tokens": tokens, "seconds": clock() - began, "peak_mib": peak() - held}
    row |= {"device": torch.cuda.get_device_name() if arguments.device != "cpu" else "cpu"}
    if way != "plain forward":
        row["bytes"] = info(folder / "set")["bytes"]
        row["bytes_bfloat16"] = bytes_rounded(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return row


@torch.inference_mode()
def plain(model, prompt) -> None:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for ids in (prompt.context_ids, prompt.continuation_ids[0]):
        model.base_model(torch.tensor([ids], device=model.device), past_key_values=cache)


def bytes_rounded(folder: Path) -> int:
    """Bytes of the same recording with `--storage bfloat16`, which only rounds."""
    traces = open_traces(folder / "set")
    with TraceWriter(folder / "rounded", traces.manifest | {"storage": "bfloat16"}).shard(0, traces.ids) as shard:
        shard.add(traces[0], 0)
    return info(folder / "rounded")["bytes"]


def reset_peak() -> float:
    """Begin the peak of resident memory anew (Linux) and return what is resident, MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def on_paper() -> dict:
    """Bytes of one context of an 8B model at 32k tokens, bfloat16, with a continuation of 128 tokens in 8 blocks."""
    heads, slots = KVP["layers"] * KVP["kv_heads"], KVP["tokens"]
    per_slot = 2 * KVP["head_dim"] * 2 + 8 * 2 * 4  # key and value; futures stay float32
    return {"paper": KVP | {"bytes_whole": heads * slots * per_slot, "bytes_slots": heads * SLOTS * per_slot}}


def compare_training(out: Path, seeds: int, steps: int) -> list[dict]:
    """Each agent on each set of contexts and seed; the last rows of an agent are differences from whole contexts."""
    model, tokenizer = load_model(MODEL)
    test = record(
        model, list(reference_prompts("multi_key", TOKENS, 32, 8, "test")), out / "test", tokenizer=tokenizer, stats=()
    )
    measured: dict[tuple[str, str], list[dict]] = {}
    for seed in range(seeds):
        for name, (count, slots) in SETS.items():
            prompts = list(reference_prompts("multi_key", TOKENS, count, 8, "train", seed))
            folder = out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            traces = record(model, prompts, folder, tokenizer=tokenizer, stats=(), slots=slots)
            for agent, allocation in AGENTS.items():
                policy = train(agent, traces, f"{folder}-{agent}", seed=seed, steps=steps)
                measured.setdefault((agent, name), []).append(utility_kept(policy, test, allocation))
    rows = []
    for (agent, name), by_seed in measured.items():
        row = {"agent": agent, "set": name, "contexts": SETS[name][0], "seeds": seeds, "steps": steps}
        row["utility_kept"] = statistics.fmean(k / n for each in by_seed for k, n in each["contexts"].values())
        if name != "whole":
            gap = paired_difference(by_seed, measured[agent, "whole"])
            row |= {"difference": gap.mean, "low": gap.low, "high": gap.high}
        rows.append(row)
    return rows


def utility_kept(policy, test, allocation: str) -> dict:
    """Of each test context the mean share of utility kept over the budgets, as :func:`paired_difference` takes it."""
    contexts = {}
    for sequence in test:
        rows = replay({"": policy}, [sequence], BUDGETS, allocations=(allocation,))
        contexts[sequence.id] = (statistics.fmean(row["utility_kept"] for row in rows), 1)
    return {"contexts": contexts}


def size_table(rows: list[dict]) -> str:
    plain = {row["tokens"]: row for row in rows if row["way"] == "plain forward"}
    body = []
    for row in rows:
        tokens, base = row["tokens"], plain[row["tokens"]]["seconds"]
        sizes = [f"{row[name] / tokens / 1024:.1f}" if name in row else "" for name in ("bytes", "bytes_bfloat16")]
        times = [f"{row['seconds']:.1f}", f"{row['seconds'] / base:.2f}"]
        body.append([f"{tokens:,}", row["way"], *sizes, f"{row['peak_mib']:,.0f}", *times])
    head = ["tokens", "", "KiB per token", "in bfloat16", "peak MiB", "seconds", "times plain"]
    return pipe_table(head, body)


def training_table(rows: list[dict]) -> str:
    body = []
    for row in rows:
        gap = f"{row['difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})" if "difference" in row else ""
        body.append([row["agent"], row["set"], str(row["contexts"]), f"{row['utility_kept']:.4f}", gap])
    return pipe_table(["agent", "trained on", "contexts", "utility kept", "difference from whole"], body)


if __name__ == "__main__":
    main()
