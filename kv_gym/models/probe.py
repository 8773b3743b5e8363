"""A probe: the model reads a text behind what it has cached, its queries are looked at, and nothing of it is kept.

Policies that score by attention can thus be asked about any text, not only about the newest tokens: EpiCache
(arXiv 2509.17396) reads parts of an episode after every block of a conversation.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kv_gym.models.attention import AttentionCall
from kv_gym.models.cache_name import with_cache
from kv_gym.models.context_repetition import QUERY_BLOCK
from kv_gym.models.second_reading import CachedLayer, ReadOnlyLayer, visibility_mask


class ProbedLayer(CachedLayer, Protocol):
    """A full-attention layer that has cached the context, and shows its policies a probe."""

    def observe_probe(self, query: Tensor) -> None:
        """Show policies the queries `[batch, query_heads, m, d]` of the probe."""


@torch.no_grad()
def read_probe(model, ids: Tensor, cached: Mapping[int, ProbedLayer], layers: Sequence[Any], seen: int) -> None:
    """Have a model read a probe behind the tokens that it has cached, and show its queries to policies.

    Time: a forward over the probe. Memory: the probe's queries, and one layer's keys and values once more.

    Args:
        model: the model, attached (see :func:`kv_gym.models.attention.attach`).
        ids: `[batch, m]` int64, the probe.
        cached: the full-attention layers, by their index in the model.
        layers: all layers of the cache; those with sliding windows are read, and left as they are.
        seen: tokens seen, the same in every row; the probe's positions go on from there.
    """
    probed: list[Any] = [copy.copy(layer) for layer in layers]
    for index, layer in cached.items():
        probed[index] = _ProbedLayer(layer, seen)
    positions = seen + torch.arange(ids.shape[1], device=ids.device)
    model.base_model(
        input_ids=ids, position_ids=positions.expand_as(ids), **with_cache(Cache(layers=probed)), use_cache=True
    )


class _ProbedLayer(ReadOnlyLayer):
    """A full-attention layer while the probe is read."""

    def __init__(self, cached: ProbedLayer, columns: int):
        super().__init__(cached, columns)
        self._probed = cached

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Attention over cached slots and the probe so far; the layer's policies are shown the queries."""
        view = self._probed.view()
        heads = view.positions.shape[1]
        m = call.query.shape[2]
        asked_at = view.seen[:, None] + torch.arange(m, device=view.seen.device)
        own = asked_at[:, None].expand(-1, heads, -1)
        keys, values = torch.cat((view.keys, call.key), 2), torch.cat((view.values, call.value), 2)
        positions = torch.cat((view.positions, own), 2)
        valid = torch.cat((view.valid, torch.ones_like(own, dtype=torch.bool)), 2)
        outputs = []
        for start in range(0, m, QUERY_BLOCK):
            block = slice(start, start + QUERY_BLOCK)
            mask = visibility_mask(call.query, valid, positions, asked_at[:, block])
            part = replace(call, query=call.query[:, :, block], key=keys, value=values, mask=mask)
            outputs.append(part.run()[0])
        self._probed.observe_probe(call.query)
        return torch.cat(outputs, 1), None
