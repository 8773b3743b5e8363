"""Store what kvpress's presses score on one tiny model: `.venv-kvpress/bin/python tests/kvpress/golden.py`.

Writes golden.npz beside this file, which tests/test_kvpress_parity.py compares kv_gym's policies with, where kvpress
is not installed. `make kvpress` checks that the file is what this script makes.
"""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from kvpress import (
    CriticalKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    LagKVPress,
    ObservedAttentionPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from tiny_models import attended, captured, prefilled, prompt, tiny

FILE = Path(__file__).with_name("golden.npz")
LAYER, N, RATIO = 1, 60, 0.5


class ExpectedAttentionOfWindow(ExpectedAttentionPress):
    """With the moments of the last 16 queries as they were used: the one step in which kv_gym differs on purpose."""

    def get_query_statistics(self, module, hidden_states):
        """Mean and covariance of what the layer's attention function got."""
        window = captured[module.layer_idx][:, :, -16:]
        centred = window - window.mean(2, keepdim=True)
        return window.mean(2), torch.einsum("bnsi,bnsj->bnij", centred, centred) / window.shape[2]


PRESSES = {
    "critical_kv": lambda: CriticalKVPress(SnapKVPress(RATIO, window_size=8)),
    "expected_attention": lambda: ExpectedAttentionOfWindow(RATIO, n_sink=0),
    "keydiff": lambda: KeyDiffPress(RATIO),
    "knorm": lambda: KnormPress(RATIO),
    "lagkv": lambda: LagKVPress(RATIO, n_sink=4, lag_size=16),
    "observed_attention": lambda: ObservedAttentionPress(RATIO),
    "snapkv": lambda: SnapKVPress(RATIO, window_size=8, kernel_size=5),
    "streaming_llm": lambda: StreamingLLMPress(RATIO, n_sink=4),
    "tova": lambda: TOVAPress(RATIO),
}


def arrays():
    """Everything that golden.npz holds: inputs of one layer, and each press's scores `[kv_heads, tokens]`."""
    model, ids = tiny("llama", torch.float32), prompt(N)
    keys, values, queries = attended(model, ids)[LAYER]
    module = model.model.layers[LAYER].self_attn
    output = module.o_proj.weight.detach().T.unflatten(0, (-1, module.head_dim))
    stored = {"keys": keys, "values": values, "queries": queries, "output": output[None]}
    for name, make in PRESSES.items():
        model.set_attn_implementation("eager" if name == "observed_attention" else "sdpa")
        stored[f"scores.{name}"] = scores_of(make(), model, ids)
    found = {name: tensor[0].detach().float().numpy() for name, tensor in stored.items()}
    return found | {"versions": np.array([f"{name}=={version(name)}" for name in ("kvpress", "transformers", "torch")])}


def scores_of(press, model, ids):
    """What a press scores in the layer, while kvpress runs it."""
    asked = {}
    score = press.score

    def listening(module, *arguments, **more):
        asked[module.layer_idx] = score(module, *arguments, **more).clone()
        return asked[module.layer_idx].clone()

    press.score = listening
    prefilled(model, ids, press)
    return asked[LAYER]


if __name__ == "__main__":
    np.savez_compressed(FILE, **arrays())
    print(f"wrote {FILE} ({FILE.stat().st_size:,} bytes)")
