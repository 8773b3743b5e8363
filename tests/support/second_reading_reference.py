"""What a repetition pays to the context, from the whole text at once: nothing here is the library's second reading."""

import torch
from masked_reference import MaskedReference


def paid_when_repeated(model, ids, chunk=2048, overlap=8, sinks=4, lead=(), projected=False):
    """Per layer the largest attention `[batch, kv_heads, n]` float32 that the repetition of `ids [batch, n]` pays.

    Every chunk is read anew by a model that has seen the context alone; of the layer's full attention what is neither
    a sink, nor the chunk's own, nor of the repetition is struck out, and the rest is divided by its sum.
    """
    batch, n = ids.shape
    found = {}
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        repeated = torch.cat((torch.tensor(lead).long().expand(batch, -1), ids[:, max(0, start - overlap) : stop]), 1)
        reference = MaskedReference(model)
        inputs, hooks = {}, []
        for layer, block in enumerate(model.base_model.layers):
            hooks.append(
                block.self_attn.register_forward_pre_hook(
                    lambda _, args, kwargs, layer=layer, inputs=inputs: inputs.update({layer: kwargs["hidden_states"]}),
                    with_kwargs=True,
                )
            )
        reference(ids)
        reference(repeated)
        for hook in hooks:
            hook.remove()
        m = repeated.shape[1]
        for layer, keys in reference.keys.items():
            queries = reference.queries[layer][:, :, n:].double()
            group = queries.shape[1] // keys.shape[1]
            if layer not in found:
                found[layer] = torch.zeros(keys.shape[0], keys.shape[1], n)
            for row in range(batch):
                for head in range(queries.shape[1]):
                    own = keys[row, head // group].double()
                    weights = (queries[row, head] @ own.T * queries.shape[-1] ** -0.5).exp()
                    for query in range(m):
                        weights[query, n + query + 1 :] = 0
                    weights[:, min(start, sinks) : start] = 0
                    weights[:, max(stop, sinks) : n] = 0
                    weights /= weights.sum(-1, keepdim=True)
                    if projected:
                        values = reference.values[layer][row, head // group].double()
                        weights *= (values @ reference.outputs[layer][head].double()).norm(dim=-1)
                        weights /= inputs[layer][row].double().norm(dim=-1, keepdim=True)
                    most = weights[:, start:stop].amax(0).float()
                    slots = found[layer][row, head // group]
                    slots[start:stop] = torch.maximum(slots[start:stop], most)
    return found
