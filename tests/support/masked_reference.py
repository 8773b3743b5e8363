"""A full cache with tokens masked per head: what eviction must equal. Nothing here comes from kv_gym.

The model runs with a plain DynamicCache that keeps every token, and attention is written out from its formula:
float64 products, a boolean of who may see whom, softmax. `hide` masks tokens per layer, row and KV head for all
later queries.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

NAME = "masked_reference"


class MaskedReference:
    """A model that remembers everything and looks away from what was hidden.

    Attributes:
        hidden: layer -> bool `[batch, kv_heads, tokens]`, what no later query sees.
        received: layer -> float64 `[batch, kv_heads, tokens]`, attention received so far from every query, mean over
            the query heads of each KV head.
        outputs: layer -> `[query_heads, d, D]`, the output projection, head by head.
        keys, values, queries: layer -> `[batch, heads, tokens, d]`, as the attention of all forwards so far saw them.
    """

    def __init__(self, model):
        self.model = model
        self.cache = DynamicCache()
        self.hidden, self.received, self.keys, self.values, self.queries, self.outputs = {}, {}, {}, {}, {}, {}

    @torch.no_grad()
    def __call__(self, ids):
        """Logits `[batch, new, vocabulary]` of the next tokens."""
        own = self.model.config._attn_implementation
        AttentionInterface.register(NAME, self._attention)
        AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
        self.model.set_attn_implementation(NAME)
        try:
            start = self.cache.get_seq_length()
            positions = torch.arange(start, start + ids.shape[1])[None]
            return self.model(ids, position_ids=positions, past_key_values=self.cache).logits
        finally:
            self.model.set_attn_implementation(own)

    def hide(self, layer, kept):
        """From now on show only the positions `kept [batch, kv_heads, k]` of the tokens so far; -1 fills up."""
        batch, heads, _ = kept.shape
        hidden = torch.ones(batch, heads, self.cache.get_seq_length(), dtype=torch.bool)
        for row in range(batch):
            for head in range(heads):
                shown = kept[row, head]
                hidden[row, head, shown[shown >= 0]] = False
        self.hidden[layer] = hidden

    def _attention(self, module, query, key, value, mask, scaling=None, **rest):
        layer, (batch, query_heads, new, d), (heads, n) = module.layer_idx, query.shape, key.shape[1:3]
        group = query_heads // heads
        visible = (torch.arange(n) <= torch.arange(n - new, n)[:, None]).expand(batch, heads, new, n).clone()
        if rest.get("sliding_window"):
            visible &= torch.arange(n) > torch.arange(n - new, n)[:, None] - rest["sliding_window"]
        if layer in self.hidden:
            hidden = self.hidden[layer]
            visible[..., : hidden.shape[2]] &= ~hidden[:, :, None]
        repeated = key.repeat_interleave(group, 1).double()
        scores = query.double() @ repeated.transpose(-1, -2) * (d**-0.5 if scaling is None else scaling)
        weights = scores.masked_fill(~visible.repeat_interleave(group, 1), float("-inf")).softmax(-1)
        received = weights.view(batch, heads, group, new, n).mean(2).sum(2)
        if layer in self.received:
            received[..., : n - new] += self.received[layer]
        self.received[layer], self.keys[layer], self.values[layer] = received, key, value
        weight = module.o_proj.weight if hasattr(module, "o_proj") else module.dense.weight
        self.outputs[layer] = torch.stack([weight[:, h * d : (h + 1) * d].T for h in range(query_heads)]).detach()
        before = self.queries.get(layer)
        self.queries[layer] = query if before is None else torch.cat((before, query), 2)
        output = weights @ value.repeat_interleave(group, 1).double()
        return output.transpose(1, 2).contiguous().to(query.dtype), None
