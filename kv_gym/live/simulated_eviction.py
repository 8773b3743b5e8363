"""A plain forward over a text, and beside it the decisions that a bounded cache would make of it, layer by layer.

Every layer attends to all tokens, so queries, keys and outputs are those of the full cache; the policy meets them
block by block as it would in an :class:`~kv_gym.live.EvictingCache` (teacher forcing). What is shown of a layer is
gone when the next one runs: nothing is stored, however long the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from kv_gym.errors import UserError
from kv_gym.live.config import CacheConfig
from kv_gym.live.layer_state import LayerState
from kv_gym.models.attention import AttentionCall, attach, detach, full_layers
from kv_gym.models.cache_name import with_cache
from kv_gym.models.storeless_layer import StorelessLayer


@dataclass(frozen=True)
class SimulatedLayer:
    """One layer of the forward.

    Attributes:
        ordinal: which of the full-attention layers it is, from 0.
        module: its attention module.
        query: `[batch, query_heads, n, d]`, after the rotary embedding.
        keys, values: `[batch, kv_heads, n, d]`.
        output: `[batch, n, query_heads, d]`, the attention of the full cache.
        scaling: factor on the products.
        held: `[blocks, batch, kv_heads, n]` bool, the tokens that the bounded cache holds before each block.
    """

    ordinal: int
    module: nn.Module
    query: Tensor
    keys: Tensor
    values: Tensor
    output: Tensor
    scaling: float
    held: Tensor


def refuse_unfit(config: CacheConfig) -> None:
    """Raise a UserError for settings under which a layer cannot decide alone, right when it is read."""
    if config.block_size is None or config.needs_hidden:
        raise UserError(
            f"policy {config.policy.name!r} with allocation {config.allocation.name!r} and trigger "
            f"{config.trigger.name!r} does not cut layer by layer: choose a policy of keys, values or attention, such "
            "as h2o, with allocation 'uniform' and a trigger 'block:<tokens>'"
        )


@torch.no_grad()
def simulate_evictions(model, ids: Tensor, config: CacheConfig, show: Callable[[SimulatedLayer], None]) -> None:
    """Run the model over a batch of texts and show every full-attention layer of it.

    Args:
        model: the decoder of `config`.
        ids: `[batch, n]` int64, texts without padding.
        config: the bounded cache, with a trigger ``block:<tokens>``.
        show: called with each layer, in order.

    Raises:
        UserError: see :func:`refuse_unfit`.
    """
    refuse_unfit(config)
    text_config = model.config.get_text_config()
    layers: list = list(DynamicCache(config=text_config).layers)
    for ordinal, index in enumerate(full_layers(text_config)):
        layers[index] = _SimulatingLayer(LayerState(index, ordinal, config), show)
    attach(model)
    try:
        model.base_model(input_ids=ids, **with_cache(Cache(layers=layers)), use_cache=True)
    finally:
        detach(model)


class _SimulatingLayer(StorelessLayer):
    """Passes keys and values on, and decides beside the model's own attention."""

    def __init__(self, state: LayerState, show: Callable[[SimulatedLayer], None]):
        self.state, self.show = state, show
        self.keys = self.values = None
        self.is_initialized = True

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """The attention of the full cache; what a bounded one would hold is shown with it."""
        result = call.run()
        state, block = self.state, self.state.config.block_size
        assert block is not None
        state.scaling = call.scaling
        state.use_output_projection(call.module, call.query.shape[1], call.query.shape[3])
        held = []
        for first in range(0, call.query.shape[2], block):
            part = slice(first, first + block)
            held.append(self._held(call.key))
            state.append(call.key[:, :, part], call.value[:, :, part], None)
            state.observe(call.query[:, :, part], None)
            if any(rows_to_evict := state.rows_to_evict()):
                state.evict(rows_to_evict)
        seen = call.query, call.key, call.value, result[0], call.scaling, torch.stack(held)
        self.show(SimulatedLayer(state.ordinal, call.module, *seen))
        return result

    def _held(self, keys: Tensor) -> Tensor:
        """Which of the text's tokens are held now, `[batch, kv_heads, n]` bool."""
        batch, heads, n, _ = keys.shape
        held = torch.zeros(batch, heads, n + 1, dtype=torch.bool, device=keys.device)
        if self.state.tokens_seen:
            filled, real = self.state.slots.padded(("positions",))
            held.scatter_(2, filled["positions"].masked_fill(~real, n), True)  # padding to a place of its own
        return held[..., :n]

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """The new tokens alone."""
        return (query_length if isinstance(query_length, int) else query_length.shape[0]), 0

    def get_seq_length(self) -> int:
        """Tokens before the forward."""
        return 0
