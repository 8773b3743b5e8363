"""The attention function that shows one layer's queries, keys and weights to a recorder or a live cache.

transformers applies the rotary embedding, hands keys and values to the cache (`update`) and then calls the
registered attention function with the final query. A cache layer that wants to see that call registers itself in
`update` (:func:`observe_next_attention`); the next call on the same thread runs its :meth:`~AttentionObserver.attend`.
Without an observer the function does what the model's own implementation would do.

The decoder's ``forward`` is wrapped to tell a cache that has these methods when a forward begins
(``before_forward(arguments)``, which may refuse it), ends (``after_forward()``) or fails (``forward_failed()``). It is
no torch hook: torch goes through a module's hooks while a failed forward is unwound, and to remove one then, there or
in another thread, raises an error of its own.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch._compile import _disable_dynamo  # as torch.compiler.disable, but imports no compiler before the first call

from kv_gym.errors import UserError
from kv_gym.models.cache_name import cache_argument
from kv_gym.models.wrapped_model import transformers_model

PREFIX = "kv_gym_"
SUPPORTED = ("sdpa", "eager")

_pending = threading.local()
_attached: weakref.WeakKeyDictionary[nn.Module, _AttachedModel] = weakref.WeakKeyDictionary()
_attaching = threading.RLock()  # the garbage collector may detach a cache while this thread attaches another

# arguments of attention functions that change the softmax in ways that a CacheView cannot tell a policy
SOFTMAX_CHANGES = ("softcap", "s_aux", "position_bias")


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
        kwargs: the other arguments, passed on as they are.
        implementation: name of the model's own implementation, one of `SUPPORTED`.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    plain: Callable
    kwargs: dict[str, Any] = field(default_factory=dict)
    implementation: str = "sdpa"

    def run(self) -> tuple[Tensor, Tensor | None]:
        """Output `[B, m, Hq, d]` and weights (or None) of the model's own implementation."""
        return self.plain(self.module, self.query, self.key, self.value, self.mask, scaling=self.scaling, **self.kwargs)


class AttentionObserver(Protocol):
    """A cache layer, live or recording, that takes part in its layer's attention."""

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Take part in the call and return its output; ``call.run()`` is the ordinary result."""


def observe_next_attention(observer: AttentionObserver) -> None:
    """Let `observer` take part in the attention call that follows on this thread.

    Raises:
        UserError: the previous observer was never called, so the model is not the one that was attached.
    """
    if _pop_observer() is not None:
        raise UserError(
            "the cache was given keys and values by a model that it is not attached to: make a cache for that model"
        )
    _pending.observer = observer


def _pop_observer() -> AttentionObserver | None:
    """Remove and return the observer that waits on this thread, if any."""
    observer = getattr(_pending, "observer", None)
    _pending.observer = None
    return observer


def _observable(plain_name: str) -> Callable:
    @_disable_dynamo  # torch.compile compiles the model around a cache, and not what the cache does
    def attention(module, query, key, value, attention_mask=None, dropout=0.0, scaling=None, **kwargs):
        plain = _model_attention(plain_name, module)
        kwargs["dropout"] = dropout
        observer = _pop_observer()
        if observer is None:
            return plain(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        for name in SOFTMAX_CHANGES:
            if kwargs.get(name) is not None:
                raise UserError(
                    f"{type(module).__name__} changes its attention by {name!r}, which policies cannot see: "
                    "use a model with plain softmax attention"
                )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return observer.attend(
            AttentionCall(module, query, key, value, attention_mask, scale, plain, kwargs, plain_name)
        )

    return attention


def _model_attention(name: str, module: nn.Module) -> Callable:
    if name == "eager":  # every model family brings its own
        return sys.modules[type(module).__module__].eager_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[name]


def attach(model) -> None:
    """Switch a model to the observable attention function; counted, undone by as many :func:`detach`.

    Raises:
        UserError: the model does not run on the attention interface, or with an implementation that is not supported.
    """
    model = transformers_model(model)
    with _attaching:
        if model not in _attached:
            refuse_unsupported(model)
            _attached[model] = _AttachedModel()
        _attached[model].add(model)


def detach(model) -> None:
    """Undo one :func:`attach`; the last one restores the model's own attention."""
    model = transformers_model(model)
    with _attaching:
        if model in _attached:
            _attached[model].remove(model)


