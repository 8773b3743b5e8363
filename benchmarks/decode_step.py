"""How long one decoding step takes with an evicting cache, against a cache that only ever held the budget.

The floor is transformers' DynamicCache filled with just the budget: no policy, no eviction, nothing to decide. All
configurations decode in turns in one run, 16 steps a turn, and the table shows the median over turns of a
configuration's mean step and of its ratio to the floor in the same turn. Caches read the last ``budget + 512`` tokens
of the context, in chunks: what was evicted before them costs nothing any more. Times are processor time of one
thread, so that a busy machine shows less.

Beside the time stand the bytes that the cache holds, and a bound: a step reads all weights and the whole cache once.
Where memory limits the speed, these bytes compared with the floor's are the least that the ratio of times can be.

The model is shaped like a small Llama (hidden 512, 8 layers, 8 query and 8 KV heads of 64) with random weights;
``--model`` takes another one, and ``--trained`` the folder of a policy for it. With ``--kvpress`` (in the environment
of `make kvpress`) its decoding presses run as configurations of their own.

Run: ``python benchmarks/decode_step.py --json benchmarks/results/decode_step.json``
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kv_gym import EvictingCache
from kv_gym.models import load_model
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.policies import Policy, make_policy
from kv_gym.policies.scorer import GroupedScorer, Scorer
from kv_gym.policies.scoring.inputs import DEFAULT

LAYERS, HEADS, DIM, HIDDEN, VOCABULARY = 8, 8, 64, 512, 1024
STEPS = 16  # of a turn, and the longer interval between evictions
CHUNK = 512
POLICIES = ("knorm", "keydiff", "h2o", "scorer")


@dataclass(frozen=True)
class Taste(Policy):
    """Scores by a hash of the key; under one threshold, head h of a layer gets about 2 h + 1 parts of the slots."""

    comparable = True
    static = True

    def score(self, view):
        luck = (view.keys.float().sum(-1) * 1e4).frac().abs()  # uniform in [0, 1)
        parts = 2 * torch.arange(view.keys.shape[1])[:, None] + 1.0
        # of a head with p parts, 1 - t ** p lies above the threshold t
        return luck ** (1 / parts)


def random_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=HEADS, head_dim=DIM, vocab_size=VOCABULARY, max_position_embeddings=1 << 20,
        )
    ).eval()  # fmt: skip


def sizes(model) -> tuple[int, int, int]:
    """Layers, KV heads and head dimension."""
    config = model.config
    return config.num_hidden_layers, config.num_key_value_heads, config.head_dim


def plain(model, tokens: int) -> DynamicCache:
    layers, heads, d = sizes(model)
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(torch.randn(1, heads, tokens, d), torch.randn(1, heads, tokens, d), layer)
    return cache


class Plain:
    """A configuration with transformers' own cache, set back to its first length before every turn."""

    def __init__(self, model, tokens: int, around=nullcontext):
        self.model, self.kept, self.around = model, plain(model, tokens), around

    def turn(self) -> float:
        cache = copy.deepcopy(self.kept)
        with self.around():
            return seconds(self.model, cache)

    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.kept.layers)


class Evicting:
    """A configuration with an evicting cache, which stays at its budget however long it decodes."""

    def __init__(self, model, policy, budget: int, interval: int, allocation: str = "uniform"):
        self.model = model
        self.cache = EvictingCache(model, policy, budget, allocation=allocation, trigger=f"every:{interval}")
        ids = torch.randint(0, VOCABULARY, (1, budget + CHUNK), generator=torch.Generator().manual_seed(0))
        for chunk in ids.split(CHUNK, 1):
            model(chunk, past_key_values=self.cache, logits_to_keep=1)
        self.turn()  # the first new token makes room for all that follow

    def turn(self) -> float:
        return seconds(self.model, self.cache)

    def nbytes(self) -> int:
        return self.cache.nbytes()


def seconds(model, cache) -> float:
    token = torch.zeros(1, 1, dtype=torch.int64)
    began = time.process_time()
    for _ in range(STEPS):
        model(token, past_key_values=cache)
    return (time.process_time() - began) / STEPS


