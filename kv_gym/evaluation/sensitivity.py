"""How much a model's layers depend on distant tokens: what EpiCache's layer rule divides the budget by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kv_gym.errors import UserError
from kv_gym.evaluation.rows import write_rows
from kv_gym.models.attention import full_layers
from kv_gym.models.cache_name import output_cache


@torch.no_grad()
def layer_similarity(
    model, contexts: Iterable[Sequence[int]], block: int = 128, out: str | Path | None = None
) -> list[float]:
    """Mean cosine of each layer's keys under full attention with those of tokens that see their own block alone.

    Paper: EpiCache, arXiv 2509.17396, section 3.3; its code measures it on long novels. Low means that the layer
    needs what is far away.

    Args:
        model: a transformers decoder.
        contexts: token ids of texts, each longer than a block; a last part that fills no block is left out.
        block: tokens that see one another.
        out: file to write, for ``allocation="epicache:<file>"``.

    Returns:
        One number from -1 to 1 per layer with full attention.

    Raises:
        UserError: no context, or one that is not longer than a block.
    """
    layers = full_layers(model.config.get_text_config())
    similarity, compared = torch.zeros(len(layers), dtype=torch.float64), 0
    for context in contexts:
        blocks = len(context) // block
        if blocks < 2:
            raise UserError(f"a context has {len(context)} tokens; expected at least two blocks of {block}")
        ids = torch.tensor(context[: blocks * block], device=model.device)
        positions = torch.arange(len(ids), device=model.device)
        full_context = _keys(model, ids[None], positions[None], layers)
        # a row per block: attention inside of it, at the positions that it has in the text
        blockwise = _keys(model, ids.view(blocks, block), positions.view(blocks, block), layers)
        for number, (full, alone) in enumerate(zip(full_context, blockwise, strict=True)):
            alone = alone.transpose(0, 1).flatten(1, 2)  # [kv_heads, tokens, d]
            similarity[number] += float(torch.cosine_similarity(full[0].double(), alone.double(), dim=-1).sum())
        compared += full_context[0][0, ..., 0].numel()
    if not compared:
        raise UserError("there is no context to measure layers on; give at least one")
    result = (similarity / compared).tolist()
    if out is not None:
        write_rows(out, [result])
    return result


def _keys(model, ids: Tensor, positions: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """Keys `[batch, kv_heads, tokens, d]` of each of `layers`."""
    cache = output_cache(model(input_ids=ids, position_ids=positions, use_cache=True, logits_to_keep=1))
    return [cache.layers[layer].keys for layer in layers]
