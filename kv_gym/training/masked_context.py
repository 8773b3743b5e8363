"""Running a model over continuations of recorded contexts whose slots can be switched off, with gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from kv_gym.errors import UserError
from kv_gym.models.attention import AttentionCall, attach, detach, full_layers, hand_over


@dataclass(frozen=True)
class Recorded:
    """Contexts of one model, padded to the longest; C contexts, L layers, H KV heads, n slots, d head dim.

    Attributes:
        keys, values: `[C, L, H, n, d]`.
        lengths: `[C]` int64 tokens of each context; what lies beyond is padding.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor


class GatedLayer(CacheLayerMixin):
    """One layer: the contexts' slots, each times its gate, and the continuations' own tokens."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, keys: Tensor, values: Tensor, gates: Tensor, length: int):
        """`keys`, `values` `[C, H, n, d]`, `gates` `[C, H, n]`, and the tokens that count as seen."""
        self.context, self.gates, self.length = (keys, values), gates, length
        self.keys = self.values = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Nothing is allocated."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """The continuations' own keys and values, as they are."""
        hand_over(self)
        return key_states, value_states

    def attend(self, call: AttentionCall) -> tuple[Tensor, None]:
        """Attention over gated slots and all earlier tokens of the continuation.

        Every weight counts as often as its slot's gate says before the weights are divided by their sum: a gate of 0
        is an evicted slot, and its gradient says what the slot would add.
        """
        exact = torch.promote_types(call.query.dtype, torch.float32)
        keys, values, gates = (tensor.to(exact) for tensor in (*self.context, self.gates))
        contexts, heads = keys.shape[:2]
        rows, query_heads, m, d = call.query.shape
        group = query_heads // heads
        asked = call.query.to(exact) * call.scaling
        # all continuations of a context ask its slots at once: [C, H, rows of C * group * m, d]
        together = asked.reshape(contexts, -1, heads, group, m, d).transpose(1, 2).flatten(2, 4)
        past = together @ keys.transpose(-1, -2)
        own = torch.einsum("rhgid,rhjd->rhgij", asked.view(rows, heads, group, m, d), call.key.to(exact))
        later = torch.ones(m, m, dtype=torch.bool, device=own.device).triu(1)
        own = own.masked_fill(later, float("-inf"))
        highest = torch.maximum(
            _by_row(past.detach().amax(-1), contexts, rows, group, m), own.detach().amax(-1)
        )  # [R, H, G, m]
        past = past.sub_(_by_context(highest, contexts)[..., None]).exp_()
        # gates go with the values, not with the weights: those are by far the largest arrays here
        gated = past @ torch.cat((values * gates[..., None], gates[..., None]), -1)
        gated = _by_row(gated, contexts, rows, group, m)
        own = (own - highest[..., None]).exp()
        mine = torch.einsum("rhgij,rhjd->rhgid", own, call.value.to(exact))
        attended = (gated[..., :-1] + mine) / (gated[..., -1:] + own.sum(-1, keepdim=True))
        return attended.flatten(1, 2).transpose(1, 2).to(call.query.dtype), None

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """The new tokens alone; transformers' mask is not used."""
        return (query_length if isinstance(query_length, int) else query_length.shape[0]), 0

    def get_seq_length(self) -> int:
        """Tokens that count as seen."""
        return self.length

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length


def _by_row(tensor: Tensor, contexts: int, rows: int, group: int, m: int) -> Tensor:
    """`[C, H, rows of C * G * m, ...]`, the queries of a context together, to `[R, H, G, m, ...]`."""
    heads = tensor.shape[1]
    apart = tensor.view(contexts, heads, rows // contexts, group, m, *tensor.shape[3:])
    return apart.transpose(1, 2).flatten(0, 1)


def _by_context(tensor: Tensor, contexts: int) -> Tensor:
    """The way back of :func:`_by_row`, for `[R, H, G, m]`."""
    return tensor.unflatten(0, (contexts, -1)).transpose(1, 2).flatten(2, 4)


class GatedCache(Cache):
    """Contexts whose slots have gates; every forward of it runs one batch of continuations."""

    def __init__(self, contexts: Recorded, gates: Tensor):
        """`gates` is `[C, L, H, n]`, 0 where a slot is evicted, padding included."""
        longest = int(contexts.lengths.max())
        super().__init__(
            layers=[
                GatedLayer(contexts.keys[:, layer], contexts.values[:, layer], gates[:, layer], longest)
                for layer in range(gates.shape[1])
            ]
        )


@contextmanager
def frozen(model) -> Iterator[None]:
    """The model watched by gated caches, its weights held still; all is undone at the end.

    Raises:
        UserError: some layers of the model do not cache all tokens, so a recorded context does not hold what a
            continuation reads.
    """
    config = model.config.get_text_config()
    if len(full_layers(config)) != config.num_hidden_layers:
        raise UserError(
            f"{type(model).__name__} has layers without full attention, whose caches traces do not hold: train an "
            "agent that needs no model, such as joint"
        )
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    training = model.training
    attach(model)
    try:
        for weight in weights:
            weight.requires_grad_(False)
        model.eval()
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
        model.train(training)
        detach(model)


def continuation_logits(model, contexts: Recorded, gates: Tensor, tokens: Tensor) -> Tensor:
    """Logits `[C, Q, m, vocabulary]` of Q continuations of each context, under :func:`frozen`.

    Args:
        model: whose contexts they are.
        contexts: C recorded contexts.
        gates: `[C, L, H, n]`.
        tokens: `[C, Q, m]` int64 continuations; padding at the end sees everything and is seen by nothing before it.
    """
    count, several, m = tokens.shape
    starts = contexts.lengths.to(tokens.device).repeat_interleave(several)[:, None]
    out = model(
        input_ids=tokens.flatten(0, 1),
        position_ids=starts + torch.arange(m, device=tokens.device),
        past_key_values=GatedCache(contexts, gates),
        use_cache=True,
    )
    return out.logits.unflatten(0, (count, several))
