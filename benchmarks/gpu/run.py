"""One script for a borrowed GPU: tests that need a device, then figures, the most important first.

Every part has its own time limit and is written to ``OUT/results.json`` as soon as it ends, so a run that is cut
short is still worth having; a part that fails is written with its error, and the next one runs. Nothing is
downloaded: weights are random, in the shape of Llama-3-8B and bfloat16, and made on the device. Contexts are not read
by the model where a step is timed: random keys and values of the kept size are put into the cache, since a step's
time depends on nothing else. Bounds are bytes moved, divided by the bandwidth that a large copy reaches in the same
run.

An H200 ran this on 27 November 2026: ``benchmarks/results/gpu/h200.json``. On a CPU,
``TRITON_INTERPRET=1 python benchmarks/gpu/run.py --device cpu --tiny``
rehearses every part with tiny shapes; its numbers mean nothing.

Run: ``python benchmarks/gpu/run.py --minutes 8 --out runs/gpu``
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kv_gym
from kv_gym import EvictingCache
from kv_gym.files import atomic_write
from kv_gym.live import CapturedSteps, ragged_backend
from kv_gym.live.ragged_attention import attend_padded, attend_ragged, backend_for
from kv_gym.live.slots import RaggedSlots

SUPPORT = Path(__file__).parents[2] / "tests" / "support"
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


def filled(model, batch: int, slots: int, ragged: bool, **settings) -> EvictingCache:
    """A cache whose heads hold `slots` random tokens each, or 1 : 15 around that number where `ragged`."""
    config, device, dtype = model.config, model.device, model.dtype
    heads, dim = config.num_key_value_heads, config.head_dim
    cache = EvictingCache(model, **({"policy": "recency", "budget": 1.0} | settings))
    parts = torch.linspace(1, 15, heads)
    lengths = (parts / parts.sum() * slots * heads).long().clamp(min=1).expand(batch, heads)
    for layer in cache.layers:
        state = layer.state
        shape = (int(lengths.sum()), dim) if ragged else (batch, heads, slots, dim)
        pairs = {name: torch.randn(shape, device=device, dtype=dtype) for name in ("keys", "values")}
        if ragged:
            positions = torch.arange(shape[0], device=device)
            state.slots = RaggedSlots(pairs | {"positions": positions}, lengths.clone(), lengths.clone())
            state.tokens_seen = [slots] * batch
        else:
            state.append(pairs["keys"], pairs["values"], None)
        state.evicted_at, layer.seen = [slots] * batch, slots
        layer.lazy_initialization(pairs["keys"])
    return cache


def full(model, batch: int, tokens: int) -> DynamicCache:
    config, cache = model.config, DynamicCache()
    shape = batch, config.num_key_value_heads, tokens, config.head_dim
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


def seconds_each(device: torch.device, call: Callable[[], object], times: int) -> list[float]:
    """Seconds of each call, with a wait for the device after every one."""
    taken = []
    for _ in range(times):
        wait(device)
        began = time.perf_counter()
        call()
        wait(device)
        taken.append(time.perf_counter() - began)
    return taken


def kernel_seconds(device: torch.device, slots: int, kind: str, shape: tuple[int, int, int]) -> tuple[int, float]:
    """Bytes that one call of the kernel must read, and seconds that it takes, in bfloat16.

    Args:
        device: on a CPU, calls are not replayed.
        slots: of a row on average.
        kind: ``equal`` rows, or ``ragged`` ones, 1 : 15.
        shape: rows, query heads of a row, channels.
    """
    from kv_gym.live.ragged_kernel import attend_rows

    rows, group, d = shape
    parts = torch.linspace(1, 15, rows) if kind == "ragged" else torch.ones(rows)
    lengths = (parts / parts.sum() * slots * rows).long().clamp(min=1)
    total, longest = int(lengths.sum()), int(lengths.max())
    starts, counts = (lengths.cumsum(0) - lengths).to(device), lengths.to(device)
    sizes, nbytes = {"device": device, "dtype": torch.bfloat16}, 2 * total * d * 2
    calls = []
    for _ in range(min(64, max(2, (1 << 30) // nbytes)) if device.type == "cuda" else 1):
        keys, values = (torch.randn(total, d, **sizes) for _ in range(2))
        query = torch.randn(rows, group, d, **sizes)
        calls.append(partial(attend_rows, query, keys, values, starts, counts, 0.1, longest))

    def all_calls() -> None:
        for call in calls:
            call()

    all_calls()
    run = all_calls
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_calls()
        run = graph.replay
        run()
    return nbytes, statistics.median(seconds_each(device, run, 9 if device.type == "cuda" else 1)) / len(calls)


@torch.no_grad()
def step_times(model, cache, batch: int, steps: int, compiled: bool = False) -> dict:
    """Milliseconds of a decoding step as Python drives it; of an evicting cache, also as `CapturedSteps` replays it.

    The full cache of transformers grows, so its steps cannot be captured. With `compiled`, only replays of the compiled
    model are timed.
    """
    token = torch.randint(0, model.config.vocab_size, (batch, 1), device=model.device)

    def step() -> None:
        model(token, past_key_values=cache, logits_to_keep=1)

    found = {}
    if not compiled:
        for _ in range(3):
            step()
        found["ms"] = 1e3 * statistics.median(seconds_each(model.device, step, steps))
    if isinstance(cache, EvictingCache) and (compiled or model.device.type == "cuda"):
        captured, name = CapturedSteps(model, cache, compiled), "compiled_ms" if compiled else "replayed_ms"
        began = time.perf_counter()
        for _ in range(3):
            captured(token)
        if compiled:
            found["compilation_s"] = time.perf_counter() - began
        found[name] = 1e3 * statistics.median(seconds_each(model.device, partial(captured, token), steps))
        if not captured.replayed:
            found["not_replayed"] = found.pop(name) and str(captured.refusal())
    return found


def measured(
    model, kind: str, context: int, share: float, batch: int, steps: int, speed: float, compiled: bool = False
) -> dict:
    """A step's time beside the bytes that it must move: all weights but the embeddings, and all cached pairs."""
    slots, config = max(1, int(context * share)), model.config
    cache = full(model, batch, slots) if kind == "full" else filled(model, batch, slots, kind == "ragged")
    try:
        row = step_times(model, cache, batch, steps, compiled)
    finally:
        if kind != "full":
            cache.detach()
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in embeddings)
    pairs = 2 * batch * slots * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    bound = 1e3 * (weights + pairs * model.dtype.itemsize) / speed
    best = next((row[name] for name in ("compiled_ms", "replayed_ms", "ms") if name in row), math.inf)
    row = {
        "kind": kind, "context": context, "share": share, "batch": batch, **row, "bound_ms": bound,
        "of_bound": bound / best, "tokens_per_second": 1e3 * batch / best,
    }  # fmt: skip
    print("  ", json.dumps(row), flush=True)
    return row