class _AttachedModel:
    """How many callers attached a model, and what the last of them restores.

    The garbage collector may detach one cache while another is being attached, so a count that has come to zero can
    rise again.
    """

    def __init__(self) -> None:
        self.count = 0
        self._original = ""
        self._forward: _ObservedForward | None = None

    def add(self, model) -> None:
        """Count one caller; the first one switches the model's attention."""
        original = model.config.get_text_config()._attn_implementation
        if not self.count and original not in SUPPORTED:
            raise UserError(
                f"the model runs attention implementation {original!r}, and kv_gym supports {' or '.join(SUPPORTED)}: "
                'load it with attn_implementation="sdpa"'
            )
        self.count += 1
        if self.count == 1:
            _register()
            self._original, self._forward = original, _ObservedForward(model.base_model)
            model.set_attn_implementation(PREFIX + original)

    def remove(self, model) -> None:
        """Forget one caller; the last one restores the model's attention."""
        self.count = max(self.count - 1, 0)
        if self.count == 0 and self._forward is not None:
            model.set_attn_implementation(self._original)
            self._forward.restore()
            self._forward = None
            _pop_observer()


class _ObservedForward:
    """Takes the place of a decoder's ``forward`` and tells the cache in its arguments about it."""

    def __init__(self, decoder: nn.Module):
        functools.update_wrapper(self, decoder.forward)  # first: it copies the attributes of what it wraps
        self._decoder, self._plain = decoder, decoder.forward
        self._own = "forward" in vars(decoder)  # as where accelerate moves the weights
        self._parameters = tuple(inspect.signature(decoder.forward).parameters)
        decoder.forward = self

    def restore(self) -> None:
        """Give the decoder its own back; one that somebody else has wrapped since stays as it is."""
        if vars(self._decoder).get("forward") is not self:
            return
        if self._own:
            self._decoder.forward = self._plain
        else:
            del self._decoder.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        cache = cache_argument(arguments)
        try:
            self._tell(cache, "before_forward", arguments)
            output = self._plain(*args, **kwargs)
        except BaseException:
            self._tell(cache, "forward_failed")
            raise
        self._tell(cache, "after_forward")
        return output

    @_disable_dynamo
    def _tell(self, cache: Any, event: str, *arguments: dict[str, Any]) -> None:
        if event == "before_forward":
            _pop_observer()  # left by a forward that failed between a cache's update and its attention
        if (notify := getattr(cache, event, None)) is not None:
            notify(*arguments)


def attention_modules(model) -> dict[int, nn.Module]:
    """Layer index -> attention module."""
    return {
        module.layer_idx: module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and _projection(module) is not None
    }


def _projection(module: nn.Module) -> nn.Module | None:
    return next((layer for name in ("o_proj", "dense") if (layer := getattr(module, name, None)) is not None), None)


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


def refuse_unsupported(model) -> None:
    """Raise a UserError for a model whose layers do not cache plain keys and values (see `full_layers`)."""
    model = transformers_model(model)
    name = type(model).__name__
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise UserError(f"the model is a {name}; expected a transformers decoder, such as load_model gives")
    config = model.config.get_text_config()
    if getattr(config, "kv_lora_rank", None):
        raise UserError(f"{name} uses latent attention: it caches no keys and values per head, so it is not supported")
    if not getattr(model, "_supports_attention_backend", False) or getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{name} is no decoder on transformers' attention interface, so its queries cannot be seen: "
            "use a model such as Llama, Qwen, Mistral, Phi-3 or GPT-NeoX"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise UserError(f"{name} has layers that share keys and values with earlier ones, which is not supported")
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

    for name in SUPPORTED:
        if PREFIX + name not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
            AttentionInterface.register(PREFIX + name, _observable(name))
            # without a mask function of the same name transformers would pass no mask at all
            AttentionMaskInterface.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
