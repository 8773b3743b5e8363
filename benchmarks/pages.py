"""Page policies on public request traces: hit rates, predictions with their bounds, and speed.

    python benchmarks/pages.py --data FOLDER --out runs/pages --publish benchmarks/results/pages

The folder holds ``mooncake/conversation_trace.jsonl.gz`` (kvcache-ai/Mooncake, FAST25-release),
``cache2k/web07.trace.xz`` (cache2k's benchmarks), ``lirs/multi1.trace.gz``, ``multi2.trace.gz``, ``sprite.trace.gz``,
``2_pools.trace.gz`` and ``cs.trace.gz``, and ``adapt_size/request.trace.xz`` (Caffeine's simulator). A trace that is
missing is left out.

Parts, chosen with ``--parts``:

- ``settings``: settings of `lrb` by the hits between half and 0.7 of the requests, for every trace and capacity.
- ``credit``: how long the shadow's credit lasts, by the same hits on a few of them.
- ``evidence``: hit rates on the last 0.3 of every trace; trained policies see the first half, choose their best round
  on the next fifth, and run on all of it with their shadow LRU. Of `lrb` also the setting that ``settings`` chose.
- ``drawn``: of 2_pools, whose requests are drawn at random, what can be expected without the future.
- ``noise``: the oracle of 16 candidates, 12 of them drawn, with noise on the logarithm of the time to the next use.
- ``capacities``: hit rates over the capacity, on whole traces.
- ``predictions``: misses of Flush, Mark0 and Mark&Predict over the share of wrong bits, with the proven bounds.
- ``speed``: a million requests for each classic policy, and the same through libCacheSim's Python package.
- ``decisions``: time of a trained policy's decision among 16 pages, in NumPy and exported to ONNX.

Every result is a line of ``OUT/cells.jsonl`` and is not computed again. `--publish` writes all of them, tables and
pictures. `--quick` takes the sample that ships, at one capacity, to try the script.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np

from kv_gym import __version__
from kv_gym.files import atomic_write, bundled
from kv_gym.markdown import pipe_table
from kv_gym.pages import RequestTrace, export_page_policy, make_page_policy, read_requests, simulate, train_pages
from kv_gym.pages.cache import Candidates
from kv_gym.pages.policies.registry import list_page_policies
from kv_gym.pages.predictions import discard_bits, phase_bits, predicted_bits, prediction_errors

MIB = 1 << 20
FILES = {
    "web07": "cache2k/web07.trace.xz",
    "multi1": "lirs/multi1.trace.gz",
    "multi2": "lirs/multi2.trace.gz",
    "sprite": "lirs/sprite.trace.gz",
    "2_pools": "lirs/2_pools.trace.gz",
    "cs": "lirs/cs.trace.gz",
    "adapt_size": "adapt_size/request.trace.xz",
    "mooncake": "mooncake/conversation_trace.jsonl.gz",
}
PREFIXES = ("mooncake", "sample")  # their requests are chains of blocks
CASES = (
    ("web07", 1000), ("multi2", 1000), ("web07", 2000), ("multi1", 500), ("multi2", 500), ("multi1", 1000),
    ("mooncake", 5000), ("adapt_size", 16 * MIB), ("sprite", 250), ("sprite", 500), ("sprite", 1000),
    ("2_pools", 500), ("2_pools", 1000), ("cs", 500), ("cs", 1000), ("mooncake", 1000),
    ("mooncake", 20000), ("adapt_size", 64 * MIB),
)  # fmt: skip
NOT_CLASSIC = ("belady", "belady_prefix", "flush", "lrb", "mark0", "mark_and_predict", "sglang_leaves", "tail_oracle",
               "vllm_prefix_lru")  # fmt: skip
CLASSIC = tuple(name for name in list_page_policies() if name not in NOT_CLASSIC)
ORACLES = ("tail_oracle", "tail_oracle:drawn=12", "belady")
ORDERED = tuple(f"tail_oracle:order={order}" for order in ("lirs", "s3_fifo", "w_tinylfu"))
TREES = "lrb:trees=60:sample=4:candidates=32"
EIGHT = "lrb:trees=60:sample=8:candidates=32:drawn=8"
WIDE = "lrb:forget=0.95:candidates=128:drawn=127"
SETTINGS = ("lrb", "lrb:sample=4:forget=0.9", "lrb:forget=0.95", f"{TREES}:drawn=16",
            f"{TREES}:drawn=16:order=s3_fifo", EIGHT, WIDE)  # fmt: skip
CHOSEN, ALONE = "lrb:chosen", "lrb:chosen:shadow=0"
AGENTS = (CHOSEN, ALONE, "lrb", "clone", "dqn", "ppo")
ON_EVERY_TRACE, ELSEWHERE = AGENTS[:4], {("dqn", "web07", 1000), ("ppo", "web07", 1000)}
CREDITS, CREDIT_CASES = (0, 10, 20, 40, 80), (("sprite", 250), ("sprite", 500), ("web07", 1000), ("multi1", 500))
DRAWN, WARM_UP = 12, 0.7
FLIPS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
BOUNDS = {"flush": (1, lambda k: k - 1, discard_bits), "mark0": (1, lambda k: 2 * harmonic(k), discard_bits),
          "mark_and_predict": (2, lambda k: harmonic(k), phase_bits)}  # fmt: skip

RULES = """Percent of accesses found, in the last 0.3 of the requests. `lrb` learns while it runs; with its default
settings it chooses among 64 pages, 63 of them drawn at random. `lrb:chosen` is `lrb` with the setting that had the
most hits between half and 0.7 of the requests, see Settings below; `shadow=0` takes its shadow LRU away. Agents that
were trained saw the first half, and chose their best round on the next fifth; they choose among 16 pages, four least
recently used and twelve drawn at random, with LRU in their shadow, too. `in a classic order` is the tail oracle whose
16 pages are those that LIRS, S3-FIFO or W-TinyLFU would evict next, the best of the three. `best classic` is the best
of the last table, chosen afterwards on the same requests. The last columns say how much of the distance from it to
each oracle the mean over seeds covers: `beyond` where the oracle is below the best classic policy and the mean is not;
and the share of evictions that were left to LRU. With others to choose among than the oracle, a policy may go further
than it. Oracles are best over a whole trace, not in its last part. Where the tail oracle is less than a point above
LRU, K candidates from the tail cannot help; where it is `below it`, it is below the best classic policy, so that a
policy must look beyond the tail to be better. Mooncake's blocks are prefixes for ranking policies, and stand alone for
queues. cs is a loop that is gone through less than five times: what is found in its last part depends on where in the
loop a policy begins to keep pages, and says little. Capacities are pages, those of adapt_size bytes. Where a policy
has fewer than five seeds, the others have not been run."""

Cell = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the traces")
    parser.add_argument("--out", type=Path, default=Path("runs/pages"))
    parser.add_argument("--publish", type=Path, help="folder for tables and pictures; with `--parts=` of what is there")
    parser.add_argument("--traces", default=",".join(FILES), help="names of those to take")
    parser.add_argument("--agents", default=",".join(AGENTS), help="names of those to train")
    parser.add_argument("--seeds", type=int, default=5, help="how often each is trained")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="the bundled sample alone")
    arguments = parser.parse_args()
    results = Results(arguments.out, Traces(arguments))
    for part in filter(None, arguments.parts.split(",")):
        for key, compute in PARTS[part](results.traces):
            results.add({"part": part, **key}, compute)
    if arguments.publish is not None:
        publish(results.cells, arguments.publish, vars(arguments))


class Traces:
    """The traces that are there, read when they are asked for."""

    def __init__(self, arguments: argparse.Namespace):
        self.quick, self.agents, folder = arguments.quick, arguments.agents.split(","), arguments.data
        self.seeds = range(arguments.seeds)
        self.cells: list[Cell] = []  # what is known so far
        sample = {"sample": bundled("requests") / "sample.jsonl.gz"}
        chosen = arguments.traces.split(",") if folder is not None else []
        found = {name: folder / FILES[name] for name in chosen}
        self._files = sample if self.quick else {name: file for name, file in found.items() if file.is_file()}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> RequestTrace:
        return _read(self._files[name])

    def cases(self) -> Iterator[tuple[str, int]]:
        """Traces and capacities of the evidence."""
        yield from ((name, size) for name, size in CASES if name in self)
        if self.quick:
            yield "sample", 1000

    def chosen(self, trace: str, capacity: int) -> str | None:
        """The setting of `lrb` with the most hits on validation requests; None: not all have been tried."""
        case = {"part": "settings", "trace": trace, "capacity": capacity}
        rates = {
            cell["key"]["policy"]: cell["found"]["hit_rate"]
            for cell in self.cells
            if case.items() <= cell["key"].items()
        }
        tried = [policy for policy in SETTINGS if policy in rates]
        return max(tried, key=rates.__getitem__) if len(tried) == len(settings_of(trace)) else None

    def measured(self, key: Cell, setting: str) -> Cell | None:
        """What was found with a setting of `lrb` for the same requests and seed, under whatever name."""
        same = {name: key[name] for name in ("trace", "capacity", "seed")} | {"part": "evidence"}
        found = [cell["found"] for cell in self.cells if same.items() <= cell["key"].items()]
        for each in found:
            if each.get("setting") == setting:
                return each
            if each.get("shadow_share") == 0 and f"{each.get('setting')}:shadow=0" == setting:  # it never stood in
                return {name: value for name, value in each.items() if name != "shadow_share"} | {"setting": setting}
        return None


@cache
def _read(file: Path) -> RequestTrace:
    return read_requests(file)


class Results:
    """Lines of ``cells.jsonl``: a key, and what was found."""

    def __init__(self, folder: Path, traces: Traces):
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.traces = folder / "cells.jsonl", traces
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        self.cells: list[Cell] = [json.loads(line) for line in lines]
        traces.cells = self.cells
        self._known = {json.dumps(cell["key"], sort_keys=True) for cell in self.cells}

    def add(self, key: Cell, compute: Callable[[], Cell]) -> None:
        """Compute a cell unless it is there."""
        if json.dumps(key, sort_keys=True) in self._known:
            return
        began = time.process_time()
        cell = {"key": key, "found": compute(), "seconds": round(time.process_time() - began, 2)}
        with self.file.open("a") as out:
            out.write(json.dumps(cell) + "\n")
        self.cells.append(cell)
        found = {name: round(each, 4) if isinstance(each, float) else each for name, each in cell["found"].items()}
        print(*key.values(), found, f"{cell['seconds']} s", flush=True)


# evidence


def evidence(traces: Traces) -> Iterator[tuple[Cell, Callable[[], Cell]]]:
    cases = list(traces.cases())
    for trace, capacity in cases:
        for policy in (*ORACLES, *(() if traces[trace].chained else ORDERED), *CLASSIC):
            for seed in range(3) if make_page_policy(policy).stochastic else (None,):
                key = {"trace": trace, "capacity": capacity, "policy": policy, "seed": seed}
                yield key, lambda key=key: count_hits(traces, **key)
    for seed, agent, (trace, capacity) in product(traces.seeds, traces.agents, cases):  # first all with one seed
        if agent in ON_EVERY_TRACE or (agent, trace, capacity) in ELSEWHERE or traces.quick:
            key = {"trace": trace, "capacity": capacity, "policy": agent, "seed": seed}
            if not agent.startswith("lrb"):
                yield key, lambda key=key: train_and_count(traces, **key)
            elif (setting := "lrb" if agent == "lrb" else traces.chosen(trace, capacity)) is not None:
                setting += ":shadow=0" if agent == ALONE else ""
                yield (
                    key,
                    lambda key=key, setting=setting: (
                        traces.measured(key, setting) or count_hits(traces, **{**key, "policy": setting})
                    ),
                )


def served_as(trace: RequestTrace, policy: str) -> str:
    """Prefixes where a policy can serve them; queues of single pages see blocks as objects that stand alone."""
    return "prefix" if trace.chained and make_page_policy(policy).prefix else "objects"


def count_hits(
    traces: Traces, trace: str, capacity: int, policy: str, seed: int | None, part: tuple[float, float] = (WARM_UP, 1)
) -> Cell:
    """Hit rate in a part of the requests, those before it filling the cache."""
    start, stop = part
    requests = traces[trace]
    if stop < 1:
        requests = requests.part(0, int(stop * requests.requests))
    chosen = policy if seed is None else f"{policy}:seed={seed}"
    if requests.chained and policy == "belady":
        chosen = "belady_prefix"
    found = simulate(requests, chosen, capacity, served_as(requests, chosen), "pass", warm_up=start / stop)
    learned = {} if found.shadow_share is None else {"shadow_share": found.shadow_share}
    if policy.startswith("lrb"):
        learned["setting"] = policy
    return {"hit_rate": found.hit_rate, "byte_hit_rate": found.byte_hit_rate, **learned}


def train_and_count(traces: Traces, trace: str, capacity: int, policy: str, seed: int) -> Cell:
    requests = traces[trace]
    semantics = "prefix" if requests.chained else "objects"
    with tempfile.TemporaryDirectory() as folder:
        learned = train_pages(policy, requests, folder, capacity, semantics, "pass", drawn=DRAWN, seed=seed)
    found = simulate(requests, learned, capacity, semantics, "pass", warm_up=WARM_UP)
    return {"hit_rate": found.hit_rate, "byte_hit_rate": found.byte_hit_rate, "shadow_share": found.shadow_share,
            "fallback": learned.card.fallback, "validation": learned.card.validation["learned"]}  # fmt: skip


def settings(traces: Traces) -> Iterator[tuple[Cell, Callable[[], Cell]]]:
    for trace, capacity in traces.cases():
        for policy in ("lru", *settings_of(trace)):
            key = {"trace": trace, "capacity": capacity, "policy": policy, "seed": None}
            yield key, lambda key=key: count_hits(traces, **key, part=(0.5, WARM_UP))


def settings_of(trace: str) -> list[str]:
    """Those for a trace: chains have no order of a queue policy, many more decisions, and more pages to choose from."""
    others = (WIDE,) if trace not in PREFIXES else (f"{TREES}:drawn=16:order=s3_fifo", EIGHT)
    return [policy for policy in SETTINGS if policy not in others]


def credit(traces: Traces) -> Iterator[tuple[Cell, Callable[[], Cell]]]:
    cases = [("sample", 1000)] if traces.quick else CREDIT_CASES
    for (trace, capacity), capacities in product(cases, CREDITS):
        if trace in traces:
            key = {"trace": trace, "capacity": capacity, "policy": f"lrb:credit={capacities}", "seed": None}
            yield key, lambda key=key: count_hits(traces, **key, part=(0.5, WARM_UP))


def drawn(traces: Traces) -> Iterator[tuple[Cell, Callable[[], Cell]]]:
    for trace, capacity in traces.cases():
        if trace == "2_pools":
            yield {"trace": trace, "capacity": capacity}, lambda capacity=capacity: expect(traces["2_pools"], capacity)


def expect(trace: RequestTrace, capacity: int) -> Cell:
    """Of accesses to two pools in turn, uniform in each: the small pool stays, and as many of the large one as fit."""
    counts = np.bincount(trace.pages)
    small = counts > 100
    share, others = counts[small].sum() / len(trace), len(counts) - small.sum()
    rate = share + (1 - share) * (capacity - small.sum()) / others
    return {"hit_rate": float(rate), "small": int(small.sum()), "share": float(share), "others": int(others)}


def noise(traces: Traces) -> Iterator[tuple[Cell, Callable[[], Cell]]]:
    trace, capacity = ("sample", 1000) if traces.quick else ("web07", 1000)
    if trace in traces:
        for deviation in (0.25, 0.5, 1.0, 1.5, 2.0, 3.0):
            key = {"trace": trace, "capacity": capacity, "policy": f"{ORACLES[1]}:noise={deviation}", "seed": None}
            yield key, lambda key=key: count_hits(traces, **key)


def capacities(traces: Traces) -> Iterator[tuple[Cell, Callable[[], Cell]]]:
    for trace in ("web07", "mooncake", "sample"):
        if trace in traces:
            for capacity in (250, 500, 1000, 2000, 4000, 8000, 16000):
                for policy in ("fifo", "lru", "s3_fifo", "arc", "w_tinylfu", "tail_oracle", "belady"):
                    key = {"trace": trace, "capacity": capacity, "policy": policy}
                    yield key, lambda key=key: {"hit_rate": simulate(traces[key["trace"]], key["policy"],
                                                                     key["capacity"]).hit_rate}  # fmt: skip


# predictions


def harmonic(k: int) -> float:
    return sum(1 / j for j in range(1, k + 1))


def predictions(traces: Traces) -> Iterator[tuple[Cell, Callable[[], Cell]]]:
    trace, capacity = ("sample", 1000) if traces.quick else ("multi1", 500)
    if trace not in traces:
        return
    for policy in BOUNDS:
        for predictor, flip in (*(("oracle", flip) for flip in FLIPS), ("learned", 0.0)):
            for seed in range(3):
                key = {"trace": trace, "capacity": capacity, "policy": policy, "predictor": predictor, "flip": flip,
                       "seed": seed}  # fmt: skip
                yield key, lambda key=key: misses_over_optimum(traces, **key)


def misses_over_optimum(
    traces: Traces, trace: str, capacity: int, policy: str, predictor: str, flip: float, seed: int
) -> Cell:
    requests = traces[trace]
    alpha, beta, true_bits = BOUNDS[policy]
    bits = true_bits(requests, capacity)
    zeros, ones = prediction_errors(bits, predicted_bits(bits, requests, capacity, predictor, flip, seed))
    misses = (
        len(requests) - simulate(requests, f"{policy}:predictor={predictor}:flip={flip}:seed={seed}", capacity).hits
    )
    best = len(requests) - simulate(requests, "belady", capacity).hits
    lru = len(requests) - simulate(requests, "lru", capacity).hits
    bound = alpha * best + beta(capacity) * zeros + ones
    return {"ratio": misses / best, "bound": bound / best, "error": (zeros + ones) / len(requests), "lru": lru / best}


# speed


THEIR_NAMES = {
    "arc": "ARC", "clock": "Clock", "fifo": "FIFO", "gdsf": "GDSF", "lfu": "LFU", "lirs": "LIRS", "lru": "LRU",
    "s3_fifo": "S3FIFO", "sieve": "Sieve", "slru": "SLRU", "two_q": "TwoQ", "w_tinylfu": "WTinyLFU",
}  # fmt: skip


def speed(traces: Traces) -> Iterator[tuple[Cell, Callable[[], Cell]]]:
    requests = 20_000 if traces.quick else 1_000_000
    for policy in CLASSIC:
        key = {"policy": policy, "requests": requests, "capacity": requests // 100}
        yield key, lambda key=key: time_policy(**key)


@cache
def drawn_requests(count: int) -> RequestTrace:
    """Zipf's law with exponent 0.9 over a tenth as many pages."""
    weights = 1 / np.arange(1, count // 10 + 1) ** 0.9
    drawn = np.random.default_rng(0).choice(count // 10, count, p=weights / weights.sum())
    return RequestTrace.from_keys(drawn.tolist(), "zipf")


def time_policy(policy: str, requests: int, capacity: int) -> Cell:
    trace = drawn_requests(requests)
    began = time.process_time()
    hits = simulate(trace, policy, capacity).hits
    ours = time.process_time() - began
    if policy not in THEIR_NAMES:
        return {"process_seconds": ours, "hits": hits, "their_seconds": None, "their_hits": None, "ratio": None}
    import libcachesim

    theirs = getattr(libcachesim, THEIR_NAMES[policy])(cache_size=capacity)
    request, found = libcachesim.Request(), 0
    request.obj_size = 1
    began = time.process_time()
    for page in trace.pages.tolist():
        request.obj_id = page + 1
        found += bool(theirs.get(request))
    their = time.process_time() - began
    return {"process_seconds": ours, "hits": hits, "their_seconds": their, "their_hits": found, "ratio": ours / their}


# decisions


def decisions(traces: Traces) -> Iterator[tuple[Cell, Callable[[], Cell]]]:
    for form in ("numpy", "onnx"):
        yield {"form": form, "candidates": 16}, lambda form=form: time_decisions(form)


def time_decisions(form: str) -> Cell:
    """Processor time from the candidates to the page that leaves, and the network's share of it."""
    trace = read_requests(bundled("requests") / "sample.jsonl.gz")
    with tempfile.TemporaryDirectory() as folder:
        policy = train_pages("clone", trace, folder, 1000, "prefix", rounds=1, steps=100)
        if form == "onnx":
            policy = make_page_policy(f"{export_page_policy(policy, Path(folder, 'policy.onnx'))}:limit=0")
    policy.shadow = 0  # all decisions are the network's
    seconds: dict[str, list[float]] = {"": [], "network_": []}
    rank, score, last = policy.rank, policy.score, cast(Candidates, None)

    def timed_rank(candidates: Candidates) -> np.ndarray:
        nonlocal last
        last = candidates
        began = time.thread_time()
        scores = rank(candidates)
        int(np.argmin(scores))
        seconds[""].append(time.thread_time() - began)
        return scores

    def timed_score(features: np.ndarray) -> np.ndarray:
        began = time.thread_time()
        scores = score(features)
        seconds["network_"].append(time.thread_time() - began)
        return scores

    policy.rank, policy.score = timed_rank, timed_score  # type: ignore[method-assign]
    simulate(trace, policy, 1000, "prefix")
    del policy.rank, policy.score
    features = np.ones((16, len(policy.card.features)), np.float32)
    loops = {"whole_us": lambda: rank(Candidates(last.cache, last.pages)), "network_us": lambda: score(features)}
    fastest = {
        name: 2e5 * min(timeit.repeat(call, timer=time.thread_time, number=5, repeat=1000))
        for name, call in loops.items()
    }
    shares = {
        f"{part}p{share}_us": 1e6 * np.percentile(taken[1000:], share).item()
        for part, taken in seconds.items()
        for share in (5, 50, 95, 99)
    }
    load = {"load_average": os.getloadavg()[0], "cores": os.cpu_count()}
    return shares | fastest | {"decisions": len(seconds[""]) - 1000} | load


PARTS: dict[str, Callable[[Traces], Iterator[tuple[Cell, Callable[[], Cell]]]]] = {
    "settings": settings, "credit": credit, "evidence": evidence, "drawn": drawn, "noise": noise,
    "capacities": capacities, "predictions": predictions, "speed": speed, "decisions": decisions,
}  # fmt: skip


# pages and pictures


def publish(cells: list[Cell], folder: Path, arguments: dict) -> None:
    """Write ``cells.json``, ``README.md`` and the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/pages.py --data FOLDER --out runs/pages --publish benchmarks/results/pages"
    found = [{**cell["key"], **cell["found"], "seconds": cell["seconds"]} for cell in cells]
    with atomic_write(folder / "cells.json") as part:
        part.write_text(json.dumps({"command": command, "kv_gym": __version__, "cells": found}, indent=0) + "\n")
    with atomic_write(folder / "README.md") as part:
        part.write_text(page(found, command), encoding="utf-8")
    draw(found, folder)


def page(cells: list[Cell], command: str) -> str:
    text = [
        "# Page policies on public request traces",
        f"Written by `{command}`; see `benchmarks/pages.py` for the traces and the rules.",
        "## Hit rates",
        evidence_text(cells),
    ]
    if expected := [cell for cell in cells if cell["part"] == "drawn"]:
        text += [drawn_text(expected)]
    if noisy := [cell for cell in cells if cell["part"] == "noise"]:
        text += [
            f"How exact a prediction must be: the oracle of 16 candidates, 12 of them drawn, on {noisy[0]['trace']} at "
            f"{noisy[0]['capacity']:,}, with noise of this deviation on the natural logarithm of the time to the next "
            "use (1: wrong by a factor of 2.7).",
            pipe_table(["noise", *(cell["policy"].rpartition("=")[2] for cell in noisy)],
                       [["hits", *(percent(cell["hit_rate"]) for cell in noisy)]]),
        ]  # fmt: skip
    if tried := [cell for cell in cells if cell["part"] == "settings"]:
        text += ["## Settings", settings_text(tried)]
    if tried := [cell for cell in cells if cell["part"] == "credit"]:
        text += [credit_text(tried)]
    if timed := [cell for cell in cells if cell["part"] == "speed"]:
        text += ["## Speed", speed_text(timed)]
    if decided := [cell for cell in cells if cell["part"] == "decisions"]:
        shares = ("p5_us", "p50_us", "p95_us", "p99_us")
        rows = [
            [cell["form"], part, f"{cell['decisions']:,}", *(f"{cell[prefix + name]:.0f}" for name in shares),
             f"{cell[loop]:.0f}"]
            for cell in decided
            for part, prefix, loop in (("decision", "", "whole_us"), ("network", "network_", "network_us"))
        ]  # fmt: skip
        head = ["form", "what", "decisions", *(f"{name[1:-3]} %" for name in shares), "in a loop"]
        text += [
            "Microseconds of processor time for a decision among 16 blocks, the gathering of features with it, and for "
            "its network alone, which is what an engine runs that has the features: percentiles over a run; then the "
            "fastest of 1,000 short loops. The load average was "
            f"{max(cell['load_average'] for cell in decided):.0f} on {decided[0]['cores']} cores: other work slows the "
            "percentiles, and the loops least.",
            pipe_table(head, rows, left=2),
        ]
    if predicted := [cell for cell in cells if cell["part"] == "predictions"]:
        text += ["## One-bit predictions", predictions_text(predicted)]
    return "\n\n".join(text) + "\n"


def evidence_text(cells: list[Cell]) -> str:
    rates: dict[tuple[str, int], dict[str, list[Cell]]] = {}
    for cell in cells:
        if cell["part"] == "evidence":
            rates.setdefault((cell["trace"], cell["capacity"]), {}).setdefault(cell["policy"], []).append(cell)
    rates = {case: found for case, found in sorted(rates.items()) if set(CLASSIC) | set(ORACLES) <= set(found)}
    if not rates:
        return "Not measured yet."
    oracles = ["LRU", "best classic", "", "tail oracle, K = 16", "in a classic order", "", "with 12 drawn", "Belady"]
    learned = ["policy", "seeds", "mean", "lowest to highest", "over LRU", "over best", "way to tail oracle",
               "way to 12 drawn", "left to LRU"]  # fmt: skip
    classic = [
        [trace, f"{capacity:,}", *(percent(mean_rate(found.get(name))) for name in CLASSIC)]
        for (trace, capacity), found in rates.items()
    ]
    return "\n\n".join(
        [
            RULES,
            pipe_table(["trace", "capacity", *oracles], [summary_row(*case, found) for case, found in rates.items()]),
            pipe_table(
                ["trace", "capacity", *learned],
                [row for case, found in rates.items() for row in learned_rows(*case, found)],
                left=3,
            ),
            goal_text(rates),
            pipe_table(["trace", "capacity", *CLASSIC], classic),
        ]
    )


def goal_text(rates: dict[tuple[str, int], dict[str, list[Cell]]]) -> str:
    """Where a learned policy does what was asked of it, and where it does not."""
    said = []
    for policy in AGENTS:
        reached, beyond, short, over = [], [], [], []
        for (trace, capacity), found in rates.items():
            if (mean := mean_rate(found.get(policy))) is not None:
                (best, _), lru, oracle = (
                    best_classic(found),
                    *(mean_rate(found.get(name)) for name in ("lru", ORACLES[0])),
                )
                cell = f"{trace} at {capacity:,}"
                over.append(min(each["hit_rate"] for each in found[policy]) - lru)
                if mean >= max(best, (best + oracle) / 2):
                    (reached if oracle > best else beyond).append(cell)
                if over[-1] < -0.01:
                    short.append(cell)
        if over:
            reached, beyond, short = (", ".join(cells) or "none" for cells in (reached, beyond, short))
            said.append([f"`{policy}`", str(len(over)), reached, beyond, short, f"{100 * min(over):+.2f}"])
    head = ["policy", "cells", "at least half of the way from the best classic policy to the tail oracle",
            "above the best classic policy where that is above the tail oracle", "a seed more than a point below LRU",
            "lowest seed over LRU"]  # fmt: skip
    missing = [f"`{policy}`" for policy in AGENTS if not any(policy in found for found in rates.values())]
    left = f"Not measured yet with the present shadow: {', '.join(missing)}.\n\n" if missing else ""
    return f"{left}What was aimed at, and where it is reached:\n\n" + pipe_table(head, said, left=None)


def drawn_text(cells: list[Cell]) -> str:
    first = cells[0]
    rates = " and ".join(f"{percent(cell['hit_rate'])} % at {cell['capacity']:,}" for cell in cells)
    return (
        f"{first['trace']} is drawn at random: {first['share']:.0%} of its accesses go to {first['small']} pages, the "
        f"others to any of {first['others']:,}. A policy that keeps the former and any of the latter can expect "
        f"{rates}, and none that does not know the future can expect more: what the tail oracle finds beyond that "
        "cannot be learned."
    )


def best_classic(found: dict[str, list[Cell]]) -> tuple[float, str]:
    return max((rate, name) for name in CLASSIC if (rate := mean_rate(found.get(name))) is not None)


def summary_row(trace: str, capacity: int, found: dict[str, list[Cell]]) -> list[str]:
    lru, tail, drawn, belady = (mean_rate(found.get(name)) for name in ("lru", *ORACLES))
    best, name = best_classic(found)
    helpless = lru is not None and tail is not None and tail < lru + 0.01
    ordered = max(
        ((rate, name.partition("=")[2]) for name in ORDERED if (rate := mean_rate(found.get(name))) is not None),
        default=None,
    )
    note = ": cannot help" if helpless else ": below it" if tail is not None and tail < best else ""
    return [
        trace, f"{capacity:,}", percent(lru), percent(best), name,
        percent(tail) + note, *((percent(ordered[0]), ordered[1]) if ordered else ("-", "-")),
        percent(drawn), percent(belady),
    ]  # fmt: skip


def learned_rows(trace: str, capacity: int, found: dict[str, list[Cell]]) -> Iterator[list[str]]:
    (best, _), lru, *oracles = best_classic(found), *(mean_rate(found.get(name)) for name in ("lru", *ORACLES[:2]))
    for policy in AGENTS:
        if group := found.get(policy):
            mean, rates = mean_rate(group), [cell["hit_rate"] for cell in group]
            left = [1.0 if cell.get("fallback") else cell.get("shadow_share") for cell in group]
            yield [
                trace, f"{capacity:,}", policy, str(len(group)), percent(mean),
                f"{percent(min(rates))} to {percent(max(rates))}", f"{100 * (mean - lru):+.2f}",
                f"{100 * (mean - best):+.2f}", *(way(best, mean, oracle) for oracle in oracles),
                "-" if None in left else percent(statistics.fmean(left)),
            ]  # fmt: skip


def mean_rate(group: list[Cell] | None) -> float | None:
    return statistics.fmean(cell["hit_rate"] for cell in group) if group else None


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def way(start: float, reached: float, end: float | None) -> str:
    if end is None or end <= start:
        return "beyond" if end is not None and reached >= start else "-"
    return f"{100 * (reached - start) / (end - start):.0f} %"


def settings_text(cells: list[Cell]) -> str:
    short = {policy: policy.replace(TREES, "trees").removeprefix("lrb:") for policy in SETTINGS}
    rows = []
    for case in sorted({(cell["trace"], cell["capacity"]) for cell in cells}):
        rates = {cell["policy"]: cell["hit_rate"] for cell in cells if (cell["trace"], cell["capacity"]) == case}
        if set(tried := settings_of(case[0])) <= set(rates):
            best = short[max(tried, key=rates.__getitem__)]
            rows.append([case[0], f"{case[1]:,}", *(percent(rates.get(each)) for each in ("lru", *SETTINGS)), best])
    seconds = sum(cell["seconds"] for cell in cells)
    return (
        "Percent of accesses found between half and 0.7 of the requests, which no other table counts, with one seed. "
        "For every trace and capacity the setting with the most hits here is `lrb:chosen` above. "
        f"`trees` stands for `{TREES}`. What `--parts settings` has measured so far took {seconds / 60:.1f} minutes of "
        "processor time.\n\n" + pipe_table(["trace", "capacity", "lru", *short.values(), "chosen"], rows)
    )


def credit_text(cells: list[Cell]) -> str:
    rates = {(cell["trace"], cell["capacity"], cell["policy"]): percent(cell["hit_rate"]) for cell in cells}
    policies = dict.fromkeys(cell["policy"] for cell in cells)
    rows = [
        [trace, f"{capacity:,}", *(rates.get((trace, capacity, policy), "-") for policy in policies)]
        for trace, capacity in dict.fromkeys((cell["trace"], cell["capacity"]) for cell in cells)
    ]
    return (
        "The same of `lrb` over the capacities of accesses after which 1/e is left of its shadow's credit; by default "
        "20, the fewest that cost no hits where `lrb` gains most.\n\n"
        + pipe_table(["trace", "capacity", *(policy.rpartition("=")[2] for policy in policies)], rows)
    )


def speed_text(cells: list[Cell]) -> str:
    rows = [
        [cell["policy"], f"{cell['process_seconds']:.1f}", number(cell["their_seconds"]), number(cell["ratio"]),
         f"{cell['hits']:,}", "-" if cell["their_hits"] is None else f"{cell['their_hits']:,}"]
        for cell in cells
    ]  # fmt: skip
    slowest = max(cell["process_seconds"] for cell in cells)
    head = ["policy", "seconds", "libCacheSim", "ratio", "hits", "its hits"]
    return (
        f"{cells[0]['requests']:,} requests, drawn by Zipf's law, on one core: processor time; the slowest takes "
        f"{slowest:.0f} seconds. libCacheSim is driven request by request from Python, in the same run.\n\n"
        + pipe_table(head, rows)
    )


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def predictions_text(cells: list[Cell]) -> str:
    rows = []
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell["policy"], cell["predictor"], cell["flip"]), []).append(cell)
    for (policy, predictor, flip), group in groups.items():
        ratio, bound, error = (statistics.fmean(cell[name] for cell in group) for name in ("ratio", "bound", "error"))
        said = f"oracle, {flip:.0%} wrong" if predictor == "oracle" else predictor
        rows.append([policy, said, f"{error:.3f}", f"{ratio:.3f}", f"{bound:.3f}"])
    first = cells[0]
    return (
        f"{first['trace']} at {first['capacity']:,} pages, means over three seeds: misses over those of Belady's "
        f"algorithm, and the proven bound; LRU has {first['lru']:.3f} times as many.\n\n"
        + pipe_table(["policy", "bits", "wrong bits per access", "misses / optimum", "bound"], rows, left=2)
    )


def draw(cells: list[Cell], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    over = [cell for cell in cells if cell["part"] == "capacities"]
    if names := list(dict.fromkeys(cell["trace"] for cell in over)):
        figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 3.6), squeeze=False)
        for axis, name in zip(axes[0], names, strict=True):
            for policy in dict.fromkeys(cell["policy"] for cell in over):
                line = [(c["capacity"], c["hit_rate"]) for c in over if (c["trace"], c["policy"]) == (name, policy)]
                axis.plot(*zip(*line, strict=True), marker=".", label=policy)
            axis.set(xscale="log", xlabel="capacity in pages", ylabel="hit rate", title=name)
        axes[0][0].legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(folder / "hits.png", dpi=110)
    bits = [cell for cell in cells if cell["part"] == "predictions" and cell["predictor"] == "oracle"]
    if bits:
        figure, axis = plt.subplots(figsize=(5.5, 3.8))
        for place, policy in enumerate(BOUNDS):
            points = sorted((c["error"], c["ratio"], c["bound"]) for c in bits if c["policy"] == policy)
            error, ratio, bound = zip(*points, strict=True)
            axis.plot(error, ratio, marker=".", color=f"C{place}", label=policy)
            axis.plot(error, bound, linestyle=":", color=f"C{place}", label=f"{policy}, bound")
        axis.axhline(bits[0]["lru"], color="grey", linewidth=0.8, label="lru")
        axis.set(xlabel="wrong bits per access", ylabel="misses / misses of the optimum", yscale="log")
        axis.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(folder / "predictions.png", dpi=110)


if __name__ == "__main__":
    main()
