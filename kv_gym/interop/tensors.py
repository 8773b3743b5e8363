"""A trained policy as plain tensors, for engines without kv_gym: one safetensors file, three products.

Tensors, all float32 unless said otherwise, for L layers with H KV heads of d dimensions and `hidden` units:

| name | shape | |
|---|---|---|
| `layers` | `[L]` int64 | the model's index of each of the L layers that follow |
| `weights.0` | `[L, H, 2 d + 2, hidden]` | first product; the standardisation of the inputs is folded in |
| `biases.0` | `[L, H, hidden]` | |
| `weights.1`, `biases.1` | `[L, H, hidden, hidden]`, `[L, H, hidden]` | second product |
| `weights.2`, `biases.2` | `[L, H, hidden, 1]`, `[L, H, 1]` | third product: the score, higher = keep |

The input of a slot is, in this order: its key after rotary embedding (d), its value (d), log(1 + position) / 4 and
log(1 + age) / 4, where position counts from 0 and age is how many tokens have come since. After the first and the
second product stands a ReLU. :func:`score_numpy` is all of it. The header's metadata hold, under `kv_gym`, a JSON
object with the format's version, the input layout, the sizes, the tokens to protect, the lengths trained on, whether
scores compare across heads, and the fingerprint of the model.

A port keeps the `sinks` first and `recent` last tokens of `protect` whatever their scores, and gives ties to the newer
token. Paged engines whose blocks span all heads want one score per token: see :mod:`kv_gym.policies.same_tokens`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kv_gym.errors import UserError
from kv_gym.files import atomic_write, make_folder, refuse_address
from kv_gym.policies.scoring.inputs import DEFAULT

FORMAT = 1
INPUTS = ("key after rotary embedding", "value", "log(1 + position) / 4", "log(1 + age) / 4")


def export_tensors(policy, out: str | Path) -> Path:
    """Write a trained policy as the tensors that this module describes; the file appears whole or not at all.

    Args:
        policy: a folder or hub id that :meth:`~kv_gym.policies.scorer.Scorer.from_pretrained` reads, or a Scorer.
        out: the file to write, such as `joint.safetensors`.

    Raises:
        UserError: no such policy, a policy with other inputs, or `out` is a folder.
    """
    from safetensors.numpy import save

    from kv_gym.policies.scorer import GroupedScorer, Scorer

    refuse_address(out)
    out = Path(out)
    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file to write the tensors into, such as {out / 'x.safetensors'}")
    scorer = policy if isinstance(policy, Scorer) else Scorer.from_pretrained(policy)
    network, model = scorer.network, scorer.fingerprint
    if not isinstance(network, GroupedScorer):
        raise UserError(
            f"the policy is a network of class {type(network).__name__}, which the tensor format does not hold: export "
            "one that scores tokens by themselves"
        )
    width = network.weights[0].shape[1]
    if scorer.inputs != DEFAULT or width != 2 * model.head_dim + 2:
        raise UserError(
            f"the policy reads more than keys, values and positions (its inputs: {', '.join(scorer.inputs)}; {width} "
            "numbers), which the tensor format does not hold"
        )
    if network.depth != 2:
        raise UserError(f"the policy has {network.depth} hidden layers, and the tensor format holds two")
    sizes = len(model.layers), model.kv_heads
    weights = [weight.detach().cpu().double().numpy() for weight in network.weights]
    biases = [bias.detach().cpu().double().numpy() for bias in network.biases]
    # ((x - mean) * scale) W + b = x (scale W) + (b - (mean * scale) W), in double since the two terms may be large
    mean, scale = network.mean.cpu().double().numpy(), network.scale.cpu().double().numpy()
    biases[0] = biases[0] - (mean * scale) @ weights[0]
    weights[0] = weights[0] * scale.swapaxes(1, 2)
    tensors = {"layers": np.array(model.layers, np.int64)}
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        tensors[f"weights.{i}"] = weight.reshape(*sizes, *weight.shape[1:]).astype(np.float32)
        tensors[f"biases.{i}"] = bias.reshape(*sizes, -1).astype(np.float32)
    description = {
        "format": FORMAT,
        "inputs": INPUTS,
        "activation": "relu",
        "layers": len(model.layers),
        "kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden": network.hidden,
        "protect": dict(zip(("sinks", "recent"), scorer.protection, strict=True)),
        "lengths": scorer.lengths,
        "comparable": bool(scorer.comparable),
        "fingerprint": model.to_json(),
    }
    make_folder(out.parent)
    with atomic_write(out) as part:
        part.write_bytes(save(tensors, metadata={"kv_gym": json.dumps(description)}))
    return out


def score_numpy(
    tensors: Mapping[str, NDArray], layer: int, keys: NDArray, values: NDArray, positions: NDArray, seen: int
) -> NDArray[np.float32]:
    """The computation that a port repeats: the scores `[kv_heads, n]` of one layer, higher = keep.

    Equal to :meth:`kv_gym.policies.scorer.Scorer.score` up to the rounding of float32.

    Args:
        tensors: as ``safetensors.numpy.load_file`` reads them from the file.
        layer: the model's index of the layer.
        keys: `[kv_heads, n, d]`, after rotary embedding.
        values: `[kv_heads, n, d]`.
        positions: `[kv_heads, n]` or `[n]` integers from 0, each slot's place in the text.
        seen: tokens so far, evicted ones included.
    """
    row = tensors["layers"].tolist().index(layer)
    features = np.log1p(np.stack((positions, seen - 1 - positions), -1).astype(np.float32)) / 4
    x = np.concatenate((keys, values, np.broadcast_to(features, (*keys.shape[:-1], 2))), -1).astype(np.float32)
    for i in range(3):
        x = x @ tensors[f"weights.{i}"][row] + tensors[f"biases.{i}"][row][:, None]
        if i < 2:
            x = np.maximum(x, 0)
    return x[..., 0]
