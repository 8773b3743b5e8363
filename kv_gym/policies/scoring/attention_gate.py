"""The network of Attention-Gate: a small attention over a layer's input, and one score per token and KV head.

Paper: In-context KV-Cache Eviction for LLMs via Attention-Gate, arXiv 2410.12876. Certain of it, for its full text was
not available: before every attention layer a reduced multi-head attention reads the layer's input of the whole
context, and a gating function gives every token and head a flag. Everything else here is kv_gym's own specification.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.policies.scoring.inputs import HIDDEN, read_inputs
from kv_gym.policies.scoring.network import ScoringNetwork, refuse_width


class AttentionGate(ScoringNetwork):
    """Attention of all tokens to all tokens of a context, without positions and without a causal mask, in every layer.

    From the standardised input X `[n, D]` of a layer: Q, K, V = X W (each `[n, A a]`, no bias), O = softmax(Q K^T /
    sqrt(a)) V over the valid tokens, and the logits [O, X] W_g + b_g `[n, kv_heads]`. Our own choices: one logit per
    KV head (the paper's models have as many as query heads); a token's own X beside O, since attention without
    positions cannot tell apart tokens that it pools alike; W_g starts at zero and b_g at +4, so that everything is
    kept at first.

    Args:
        heads: layers x KV heads, layer by layer.
        kv_heads: of a layer.
        hidden_size: D, width of the model's hidden states.
        hidden: A a, the width of all its attention heads together.
        gate_heads: A.
    """

    START = 4.0  # of the bias: sigmoid(4) is 0.98

    def __init__(self, heads: int, kv_heads: int, hidden_size: int, hidden: int = 64, gate_heads: int = 4):
        super().__init__()
        if hidden % gate_heads or heads % kv_heads:
            raise UserError(
                f"an attention gate got a width of {hidden} for {gate_heads} attention heads and {heads} KV heads in "
                f"layers of {kv_heads}; expected multiples"
            )
        self.heads, self.kv_heads, self.hidden_size = heads, kv_heads, hidden_size
        self.hidden, self.gate_heads, self.depth, self.inputs = hidden, gate_heads, 1, (HIDDEN,)
        self.register_buffer("mean", torch.zeros(heads, 1, hidden_size))
        self.register_buffer("frequencies", None)
        self.register_buffer("scale", torch.ones(heads, 1, hidden_size))
        layers = heads // kv_heads
        self.project = nn.Parameter(torch.randn(layers, hidden_size, 3 * hidden) * hidden_size**-0.5)
        self.weight = nn.Parameter(torch.zeros(layers, hidden + hidden_size, kv_heads))
        self.bias = nn.Parameter(torch.full((layers, 1, kv_heads), self.START))

    def scores(self, x: Tensor, heads: slice | Tensor = slice(None)) -> Tensor:
        """Logits `[heads, m]` of whole layers' inputs `[heads, m, D]`, the same for the heads of a layer.

        The m tokens are one context.
        """
        assert isinstance(heads, slice)
        first, last, _ = heads.indices(self.heads)
        layers = slice(first // self.kv_heads, last // self.kv_heads)
        logits = self.logits(x[:: self.kv_heads, None], layers)[:, 0]  # [layers, m, kv_heads]
        return logits.transpose(1, 2).flatten(0, 1)

    def logits(self, x: Tensor, layers: slice, valid: Tensor | None = None) -> Tensor:
        """Logits `[layers, batch, n, kv_heads]` of standardised inputs `[layers, batch, n, D]`.

        Args:
            x: of each layer and row.
            layers: a run of the layers.
            valid: `[batch, n]` bool, which tokens there are; None means all.
        """
        count, batch, n, _ = x.shape
        flat = x.flatten(1, 2)
        parts = (flat @ self.project[layers]).view(count * batch, n, 3, self.gate_heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each [layers * batch, A, n, a]
        mask = None
        if valid is not None:  # finite: a row may have no token at all
            mask = torch.zeros_like(valid, dtype=query.dtype).masked_fill(~valid, torch.finfo(query.dtype).min)
            mask = mask.repeat(count, 1)[:, None, None]
        pooled = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).reshape(count, batch * n, -1)
        gates = torch.baddbmm(self.bias[layers], torch.cat((pooled, flat), -1), self.weight[layers])
        return gates.view(count, batch, n, -1)

    def score_view(self, view: CacheView, heads: slice) -> Tensor:
        """Logits of a view that holds the hidden states of all its tokens.

        Raises:
            UserError: hidden states of another width.
        """
        hidden = read_inputs(view, self.inputs)[:, 0]  # [batch, n, D]
        refuse_width(hidden, self.hidden_size)
        x = (hidden - self.mean[heads.start]) * self.scale[heads.start]
        layer = heads.start // self.kv_heads
        return self.logits(x[None], slice(layer, layer + 1), view.valid.any(1))[0].transpose(1, 2)
