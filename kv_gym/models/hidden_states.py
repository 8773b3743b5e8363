"""What attention layers receive, caught on its way in: for recorders, and for caches whose policy reads it.

transformers hands a layer's keys and values to the cache while its attention module runs. Hooks on these modules, set
by :func:`listen` and removed by as many :func:`unlisten`, hold the module's input for just that long; whoever is given
the keys asks for it with :func:`received`. No input outlives its module's call.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kv_gym.errors import UserError
from kv_gym.models.attention import attention_of, full_layers

_present = threading.local()
_heard: weakref.WeakKeyDictionary[nn.Module, _Ears] = weakref.WeakKeyDictionary()


def listen(model) -> None:
    """Hold the input of every full-attention module of `model` while it runs; counted.

    Raises:
        UserError: no attention module is where decoders have it.
    """
    if model not in _heard:
        _heard[model] = _Ears(refuse_unheard(model))
    _heard[model].count += 1


def refuse_unheard(model) -> list[nn.Module]:
    """The full-attention modules of a model, or a UserError where a layer's is not where decoders have it."""
    modules = attention_of(model)
    wanted = full_layers(model.config.get_text_config())
    if missing := [i for i in wanted if i not in modules]:
        raise UserError(
            f"layer {missing[0]} of {type(model).__name__} has no attention module where decoders have it, so its "
            "hidden states cannot be seen: use a policy that needs none"
        )
    return [modules[i] for i in wanted]


def unlisten(model) -> None:
    """Undo one :func:`listen`; the last one removes the hooks."""
    if model not in _heard:
        return
    _heard[model].count -= 1
    if _heard[model].count == 0:
        for hook in _heard.pop(model).hooks:
            hook.remove()


def received(layer: int) -> Tensor:
    """The hidden states `[batch, m, D]` that came in with the keys of a layer; to be asked while its attention runs.

    Args:
        layer: the layer's index in the model.

    Raises:
        UserError: another layer's attention runs on this thread, or none.
    """
    held = getattr(_present, "held", None)
    if held is None or held[0] != layer:
        raise UserError(
            f"the keys of layer {layer} came without its hidden states: give the cache to the model it was made for"
        )
    return held[1]


class _Ears:
    """The hooks on one model's attention modules, and how many asked for them."""

    def __init__(self, modules: list[nn.Module]):
        self.count = 0
        self.hooks: list[RemovableHandle] = []
        for module in modules:
            self.hooks.append(module.register_forward_pre_hook(_take, with_kwargs=True))
            # a forward that raises lets go too
            self.hooks.append(module.register_forward_hook(_drop, always_call=True))


def _take(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    _present.held = module.layer_idx, hidden.detach()


def _drop(module: nn.Module, args: tuple, output: Any) -> None:
    _present.held = None
