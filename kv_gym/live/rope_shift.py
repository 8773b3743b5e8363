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
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from kv_gym.devices import number_tensor
from kv_gym.errors import UserError
from kv_gym.live.slots import EqualSlots, Slots
from kv_gym.models.attention import attention_modules, full_layers
from kv_gym.models.cache_name import with_cache
from kv_gym.models.rotary import before_rotation

# angles that depend on the position alone, in proportion
_LINEAR_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_TRIED_BY = 31  # positions
_verified: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_matched: weakref.WeakKeyDictionary[nn.Module, list[Tensor]] = weakref.WeakKeyDictionary()  # frequencies


def refuse_other_rotation(model, frequencies: Tensor, policy: str) -> None:
    """Raise a UserError where turning keys back by these frequencies does not give the model's keys at position 0.

    Args:
        model: a transformers decoder.
        frequencies: `[pairs]`, see :func:`kv_gym.models.rotary.rotary_frequencies`.
        policy: whose they are.
    """
    device = model.get_input_embeddings().weight.device
    known = _matched.setdefault(model, [])
    if device.type == "meta" or any(torch.equal(each, frequencies) for each in known):
        return
    instead = "train one with the input 'key' instead of 'pre_rope_key'"
    shift = RopeShift(model, (f"policy {policy!r}", instead))
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = torch.linspace(-1, 1, 2 * size, device=device).view(1, 1, 2, size)
    positions = torch.tensor([1, _TRIED_BY], device=device).view(1, 1, 2)
    back = before_rotation(shift.rotate(keys, positions), positions, frequencies.to(device))
    if not torch.allclose(back, keys, atol=1e-3):
        raise UserError(
            f"policy {policy!r} turns keys back by other angles than {type(model).__name__} rotates them, or pairs "
            f"their numbers otherwise: {instead}"
        )
    known.append(frequencies)


class RopeShift:
    """Rotates cached keys to other positions, by a model's own rotary embedding.

    The first time that it is made for a model, the model reads a few single tokens at two positions each, and every
    layer's keys are compared.

    Args:
        model: whose keys they are.
        needed_for: what needs it, and what to do without, for errors.

    Raises:
        UserError: a model without rotary embedding, one whose angles change with the length, or one with a layer whose
            keys are not rotated so.
    """

    def __init__(self, model, needed_for: tuple[str, str] = ("positions='cache'", "use positions='original'")):
        self._needed_for, self._instead = needed_for
        kind, attention = type(model).__name__, next(iter(attention_modules(model).values()))
        self._rotary: nn.Module | None = getattr(model.base_model, "rotary_emb", None)
        self._apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        if self._rotary is None or self._apply is None:
            raise UserError(
                f"{kind} has no rotary embedding by which keys could be rotated, which {self._needed_for} needs: "
                f"{self._instead}"
            )
        types = getattr(self._rotary, "rope_type", "default")
        for name in types.values() if isinstance(types, dict) else [types]:
            if name not in _LINEAR_ROPE_TYPES:
                raise UserError(
                    f"{kind} has rotary angles of type {name!r}, which do not add up over positions: {self._instead}"
                )
        parameters = inspect.signature(self._rotary.forward).parameters
        self._rotary_kwargs = {"layer_type": "full_attention"} if "layer_type" in parameters else {}
        if model not in _verified:
            self._verify(model)
            _verified.add(model)

    @torch.no_grad()
    def _verify(self, model) -> None:
        """Refuse a model that has a layer whose keys at one position are not those of another, rotated.

        A token alone attends to itself, so that hidden states depend on no position.
        """
        config = model.config.get_text_config()
        device = model.get_input_embeddings().weight.device
        if device.type == "meta":
            return  # nothing to compare
        ids = torch.linspace(1, config.vocab_size - 1, 4, device=device).long().repeat(2)[:, None]
        positions = torch.zeros_like(ids)
        positions[4:] = _TRIED_BY
        cache = DynamicCache(config=config)
        model.base_model(input_ids=ids, position_ids=positions, **with_cache(cache), use_cache=True)
        for index in full_layers(config):
            keys = getattr(cache.layers[index], "keys", None)
            assert isinstance(keys, Tensor)
            early, late = keys.chunk(2)
            by = torch.full(early.shape[:3], _TRIED_BY, device=early.device)
            tolerance = max(8 * torch.finfo(early.dtype).eps, 1e-4)
            try:
                error = (self.rotate(early, by) - late).norm() / late.norm().clamp(min=1e-12)
            except RuntimeError:  # shapes that do not fit
                error = torch.tensor(torch.inf)
            if not bool(error <= tolerance):
                raise UserError(
                    f"layer {index} of {type(model).__name__} does not rotate its keys by the model's rotary embedding "
                    f"(some layers have no positions at all): {self._instead}"
                )

    def rotate(self, keys: Tensor, by: Tensor) -> Tensor:
        """Keys `[batch, kv_heads, n, d]` as they would be `by [batch, kv_heads, n]` int64 positions later."""
        exact = torch.promote_types(keys.dtype, torch.float32)
        flat = keys.to(exact).flatten(0, 1)[:, None]
        assert self._rotary is not None and self._apply is not None
        cos, sin = self._rotary(flat, by.flatten(0, 1), **self._rotary_kwargs)
        # some models scale cosines and sines: the cosine of position 0 is that factor
        scale = self._rotary(flat, torch.zeros_like(by.flatten(0, 1)[:1, :1]), **self._rotary_kwargs)[0]
        turning, rest = flat.tensor_split([cos.shape[-1]], -1)  # some models rotate a part of the dimensions
        rotated = self._apply(turning[:, :0], turning, cos / scale, sin / scale)[1]
        return torch.cat((rotated, rest), -1)[:, 0].unflatten(0, keys.shape[:2]).to(keys.dtype)

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
