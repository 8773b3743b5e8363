"""The attention function that shows one layer's queries, keys and weights to a recorder or a live cache.

transformers applies the rotary embedding, hands keys and values to the cache (`update`) and then calls the
registered attention function with the final query. A layer that wants to see that call leaves itself here in
`update` (:func:`hand_over`); the next call on the same thread takes it and lets it :meth:`~Watcher.attend`.
Without a watcher the function does what the model's own implementation would do.

Two hooks on the decoder tell a cache that cares about a forward that begins (``before_forward(arguments)``, which
may refuse it), one that ended (``after_forward()``) and one that failed (``forward_failed()``).
"""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from kv_gym.errors import UserError

PREFIX = "kv_gym_"
SERVED = ("sdpa", "eager")

_pending = threading.local()
_switched: weakref.WeakKeyDictionary[nn.Module, _Switch] = weakref.WeakKeyDictionary()

# arguments of attention functions that change the softmax in ways that a CacheView cannot tell a policy
ALTERING = ("softcap", "s_aux", "position_bias")


@dataclass
class AttentionCall:
    """One layer's attention as transformers asked for it.

    Attributes:
        module: the attention module (`layer_idx`, `num_key_value_groups`, `config`).
        query: `[B, Hq, m, d]`, after rotary embedding and query norms.
        key, value: `[B, H, n, d]`, what the cache's `update` returned.
        mask: additive or boolean mask `[B, 1, m, n]`, or None.
        scaling: factor on the products.
        plain: the model's own implementation; same arguments and results as a registered attention function.
        rest: the other arguments, passed on as they are.
        implementation: name of the model's own implementation, one of `SERVED`.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    plain: Callable
    rest: dict[str, Any] = field(default_factory=dict)
    implementation: str = "sdpa"

    def run(self) -> tuple[Tensor, Tensor | None]:
        """Output `[B, m, Hq, d]` and weights (or None) of the model's own implementation."""
        return self.plain(self.module, self.query, self.key, self.value, self.mask, scaling=self.scaling, **self.rest)


class Watcher(Protocol):
    """Whoever wants to see a layer's attention: a cache layer, live or recording."""

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Take part in the call and return its output; ``call.run()`` is the ordinary result."""


def hand_over(watcher: Watcher) -> None:
    """Let `watcher` see the attention call that follows on this thread.

    Raises:
        UserError: nobody took the watcher before, so the model is not the one that was attached.
    """
    if _take() is not None:
        raise UserError(
            "the cache was given keys and values by a model that it does not watch: make a cache for that model"
        )
    _pending.watcher = watcher


def _take() -> Watcher | None:
    """The watcher that waits on this thread, which then waits no longer."""
    watcher = getattr(_pending, "watcher", None)
    _pending.watcher = None
    return watcher


def _through(plain_name: str) -> Callable:
    def attention(module, query, key, value, attention_mask=None, dropout=0.0, scaling=None, **rest):
        plain = _plain(plain_name, module)
        rest["dropout"] = dropout
        watcher = _take()
        if watcher is None:
            return plain(module, query, key, value, attention_mask, scaling=scaling, **rest)
        for name in ALTERING:
            if rest.get(name) is not None:
                raise UserError(
                    f"{type(module).__name__} changes its attention by {name!r}, which policies do not see yet: "
                    "use a model with plain softmax attention"
                )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return watcher.attend(AttentionCall(module, query, key, value, attention_mask, scale, plain, rest, plain_name))

    return attention


def _plain(name: str, module: nn.Module) -> Callable:
    if name == "eager":  # every model family brings its own
        return sys.modules[type(module).__module__].eager_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[name]


def attach(model) -> None:
    """Switch a model to the watched attention function; counted, undone by as many :func:`detach`.

    Raises:
        UserError: the model does not run on the attention interface, or with an implementation not served here.
    """
    if model in _switched:
        _switched[model].count += 1
        return
    original = model.config.get_text_config()._attn_implementation
    refuse_unserved(model)
    if original not in SERVED:
        raise UserError(
            f"the model runs attention implementation {original!r}, and kv_gym watches {' or '.join(SERVED)}: "
            'load it with attn_implementation="sdpa"'
        )
    _register()
    model.set_attn_implementation(PREFIX + original)
    _switched[model] = _Switch(model, original)


def detach(model) -> None:
    """Undo one :func:`attach`; the last one restores the model's own attention."""
    if model not in _switched:
        return
    _switched[model].count -= 1
    if _switched[model].count == 0:
        switch = _switched.pop(model)
        model.set_attn_implementation(switch.original)
        switch.remove_hooks()
        _take()


