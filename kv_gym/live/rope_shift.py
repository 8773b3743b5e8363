"""Positions inside the cache: kept keys are turned so that they lie next to one another, up to the newest token.

Source: StreamingLLM, arXiv 2309.17453 (ICLR 2024), section 3, which caches keys before the rotary embedding and turns
them by their place in the cache at every step. Here they are cached as the model made them, and turned by the
difference whenever attention reads them: rotations add up, and attention sees differences of positions alone, so that
counting back from the newest token's true position gives the same weights as counting up from zero. Nothing is rounded
twice.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kv_gym.errors import UserError
from kv_gym.live.ragged import RaggedSlots
from kv_gym.live.slots import EqualSlots
from kv_gym.models.attention import attention_of

POSITIONS = ("original", "cache")
_FIXED = ("default", "linear", "llama3", "yarn")  # angles that depend on the position alone, in proportion


class Turn:
    """Turns rotated keys further, by a model's own rotary embedding.

    Args:
        model: whose keys they are.

    Raises:
        UserError: a model without rotary embedding, or one whose angles change with the length.
    """

    def __init__(self, model):
        kind, found = type(model).__name__, next(iter(attention_of(model).values()))
        self._rotary: nn.Module | None = getattr(model.base_model, "rotary_emb", None)
        self._apply = getattr(sys.modules[type(found).__module__], "apply_rotary_pos_emb", None)
        if self._rotary is None or self._apply is None:
            raise UserError(
                f"{kind} has no rotary embedding that keys could be turned by, which positions='cache' needs: use "
                "positions='original'"
            )
        types = getattr(self._rotary, "rope_type", "default")
        for name in types.values() if isinstance(types, dict) else [types]:
            if name not in _FIXED:
                raise UserError(
                    f"{kind} has rotary angles of type {name!r}, which do not add up over positions: use "
                    "positions='original'"
                )
        wanted = inspect.signature(self._rotary.forward).parameters
        self._more = {"layer_type": "full_attention"} if "layer_type" in wanted else {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Turn) and self._rotary is other._rotary

    def __hash__(self) -> int:
        return hash(self._rotary)

    def keys(self, keys: Tensor, by: Tensor) -> Tensor:
        """Keys `[batch, kv_heads, n, d]` as they would be `by [batch, kv_heads, n]` int64 positions later."""
        exact = torch.promote_types(keys.dtype, torch.float32)
        flat = keys.to(exact).flatten(0, 1)[:, None]
        assert self._rotary is not None and self._apply is not None
        cos, sin = self._rotary(flat, by.flatten(0, 1), **self._more)
        scale = self._rotary(flat, torch.zeros_like(by.flatten(0, 1)[:1, :1]), **self._more)[0]  # what a cosine of 1 is
        turned = self._apply(flat[:, :0], flat, cos / scale, sin / scale)[1]
        return turned[:, 0].unflatten(0, keys.shape[:2]).to(keys.dtype)

    def slots(self, slots: EqualSlots | RaggedSlots, rows: Sequence[int]) -> EqualSlots | RaggedSlots:
        """Keys and values as attention is to read them, after `rows` tokens of each row; the slots stay as they are."""
        if isinstance(slots, EqualSlots):
            if set(rows) == {slots.length}:  # nothing went
                return slots
            turned = EqualSlots()
            turned.restore({"keys": self.read(slots, rows), "values": slots["values"]}, slots.length, False)
            return turned
        some = {name: slots.buffers[name] for name in ("keys", "values")}
        other = RaggedSlots(some | {"keys": some["keys"].clone()}, slots.lengths, slots.capacities)
        other.write("keys", self.read(slots, rows))
        return other

    def read(self, slots: EqualSlots | RaggedSlots, rows: Sequence[int]) -> Tensor:
        """The turned keys `[batch, kv_heads, longest, d]`."""
        filled, valid = slots.padded(("keys", "positions"))
        positions = filled["positions"]
        last = torch.iinfo(torch.int64).max
        place = positions.masked_fill(~valid, last).argsort(-1).argsort(-1)
        seen = torch.tensor(rows, device=positions.device)[:, None, None]
        target = seen - valid.sum(-1, keepdim=True) + place
        return self.keys(filled["keys"], (target - positions).masked_fill(~valid, 0))


def turn_for(model, positions: str) -> Turn | None:
    """What a cache with these `positions` turns keys by, or None.

    Raises:
        UserError: an unknown name, or a model that cannot be served so.
    """
    if positions not in POSITIONS:
        raise UserError(f"positions={positions!r} is unknown; expected 'original' or 'cache'")
    return Turn(model) if positions == "cache" else None