@torch.no_grad()
def kernel_times(model, cache, batch: int) -> dict[str, float]:
    """Milliseconds of the device by kernel in one step, the fifteen longest, and of all together."""
    from torch.profiler import ProfilerActivity

    token = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (model.device.type == "cuda")
    with torch.profiler.profile(activities=activities) as profile:
        model(token, past_key_values=cache, logits_to_keep=1)
        wait(model.device)
    times: dict[str, float] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name[:90]] = times.get(event.name[:90], 0.0) + event.self_device_time_total / 1e3
    longest = sorted(times.items(), key=lambda item: -item[1])[:15]
    return {"all": sum(times.values()), **dict(longest)}


def largest_batch(model, kind: str, context: int, share: float, steps: int, speed: float) -> dict:
    """The row of the largest batch that fits, of 1, 2, 3, 4, 6, 8, 12 ... sequences; on a CPU at most two."""
    best: dict = {}
    for batch in (1, 2, *(size for power in range(1, 12) for size in (3 * 2 ** (power - 1), 4 * 2 ** (power - 1)))):
        if batch > 2 and model.device.type != "cuda":
            break
        try:
            best = measured(model, kind, context, share, batch, steps, speed)
        except torch.cuda.OutOfMemoryError:
            break
        finally:
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
    return best