def learned(model, inputs: tuple[str, ...] = DEFAULT) -> Scorer:
    torch.manual_seed(0)
    layers, heads, d = sizes(model)
    network = GroupedScorer(layers * heads, d, 64, inputs)
    return Scorer(network, Fingerprint.of(model), (1, 1 << 20), calibrated=True)


def our_configurations(model, budget: int, policies: list[str], trained: str | None) -> dict:
    configurations = {}
    for name in policies:
        policy = learned(model) if name == "scorer" else name
        for interval in (1, STEPS):
            configurations[f"{name}, every {interval}"] = Evicting(model, policy, budget, interval)
    static = learned(model, ("key", "value"))
    configurations["scorer of key and value, every 1"] = Evicting(model, static, budget, 1)
    configurations["scorer of key and value, one threshold, every 1"] = Evicting(model, static, budget, 1, "global")
    if trained is not None:
        for interval in (1, STEPS):
            name = f"trained policy, one threshold, every {interval}"
            configurations[name] = Evicting(model, make_policy(trained), budget, interval, "global")
    configurations["equal heads, every 16"] = Evicting(model, Taste(), budget, STEPS)
    configurations["ragged heads, every 16"] = Evicting(model, Taste(), budget, STEPS, "global")
    return configurations


def kvpress_configurations(model, budget: int) -> dict:
    from kvpress import DecodingPress, KeyDiffPress, KnormPress

    configurations = {}
    for name, press in (("knorm", KnormPress()), ("keydiff", KeyDiffPress())):
        for interval in (1, STEPS):
            decoding = DecodingPress(base_press=press, compression_interval=interval, target_size=budget)
            configurations[f"kvpress {name}, every {interval}"] = Plain(model, budget, lambda d=decoding: d(model))
    return configurations


@torch.no_grad()
def compare(model, context: int, turns: int, policies: list[str], trained: str | None, kvpress: bool) -> list[dict]:
    budget = context // 8
    configurations: dict = {"floor": Plain(model, budget), "full cache": Plain(model, context)}
    configurations |= our_configurations(model, budget, policies, trained)
    if kvpress:
        configurations |= kvpress_configurations(model, budget)
    took: dict[str, list[float]] = {name: [] for name in configurations}
    for _ in range(turns):
        for name, configuration in configurations.items():
            took[name].append(configuration.turn())
    spread = configurations["ragged heads, every 16"].cache.kept().double().mean((0, 1))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    held = {name: configuration.nbytes() for name, configuration in configurations.items()}
    rows = []
    for name, times in took.items():
        base = took["equal heads, every 16" if name.startswith("ragged") else "floor"]
        ratios = [mine / other for mine, other in zip(times, base, strict=True)]
        rows.append({
            "context": context, "budget": budget, "configuration": name, "ms": 1e3 * statistics.median(times),
            "ratio": statistics.median(ratios), "to": "equal heads" if name.startswith("ragged") else "floor",
            "tokens_per_second": 1 / statistics.median(times), "cache_bytes": held[name],
            "bound": (weights + held[name]) / (weights + held["floor"]),
        })  # fmt: skip
    rows[-1 if not kvpress else list(took).index("ragged heads, every 16")]["head_sizes"] = [
        round(size) for size in spread.tolist()
    ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--context", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--kvpress", action="store_true", help="add kvpress's decoding presses")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES)
    parser.add_argument("--model", help="a transformers model instead of the random one")
    parser.add_argument("--trained", help="folder of a policy that was trained for the model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(args.model)[0].eval() if args.model else random_model()
    rows = []
    print("| context | budget | configuration | ms per step | ratio | to | bound | cache, MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for context in args.context:
        for row in compare(model, context, args.turns, args.policies, args.trained, args.kvpress):
            rows.append(row)
            print(
                f"| {row['context']} | {row['budget']} | {row['configuration']} | {row['ms']:.1f} | {row['ratio']:.2f} "
                f"| {row['to']} | {row['bound']:.2f} | {row['cache_bytes'] / 2**20:.1f} |"
            )
    if args.json:
        about = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        }
        args.json.write_text(json.dumps({"cores": os.cpu_count(), **about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
