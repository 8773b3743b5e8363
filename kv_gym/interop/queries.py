"""The queries of a prompt, computed again from what an attention module was given.

A press is called after the attention, with the module and its input but without its queries. kvpress computes them
for SnapKV by the classes it knows, divides by the square root of the head dimension whatever the model's scaling is,
and takes the rotary angles of the forward under way even for older tokens. Here the family's own rotary function is
called with the angles of just these tokens, and a family that nobody checked is refused.
"""

from __future__ import annotations

import sys

from torch import Tensor, nn

from kv_gym.errors import UserError

SERVED = ("gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe")
"""Model types whose queries the tests compare with those that the attention function really got."""


def prompt_queries(
    module: nn.Module, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], last: int
) -> Tensor:
    """Queries after query norms and rotary embedding, `[batch, query_heads, last, d]`.

    Args:
        module: an attention module of transformers.
        hidden_states: `[batch, tokens, D]`, what the module's forward got (after the input norm).
        position_embeddings: cosines and sines `[batch or 1, tokens, rotary_d]` of these tokens.
        last: how many of the last queries.

    Raises:
        UserError: a model family whose queries are not known here, or angles of other tokens.
    """
    family = module.config.model_type  # type: ignore[union-attr]
    if family not in SERVED:
        raise UserError(
            f"how {type(module).__name__} makes its queries is not known here (served: {', '.join(SERVED)}): "
            "choose a policy that needs none, such as knorm or keydiff"
        )
    cos, sin = position_embeddings
    if cos.shape[1] != hidden_states.shape[1]:
        raise UserError(
            f"the press was given {hidden_states.shape[1]} hidden states and rotary angles of {cos.shape[1]} tokens: "
            "policies that need queries score whole prompts only; kv_gym.EvictingCache evicts while decoding"
        )
    begin = max(0, hidden_states.shape[1] - last)
    states = _unrotated(module, hidden_states[:, begin:])
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
    return rotate(states, states, cos[:, begin:], sin[:, begin:])[0]


def _unrotated(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """`[batch, query_heads, m, d]` before the rotary embedding."""
    head_dim: int = module.head_dim  # type: ignore[assignment]
    width = module.config.num_attention_heads * head_dim  # type: ignore[union-attr, operator]
    if hasattr(module, "qkv_proj"):  # fused, queries first
        states = module.qkv_proj(hidden_states)[..., :width]  # type: ignore[operator]
    else:
        states = module.q_proj(hidden_states)  # type: ignore[operator]
    norm = getattr(module, "q_norm", None)
    whole = norm is not None and norm.weight.shape[-1] == width
    if norm is not None and whole:  # one norm over all heads, as in OLMo 2
        states = norm(states)
    states = states.unflatten(-1, (-1, head_dim))
    if norm is not None and not whole:  # one per head, as in Qwen 3
        states = norm(states)
    return states.transpose(1, 2)