class _Switch:
    """A model's switched attention: how many asked for it, what to go back to, and the hooks on its decoder."""

    def __init__(self, model, original: str):
        self.count, self.original = 1, original
        self._failing = False
        decoder = model.base_model
        self._begin = decoder.register_forward_pre_hook(self._before, with_kwargs=True)
        self._end = decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True)

    def remove_hooks(self) -> None:
        self._begin.remove()
        if not self._failing:  # torch iterates over these hooks right now: the next forward removes this one
            self._end.remove()

    def _before(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        _take()  # left by a forward that failed between a cache's update and its attention
        arguments = _arguments(decoder, args, kwargs)
        check = getattr(arguments.get("past_key_values"), "before_forward", None)
        if check is not None:
            check(arguments)

    def _after(self, decoder: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        cache = _arguments(decoder, args, kwargs).get("past_key_values")
        if output is not None:
            if self.count == 0:
                self._end.remove()
            elif (tell := getattr(cache, "after_forward", None)) is not None:
                tell()
        elif self.count and (tell := getattr(cache, "forward_failed", None)) is not None:
            self._failing = True  # always_call: the forward raised
            try:
                tell()
            finally:
                self._failing = False


def _arguments(decoder: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    return {**dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False)), **kwargs}


def attention_of(model) -> dict[int, nn.Module]:
    """Layer index -> attention module."""
    return {
        module.layer_idx: module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and _projection(module) is not None
    }


def _projection(module: nn.Module) -> nn.Module | None:
    return next((found for name in ("o_proj", "dense") if (found := getattr(module, name, None)) is not None), None)


def output_projection(module: nn.Module, query_heads: int, d: int) -> Tensor:
    """What each query head's output is multiplied by, `[Hq, d, D]`: slices of the attention's output projection.

    Args:
        module: the attention module.
        query_heads, d: sizes of the query; values must be as wide as keys.

    Raises:
        UserError: no linear output projection is where decoders have it.
    """
    weight = getattr(_projection(module), "weight", None)
    if weight is None or weight.dim() != 2 or weight.shape[1] != query_heads * d:
        raise UserError(
            f"{type(module).__name__} has no output projection that can be split by heads: use a policy that needs none"
        )
    return weight.detach().T.unflatten(0, (query_heads, d))


def refuse_unserved(model) -> None:
    """Raise a UserError for a model whose layers do not cache plain keys and values (see `full_layers`)."""
    config = model.config.get_text_config()
    kind = type(model).__name__
    if getattr(config, "kv_lora_rank", None):
        raise UserError(f"{kind} uses latent attention: it caches no keys and values per head, so it cannot be served")
    if not getattr(model, "_supports_attention_backend", False) or getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{kind} is no decoder on transformers' attention interface, so its queries cannot be seen: "
            "use a model such as Llama, Qwen, Mistral, Phi-3 or GPT-NeoX"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise UserError(f"{kind} has layers that share keys and values with earlier ones, which is not served yet")
    full_layers(config)


def full_layers(config) -> list[int]:
    """Indices of the layers with full attention; sliding-window layers are left alone.

    Raises:
        UserError: a layer with linear attention or a state instead of keys and values.
    """
    types = getattr(config, "layer_types", None)
    if types is None:
        if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
            types = ["sliding_attention"] * config.num_hidden_layers
        else:
            types = ["full_attention"] * config.num_hidden_layers
    unknown = sorted(set(types) - {"full_attention", "sliding_attention", "chunked_attention"})
    if unknown:
        raise UserError(f"the model has layers of type {unknown[0]!r}, which hold no keys and values per token")
    full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    if not full:
        raise UserError("the model has no full-attention layer, so there is nothing to evict")
    return full


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    for name in SERVED:
        if PREFIX + name not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
            AttentionInterface.register(PREFIX + name, _through(name))
            # without a mask function of the same name transformers would pass no mask at all
            AttentionMaskInterface.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