class Run:
    """The parts of the script; each returns what is written.

    Attributes:
        device: where everything runs.
        tiny: tiny shapes, to rehearse.
        out: folder for the results and for traces and policies on the way.
    """

    def __init__(self, device: torch.device, tiny: bool, out: Path):
        self.device, self.tiny, self.out = device, tiny, out
        self._model: LlamaForCausalLM | None = None
        self._speed: float | None = None
        self.rows: list[dict] = []  # of the part that runs; written even if it fails

    @property
    def model(self) -> LlamaForCausalLM:
        """Random weights, made when they are first needed."""
        if self._model is None:
            torch.manual_seed(0)
            dtype = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            try:
                with torch.device(self.device):
                    self._model = LlamaForCausalLM(LlamaConfig(**(TINY if self.tiny else SHAPE))).eval()
            finally:
                torch.set_default_dtype(dtype)
        return self._model

    @property
    def speed(self) -> float:
        """Bytes per second."""
        if self._speed is None:
            self._speed = bandwidth(self.device, 1 << (24 if self.tiny else 32))
        return self._speed

    @property
    def contexts(self) -> tuple[int, int]:
        return (64, 256) if self.tiny else (131072, 32768)

    # tests

    def kernel_equals_reference(self) -> dict:
        """The kernel against softmax in float64: three types, numbers and codes, uneven rows, an empty one."""
        from kv_gym.live.ragged_kernel import attend_rows
        from kv_gym.live.tiers.quantiser import dequantise, quantise

        lengths = [0, 1, 65, 130] if self.tiny else [0, 1, 63, 64, 65, 300, 4500]
        errors = {}
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for d, group, bits in KERNEL_CASES:
                generator = torch.Generator(self.device).manual_seed(0)
                starts = torch.tensor([0, *(length + 5 for length in lengths)], device=self.device).cumsum(0)
                sizes = {"device": self.device, "generator": generator}
                keys, values = (torch.randn(int(starts[-1]), d, **sizes).to(dtype) for _ in range(2))
                query = torch.randn(len(lengths), group, d, **sizes).to(dtype)
                stored, grids = (keys, values), ()
                if bits:
                    stored, grids = zip(*(quantise(numbers, bits, 16) for numbers in stored), strict=True)
                    keys, values = (dequantise(*pair, bits, torch.float32) for pair in zip(stored, grids, strict=True))
                scaling, counts = d**-0.5, torch.tensor(lengths, device=self.device)
                out, _ = attend_rows(query, *stored, starts[:-1], counts, scaling, max(lengths) + 5, bits, *grids)
                worst = float(out[0].abs().max())
                for row, length in enumerate(lengths[1:], 1):
                    here = slice(int(starts[row]), int(starts[row]) + length)
                    weights = (query[row].double() @ keys[here].double().T * scaling).softmax(-1)
                    worst = max(worst, float((out[row].double() - weights @ values[here].double()).abs().max()))
                errors[f"{dtype} d={d} group={group} bits={bits}"] = worst
        limits = {"torch.float32": 1e-4, "torch.float16": 1e-2, "torch.bfloat16": 6e-2}
        wrong = {name: error for name, error in errors.items() if not error <= limits[name.split()[0]]}
        return {"passed": not wrong, "largest_errors": errors}

    @torch.no_grad()
    def live_equals_masked(self) -> dict:
        """Nine families in float64: a cache with uneven heads against a full cache with evicted tokens hidden."""
        sys.path.insert(0, str(SUPPORT))
        from live_models import FAMILIES, tiny, tokens
        from masked_reference import MaskedReference

        errors = {}
        for family in FAMILIES:
            model, ids = tiny(family).to(self.device), tokens(2, 36).to(self.device)
            with EvictingCache(model, "h2o", 0.3, allocation="global:zscore") as cache:
                reference, worst = MaskedReference(model), 0.0
                for piece in ids.split([28, 4, 1, 1, 1, 1], 1):
                    live = model(piece, past_key_values=cache).logits
                    with torch.device(self.device):  # the reference makes its masks where tensors are made
                        worst = max(worst, float((live - reference(piece)).abs().max()))
                        for layer in cache.evicting_layers:
                            reference.hide(layer, cache.kept_positions(layer))
            errors[family] = worst
        return {"passed": max(errors.values()) < 1e-4, "largest_errors": errors}

    @torch.no_grad()
    def ragged_equals_padded(self) -> dict:
        """Uneven heads through every form of attention: logits of a small model in float32, with and without a
        low-precision tier, against the padded form; and the attention of several tokens in bfloat16, against the
        padded form in float32.
        """
        sys.path.insert(0, str(SUPPORT))
        from live_models import tiny, tokens

        model, errors = tiny("llama", head_dim=32).float().to(self.device), {}
        ids = tokens(1 if self.tiny else 2, 66 if self.tiny else 72).to(self.device)
        for evicted in ("drop", "bits:4"):
            logits = {}
            with EvictingCache(model, "keydiff", 0.3, "global:raw", evicted=evicted) as cache:
                model(ids[:, :64], past_key_values=cache)
                for backend in ("padded", "kernel", "per_head"):
                    with cache.fork() as fork, ragged_backend(backend):
                        steps = [model(token, past_key_values=fork).logits for token in ids[:, 64:].split(1, 1)]
                        logits[backend] = torch.cat(steps, 1)
            scale = float(logits["padded"].abs().max())
            for backend in ("kernel", "per_head"):
                difference = float((logits[backend] - logits["padded"]).abs().max())
                errors[f"{evicted} {backend} float32"] = difference / scale
        lengths = torch.tensor([[40, 70, 65], [64, 35, 33]] if self.tiny else [[40, 100, 1000], [64, 300, 33]])
        generator = torch.Generator(self.device).manual_seed(0)
        sizes = {"device": self.device, "generator": generator}
        pairs = {name: torch.randn(int(lengths.sum()), 64, **sizes) for name in ("keys", "values")}
        for tokens_at_once in (1, 32):
            query = torch.randn(2, 12, tokens_at_once, 64, **sizes)
            expected = attend_padded(query, RaggedSlots(pairs, lengths, lengths, lengths), 0.125)
            half = {name: tensor.bfloat16() for name, tensor in pairs.items()}
            for backend in ("kernel", "varlen"):
                with ragged_backend(backend):
                    form = backend_for(query.bfloat16())
                    out = attend_ragged(query.bfloat16(), RaggedSlots(half, lengths, lengths, lengths), 0.125)
                errors[f"{tokens_at_once} tokens {form} bfloat16"] = float((out.float() - expected).abs().max())
        limits = {name: 1e-5 if name.endswith("float32") else 2e-2 for name in errors}
        passed = all(error <= limits[name] for name, error in errors.items())
        return {"passed": passed, "largest_differences": errors}

    @torch.no_grad()
    def captured_equals_usual(self) -> dict:
        """Replayed steps against usual ones in float32, with cuts in between."""
        sys.path.insert(0, str(SUPPORT))
        from live_models import tiny, tokens

        model, errors, replayed = tiny("llama", head_dim=32).float().to(self.device), {}, {}
        for policy, more, compiled in (
            ("keydiff", {}, False), ("keydiff", {"allocation": "global:raw"}, False),
            ("snapkv", {"evicted": "bits:4"}, False), ("keydiff", {}, self.device.type == "cuda"),
        ):  # fmt: skip
            logits, kept, name = [], [], " ".join([policy, *map(str, more.values()), *["compiled"] * compiled])
            for captured in (False, True):
                with EvictingCache(model, policy, 0.5, trigger="every:16", **more) as cache:
                    model(tokens(2, 40).to(self.device), past_key_values=cache)
                    steps = CapturedSteps(model, cache, captured and compiled)
                    fed = tokens(2, 40, seed=1).to(self.device).split(1, 1)
                    if captured:
                        logits.append(torch.stack([steps(token) for token in fed]))
                        replayed[name] = steps.replayed
                    else:
                        logits.append(torch.stack([model(t, past_key_values=cache).logits[:, -1] for t in fed]))
                    kept.append(cache.kept())
            errors[name] = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
            if not torch.equal(*kept):
                errors[name] = math.inf
        right = self.device.type != "cuda" or min(replayed.values()) > 30
        passed = right and max(errors.values()) < 1e-4
        return {"passed": passed, "largest_relative_differences": errors, "replayed": replayed}

    def record_train_export_decode(self) -> dict:
        """The whole way on the bundled model, on the device; also optimiser steps per second of two agents."""
        from kv_gym import export, record, train
        from kv_gym.models import load_model
        from kv_gym.reference import MODEL
        from kv_gym.reference.prompts import reference_prompts

        model, _ = load_model(MODEL, device=str(self.device))
        began = time.perf_counter()
        traces = record(model, reference_prompts(tokens=128, count=6), self.out / "traces", progress=False)
        found = {"record_s": time.perf_counter() - began}
        steps = 3 if self.tiny else 60
        for agent in ("end_to_end", "joint"):
            began = time.perf_counter()
            trained = train(
                agent, traces, self.out / agent, model=model, steps=steps, every=steps, resume=False, progress=False
            )
            found[f"{agent}_steps_per_s"] = steps / (time.perf_counter() - began)
            folder = export(trained, self.out / f"{agent}-exported")
            with EvictingCache(model, folder, 0.25, trigger="every:4") as cache:
                ids = torch.arange(5, 69, device=self.device)[None]
                said = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=0)
            found[f"{agent}_decoded"] = said.shape[1] - 64
        return found | {"passed": all(found[f"{agent}_decoded"] == 8 for agent in ("end_to_end", "joint"))}

    @torch.no_grad()
    def memory_is_freed(self) -> dict:
        """Bytes that the allocator holds before and after an eviction of seven eighths, against the cache's count."""
        ids = torch.zeros(1, 128 if self.tiny else 8192, dtype=torch.int64, device=self.device)
        with EvictingCache(self.model, "keydiff", 1.0) as cache:
            self.model(ids, past_key_values=cache, logits_to_keep=1)
            counts, allocated = [cache.nbytes()], [self._allocated()]
            cache.set_budget("1/8")
            cache.compress()
            counts, allocated = [*counts, cache.nbytes()], [*allocated, self._allocated()]
        freed = counts[0] - counts[1]
        told = allocated[0] - allocated[1]
        right = self.device.type != "cuda" or abs(told - freed) < 0.02 * freed + (1 << 22)
        return {"passed": right, "cache_bytes": counts, "allocated_bytes": allocated}

    def _allocated(self) -> int:
        wait(self.device)
        return torch.cuda.memory_stats()["allocated_bytes.all.current"] if self.device.type == "cuda" else 0

    # figures

    @torch.no_grad()
    def recording(self) -> dict:
        """Recording one context of 16k tokens, 512 of its slots, against the plain forward; goal 1.2 times."""
        from kv_gym.traces import Prompt, record_sequence

        length, slots = (128, 32) if self.tiny else (16384, 512)
        ids = torch.randint(0, self.model.config.vocab_size, (1, length + 128), device=self.device)
        prompt = Prompt("random", ids[0, :length].tolist(), [ids[0, length:].tolist()])

        def plain() -> None:
            self.model(ids, logits_to_keep=1)

        for name, call in (("plain", plain), ("recorded", lambda: record_sequence(self.model, prompt, slots=slots))):
            call()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = statistics.median(seconds_each(self.device, call, 3))
            peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
            self.rows.append({"forward": name, "tokens": length + 128, "s": seconds, "peak_bytes": peak})
        return {"rows": self.rows, "ratio": self.rows[1]["s"] / self.rows[0]["s"]}

    def training_of_1b(self) -> dict:
        """Recording, and optimiser steps per second of two agents, on a model of 1B parameters and 1,024 tokens."""
        from kv_gym import record, train
        from kv_gym.traces import Prompt

        shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
        length, steps = (64, 2) if self.tiny else (1024, 20)
        torch.manual_seed(0)
        with torch.device(self.device):
            model = LlamaForCausalLM(LlamaConfig(**(TINY if self.tiny else SHAPE | shape))).bfloat16().eval()
        ids = torch.randint(0, model.config.vocab_size, (4, length + 64))
        prompts = [Prompt(f"random-{i}", row[:length].tolist(), [row[length:].tolist()]) for i, row in enumerate(ids)]
        began = time.perf_counter()
        traces = record(model, prompts, self.out / "traces-1b", progress=False)
        found = {"tokens": length, "record_s_per_context": (time.perf_counter() - began) / len(prompts)}
        for agent in ("joint", "end_to_end"):
            began = time.perf_counter()
            train(
                agent, traces, self.out / f"{agent}-1b", model=model, steps=steps, every=steps, resume=False,
                progress=False,
            )  # fmt: skip
            self.rows.append(found | {"agent": agent, "steps_per_s": steps / (time.perf_counter() - began)})
        return {"rows": self.rows}

    def kernel_bound(self) -> dict:
        """The kernel alone, uneven rows 1 : 15 and equal ones, against its bytes; goal 85 % of the bound.

        As in a model, one call after the other reads other keys and values, so none are found in the GPU's cache; the
        calls are replayed as one CUDA graph, so that the host does not count.
        """
        for slots in (40, 80) if self.tiny else (1024, 4096, 16384, 131072):
            for kind in ("ragged", "equal"):
                nbytes, seconds = kernel_seconds(self.device, slots, kind, (2, 4, 64) if self.tiny else (8, 4, 128))
                row = {"kind": kind, "slots": slots, "us": 1e6 * seconds, "of_bound": nbytes / self.speed / seconds}
                self.rows.append(row)
        return {"rows": self.rows}

    def _empty_cache(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def decoding_step(self) -> dict:
        """One sequence; goals: 80 % of the bound, uneven heads at most 1.15 times equal ones."""
        rows = self.rows
        for context in self.contexts:
            uneven = [(kind, share) for share in (1 / 32, 1 / 8, 1 / 4) for kind in ("equal", "ragged")]
            for kind, share in [("full", 1.0), ("equal", 1.0), *uneven]:
                rows.append(measured(self.model, kind, context, share, 1, 3 if self.tiny else 20, self.speed))
                self._empty_cache()
        return {"rows": rows}

    def compiled_steps(self) -> dict:
        """Replays of the compiled model, one sequence; the first row's three first steps include the compilation."""
        long, short = self.contexts
        for context, kind, share in (
            (long, "equal", 1 / 8), (long, "ragged", 1 / 8), (long, "equal", 1.0), (long, "equal", 1 / 32),
            (short, "equal", 1 / 8), (short, "equal", 1.0),
        ):  # fmt: skip
            steps, on_gpu = (2 if self.tiny else 20), self.device.type == "cuda"
            self.rows.append(measured(self.model, kind, context, share, 1, steps, self.speed, compiled=on_gpu))
            self._empty_cache()
        return {"rows": self.rows}

    def largest_batches(self) -> dict:
        """Tokens per second at the longest context: transformers' full cache, one of ours, 1/32; goal 10 times."""
        more = {"context": max(self.contexts), "steps": 5, "speed": self.speed}
        for kind, share in (("full", 1.0), ("equal", 1.0), ("ragged", 1 / 32)):
            self.rows.append(largest_batch(self.model, kind, share=share, **more))
        return {"rows": self.rows}

    def kernels_of_a_step(self) -> dict:
        """Milliseconds of the device by kernel, in one step of the longest context: where the time goes."""
        slots = max(self.contexts) // (1 if self.tiny else 8)
        for kind in ("full", "equal", "ragged"):
            cache = full(self.model, 1, slots) if kind == "full" else filled(self.model, 1, slots, kind == "ragged")
            try:
                step_times(self.model, cache, 1, 1)
                self.rows.append({"kind": kind, "slots": slots, "ms": kernel_times(self.model, cache, 1)})
            finally:
                if kind != "full":
                    cache.detach()
            self._empty_cache()
        return {"rows": self.rows}

    @torch.no_grad()
    def steps_with_cuts(self) -> dict:
        """Steps of which every 64th evicts: mean, a step without eviction, and what an eviction adds; 4,096 and 16,384
        slots a head; kvpress's press where it is installed. Goal: an eviction takes no longer than a step.
        """
        every = 4 if self.tiny else 64
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)

        def times(step: Callable[[], object], evictions: int = 1) -> dict[str, float]:
            """After so many evictions: the first ones of a captured cache capture."""
            seconds_each(self.device, step, evictions * every + 1)
            taken = [1e3 * seconds for seconds in seconds_each(self.device, step, every)]
            usual = statistics.median(taken)
            return {"mean_ms": statistics.mean(taken), "step_ms": usual, "cut_ms": sum(taken) - every * usual}

        for slots in (64, 128) if self.tiny else (4096, 16384):
            about, first = {"slots": slots}, slots in (64, 4096)
            if first and importlib.util.find_spec("kvpress") is not None:
                from kvpress import DecodingPress, KeyDiffPress

                press = DecodingPress(KeyDiffPress(), every, slots, 0)
                with press(self.model):
                    cache = full(self.model, 1, slots)
                    step = partial(self.model, token, past_key_values=cache, logits_to_keep=1)
                    row = {"of": f"kvpress {importlib.metadata.version('kvpress')}", **about, **times(step)}
                    self.rows.append(row | {"slots_at_the_end": cache.get_seq_length()})
            for allocation in ("uniform", "global:raw"):
                settings = {"policy": "keydiff", "budget": slots, "allocation": allocation, "trigger": f"every:{every}"}
                for captured in (False, True) if first else (True,):
                    with filled(self.model, 1, slots, allocation != "uniform", **settings) as cache:
                        steps = CapturedSteps(self.model, cache)
                        usual = partial(self.model, token, past_key_values=cache, logits_to_keep=1)
                        row = {"of": "kv_gym", **about, "allocation": allocation, "captured": captured}
                        row |= times(partial(steps, token), 3) if captured else times(usual)
                        self.rows.append(row | {"replayed": steps.replayed})
            if first:
                plain = full(self.model, 1, slots)
                step = partial(self.model, token, past_key_values=plain, logits_to_keep=1)
                self.rows.append({"of": "full cache that grows", **about, **times(step)})
        return {"rows": self.rows, "every": every}

    @torch.no_grad()
    def cost_of_a_cut(self) -> dict:
        """Scores, threshold and compaction of a whole context of random pairs, down to 1/8."""
        context, learned = max(self.contexts), self._learned_policy()
        settings = [("keydiff", "uniform"), ("keydiff", "global:raw"), ("h2o", "uniform"), ("snapkv", "uniform")]
        settings += [(learned, "uniform"), (learned, "global:raw")]
        for policy, allocation in settings:
            with filled(self.model, 1, context, False, policy=policy, allocation=allocation) as cache:
                for state in (layer.state for layer in cache.layers):
                    state.scaling = self.model.config.head_dim**-0.5
                    query = torch.randn(1, self.model.config.num_attention_heads, 32, self.model.config.head_dim)
                    state.queries = query.to(self.device, self.model.dtype)
                cache.set_budget("1/8")
                cuts = []
                for _ in range(2):  # the first one of all compiles and allocates
                    with cache.fork() as fork:
                        cuts += seconds_each(self.device, fork.compress, 1)
            row = {"policy": policy if policy != learned else "joint", "allocation": allocation, "context": context}
            self.rows.append(row | {"first_ms": 1e3 * cuts[0], "ms": 1e3 * cuts[1]})
            self._empty_cache()
        return {"rows": self.rows}

    @torch.no_grad()
    def reading(self) -> dict:
        """Seconds to read a context in chunks of 4,096, with what policies take notes of."""
        context = max(self.contexts) // 4
        ids = torch.randint(0, self.model.config.vocab_size, (1, context), device=self.device)
        for policy in ("keydiff", "h2o"):
            with EvictingCache(self.model, policy, 1.0) as cache:
                began = time.perf_counter()
                for chunk in ids.split(4096, 1):
                    self.model(chunk, past_key_values=cache, logits_to_keep=1)
                wait(self.device)
            self.rows.append({"policy": policy, "context": context, "s": time.perf_counter() - began})
            self._empty_cache()
        return {"rows": self.rows}

    @torch.enable_grad()
    def _learned_policy(self) -> str:
        """A folder with a `joint` policy for the model, barely trained: what it costs does not depend on that."""
        from kv_gym import export, record, train
        from kv_gym.traces import Prompt

        folder = self.out / "learned"
        if not (folder / "exported").exists():
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(0, self.model.config.vocab_size, (4, 160), generator=generator)
            prompts = [Prompt(f"random-{i}", row[:128].tolist(), [row[128:].tolist()]) for i, row in enumerate(ids)]
            traces = record(self.model, prompts, folder / "traces", progress=False)
            trained = train("joint", traces, folder / "joint", steps=2, every=2, resume=False, progress=False)
            export(trained, folder / "exported")
        return str(folder / "exported")

    @torch.no_grad()
    def first_token(self) -> dict:
        """Time to the first token and peak bytes, read block by block with equal heads, or whole with one threshold."""
        context, rows = (128 if self.tiny else 32768), self.rows
        for allocation, trigger in (("uniform", "block:2048"), ("global:raw", "prefill")):
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            ids = torch.randint(0, self.model.config.vocab_size, (1, context), device=self.device)
            with EvictingCache(self.model, "keydiff", 1 / 8, allocation, trigger) as cache:
                wait(self.device)
                began = time.perf_counter()
                self.model(ids, past_key_values=cache, logits_to_keep=1)
                wait(self.device)
                row = {"allocation": allocation, "trigger": trigger, "context": context}
                row |= {"first_token_s": time.perf_counter() - began, "cache_bytes": cache.nbytes()}
            rows.append(row | {"peak_bytes": torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0})
        return {"rows": rows}


