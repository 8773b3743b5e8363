"""Hooks that show a cache the hidden states that each attention layer receives.

transformers hands a layer's keys and values to the cache while its attention module runs. Hooks on these modules, set
by :func:`attach_hidden_state_hooks` and removed by as many :func:`remove_hidden_state_hooks`, keep the module's input
for just that long; the cache asks for it with :func:`current_hidden_states`. No input outlives its module's call.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kv_gym.errors import UserError
from kv_gym.models.attention import attention_modules, full_layers


@dataclass
class _Hooks:
    """The hooks on one model's attention modules, and how many callers asked for them."""

    handles: list[RemovableHandle] = field(default_factory=list)
    count: int = 0


_current = threading.local()  # input: (layer index, hidden states) of the attention module that runs on this thread
_hooks: weakref.WeakKeyDictionary[nn.Module, _Hooks] = weakref.WeakKeyDictionary()
_attaching = threading.RLock()  # the garbage collector may detach a cache while this thread attaches another


def attach_hidden_state_hooks(model) -> None:
    """Keep the input of every full-attention module of `model` while the module runs; counted.

    Raises:
        UserError: no attention module is where decoders have it.
    """
    with _attaching:
        modules = full_attention_modules(model)
        hooks = _hooks.setdefault(model, _Hooks())
        hooks.count += 1
        if hooks.count == 1:
            for module in modules:
                hooks.handles.append(module.register_forward_pre_hook(_keep_input, with_kwargs=True))
                # a failed forward drops it too
                hooks.handles.append(module.register_forward_hook(_drop_input, always_call=True))


def remove_hidden_state_hooks(model) -> None:
    """Undo one :func:`attach_hidden_state_hooks`; the last one removes the hooks."""
    with _attaching:
        hooks = _hooks.get(model)
        if hooks is None or hooks.count == 0:
            return
        hooks.count -= 1
        while hooks.count == 0 and hooks.handles:
            hooks.handles.pop().remove()


def full_attention_modules(model) -> list[nn.Module]:
    """The full-attention modules of a model, in the order of its layers.

    Raises:
        UserError: no attention module is where decoders have it.
    """
    modules = attention_modules(model)
    layers = full_layers(model.config.get_text_config())
    if missing := [i for i in layers if i not in modules]:
        raise UserError(
            f"layer {missing[0]} of {type(model).__name__} has no attention module where decoders have it, so its "
            "hidden states cannot be seen: use a policy that needs none"
        )
    return [modules[i] for i in layers]


def current_hidden_states(layer: int) -> Tensor:
    """The hidden states `[batch, new_tokens, width]` that came in with the keys of a layer.

    To be called while the layer's attention runs.

    Args:
        layer: the layer's index in the model.

    Raises:
        UserError: another layer's attention runs on this thread, or none.
    """
    index, hidden = getattr(_current, "input", None) or (None, None)
    if index != layer or hidden is None:
        raise UserError(
            f"the keys of layer {layer} came without its hidden states: give the cache to the model it was made for"
        )
    return hidden


def _keep_input(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    _current.input = module.layer_idx, hidden.detach()


def _drop_input(module: nn.Module, args: tuple, output: Any) -> None:
    _current.input = None
