"""Positions inside the cache: kept keys are rotated so that they lie next to one another, up to the newest token.

Source: StreamingLLM, arXiv 2309.17453 (ICLR 2024), section 3, which caches keys before the rotary embedding and rotates
them by their place in the cache at every step. Here they are cached as the model made them, and rotated by the
difference whenever attention reads them. Rotations add up, and attention sees differences of positions alone, so
counting back from the newest token's true position gives the same weights as counting up from zero, and nothing is
rounded twice.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kv_gym.devices import number_tensor
from kv_gym.errors import UserError
from kv_gym.live.slots import EqualSlots, Slots
from kv_gym.models.attention import attention_modules

# angles that depend on the position alone, in proportion
_LINEAR_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class RopeShift:
    """Rotates cached keys to other positions, by a model's own rotary embedding.

    Args:
        model: whose keys they are.

    Raises:
        UserError: a model without rotary embedding, or one whose angles change with the length.
    """

    def __init__(self, model):
        kind, attention = type(model).__name__, next(iter(attention_modules(model).values()))
        self._rotary: nn.Module | None = getattr(model.base_model, "rotary_emb", None)
        self._apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        if self._rotary is None or self._apply is None:
            raise UserError(
                f"{kind} has no rotary embedding by which keys could be rotated, which positions='cache' needs: use "
                "positions='original'"
            )
        types = getattr(self._rotary, "rope_type", "default")
        for name in types.values() if isinstance(types, dict) else [types]:
            if name not in _LINEAR_ROPE_TYPES:
                raise UserError(
                    f"{kind} has rotary angles of type {name!r}, which do not add up over positions: use "
                    "positions='original'"
                )
        parameters = inspect.signature(self._rotary.forward).parameters
        self._rotary_kwargs = {"layer_type": "full_attention"} if "layer_type" in parameters else {}

    def rotate(self, keys: Tensor, by: Tensor) -> Tensor:
        """Keys `[batch, kv_heads, n, d]` as they would be `by [batch, kv_heads, n]` int64 positions later."""
        exact = torch.promote_types(keys.dtype, torch.float32)
        flat = keys.to(exact).flatten(0, 1)[:, None]
        assert self._rotary is not None and self._apply is not None
        cos, sin = self._rotary(flat, by.flatten(0, 1), **self._rotary_kwargs)
        # some models scale cosines and sines: the cosine of position 0 is that factor
        scale = self._rotary(flat, torch.zeros_like(by.flatten(0, 1)[:1, :1]), **self._rotary_kwargs)[0]
        rotated = self._apply(flat[:, :0], flat, cos / scale, sin / scale)[1]
        return rotated[:, 0].unflatten(0, keys.shape[:2]).to(keys.dtype)

    def shifted_keys(self, slots: Slots, tokens_seen: Sequence[int]) -> Tensor:
        """The keys of `slots` at positions inside the cache, `[batch, kv_heads, longest, d]`.

        Args:
            slots: with keys and positions.
            tokens_seen: per row.
        """
        filled, valid = slots.padded(("keys", "positions"))
        positions = filled["positions"]
        last = torch.iinfo(torch.int64).max
        rank = positions.masked_fill(~valid, last).argsort(-1).argsort(-1)
        seen = number_tensor(tokens_seen, positions.device)[:, None, None]
        target = seen - valid.sum(-1, keepdim=True) + rank
        return self.rotate(filled["keys"], (target - positions).masked_fill(~valid, 0))

    def shifted(self, slots: Slots, tokens_seen: Sequence[int]) -> Slots:
        """Keys and values as attention is to read them; `slots` stay as they are."""
        if isinstance(slots, EqualSlots) and set(tokens_seen) == {slots.length}:  # nothing was evicted
            return slots
        shifted = slots.with_data({"values": slots.data("values")})
        shifted.add("keys", self.shifted_keys(slots, tokens_seen))
        return shifted