# (channels of a head, query heads of a KV head, bits of stored numbers)
KERNEL_CASES = ((64, 3, 0), (80, 8, 0), (128, 4, 0), (256, 1, 0), (128, 4, 2), (128, 4, 4), (96, 2, 8))
# (part, share of the minutes that it may take)
PARTS = (
    ("kernel_equals_reference", 0.2), ("ragged_equals_padded", 0.15), ("live_equals_masked", 0.15),
    ("captured_equals_usual", 0.2),
    ("memory_is_freed", 0.1), ("kernel_bound", 0.1), ("decoding_step", 0.25), ("largest_batches", 0.2),
    ("steps_with_cuts", 0.25), ("cost_of_a_cut", 0.2), ("record_train_export_decode", 0.2), ("first_token", 0.15),
    ("recording", 0.15), ("training_of_1b", 0.2), ("kernels_of_a_step", 0.15), ("reading", 0.1),
    ("compiled_steps", 1.0),
)  # fmt: skip


@contextmanager
def time_limit(seconds: float):
    """Raise a TimeoutError in the block after so many seconds."""

    def stop(number, frame):
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(max(1, math.ceil(seconds)))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of results.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to rehearse")
    parser.add_argument("--parts", nargs="+", choices=[name for name, _ in PARTS], help="only these")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is here; TRITON_INTERPRET=1 with --device cpu --tiny rehearses the script")
    if args.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("a CPU runs the kernel in Triton's interpreter: set TRITON_INTERPRET=1 before the script starts")
    device, end = torch.device(args.device), time.monotonic() + 60 * args.minutes
    card = torch.cuda.get_device_name() if device.type == "cuda" else "none: a rehearsal on a CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "kv_gym": kv_gym.__version__}
    results: dict = {"card": card, "tiny": args.tiny, "started": time.strftime("%F %T"), "versions": versions}
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(device, args.tiny, args.out)
    for name, share in PARTS:
        if args.parts and name not in args.parts:
            continue
        left, began = end - time.monotonic(), time.monotonic()
        if left < 5:
            results[name] = {"error": "no time was left"}
        else:
            run.rows = []
            try:
                with time_limit(min(left, 60 * args.minutes * share)):
                    results[name] = getattr(run, name)()
            except Exception as error:  # the next part is worth having too
                traceback.print_exc()
                results[name] = {"error": f"{type(error).__name__}: {error}"[:500], "rows": run.rows}
            results[name]["seconds"] = time.monotonic() - began
        if device.type == "cuda":
            torch.cuda.empty_cache()
        with atomic_write(args.out / "results.json") as file:
            file.write_text(json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(results[name])[:300], flush=True)


if __name__ == "__main__":
    main()
