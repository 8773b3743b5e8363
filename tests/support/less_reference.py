"""LESS in its parallel form, from the formulas of the paper: nothing is absorbed, every evicted token stays in view.

A full cache keeps all keys; what was evicted is weighed by `phi(q) . psi(k)` where a kept token is weighed by
`exp(q . k / sqrt d)`. Only the weights of the kernels come from kv_gym.
"""

import torch
from masked_reference import MaskedReference

from kv_gym.live.tiers import LowRankState
from kv_gym.models.fingerprint import Fingerprint


def state_for(model, scale=1.0):
    """Random kernels whose evicted pairs weigh about as much as kept ones; with a scale of 0 nothing."""
    torch.manual_seed(5)
    state = LowRankState.untrained(Fingerprint.of(model), 4, 6, scale)
    for layer in state.kernels:
        layer.log_scale.copy_(torch.randn_like(layer.log_scale))
    return LowRankState(state.kernels, state.fingerprint)


def gelu(x):
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def psi(kernels, head, keys):
    """`[n, R]` for the keys `[n, d]` of one KV head."""
    own = {name: tensor[head].double() for name, tensor in kernels.named_parameters()}
    u = own["key_scale"].abs() * gelu(gelu(keys @ own["key_in"]) @ own["key_out"])
    return (u + (u @ own["mix"]) * own["mix_scale"]).abs()


def phi(kernels, head, queries):
    """`[m, R]` for the queries `[m, d]` of one query head."""
    features = gelu(gelu(queries @ kernels.query_in[head].double()) @ kernels.query_out[head].double()).abs()
    return features * kernels.log_scale[head].double().exp()


class LessReference(MaskedReference):
    """A model that remembers everything, and weighs what was hidden by kernels instead of the softmax."""

    def __init__(self, model, kernels):
        super().__init__(model)
        self.kernels = kernels

    def _attention(self, module, query, key, value, mask, scaling=None, **rest):
        super()._attention(module, query, key, value, mask, scaling, **rest)  # what it keeps for policies
        (batch, query_heads, new, d), (heads, n) = query.shape, key.shape[1:3]
        kernels, group = self.kernels[module.layer_idx], query_heads // heads
        scaling = d**-0.5 if scaling is None else scaling
        hidden = self.hidden.get(module.layer_idx, torch.zeros(batch, heads, 0, dtype=torch.bool))
        output = torch.zeros(batch, new, query_heads, d, dtype=torch.float64)
        for row in range(batch):
            for head in range(query_heads):
                keys, values = (tensor[row, head // group].double() for tensor in (key, value))
                queries = query[row, head].double()
                weights = (queries @ keys.T * scaling).exp()
                evicted = hidden[row, head // group].nonzero()[:, 0]
                kernel = phi(kernels, head, queries) @ psi(kernels, head // group, keys).T
                weights[:, evicted] = kernel[:, evicted]
                later = torch.arange(n) > torch.arange(n - new, n)[:, None]
                weights = weights.masked_fill(later, 0)
                output[row, :, head] = weights @ values / weights.sum(1, keepdim=True)
        return output.to(query.dtype), None
