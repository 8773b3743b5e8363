"""Models that are wrapped, adapted, quantised or offloaded: the transformers model inside, and its weights.

A wrapper such as PEFT's calls the model inside in ways of its own (``PeftModel.generate`` goes past the wrapper's
forward), so hooks belong on the model inside. And its weights may be held in other forms that mean the same: beside an
adapter, in packed bits, on a disk.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from kv_gym.errors import UserError


def transformers_model(model: Any) -> Any:
    """The transformers model inside a wrapper (PEFT, ``torch.compile``, ``DataParallel``, ...), or `model` itself.

    Raises:
        UserError: a PEFT model with prefix tuning, which replaces the cache that it is given.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel) or not isinstance(model, nn.Module):
        return model
    for adapter in getattr(model, "peft_config", {}).values():
        if "PREFIX" in str(getattr(adapter, "peft_type", "")):
            raise UserError(
                f"{type(model).__name__} has a prefix-tuning adapter, which replaces the cache that it is given: use "
                "an adapter that changes weights, such as LoRA, or the model without it"
            )
    inner = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return next(inner, model)


def effective_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and values of every parameter as the model computes with it, sorted by name.

    Adapters are merged into the weights that they change (one layer at a time, in a copy), quantised weights are
    dequantised, and offloaded ones are read. A plain model's are those of ``named_parameters()``. Weights that a
    quantisation holds as buffers are left out.

    Raises:
        UserError: a parameter without values, such as one on the meta device.
    """
    readers: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {}
    _collect(model, "", readers, set())
    for name, (module, read) in sorted(readers.items(), key=lambda item: item[0]):
        with _loaded(module):
            tensor = read()
            if tensor.is_meta:
                raise UserError(
                    f"the model's parameter {name} has no values (it is on the meta device): load the model's weights"
                )
            yield name, tensor


def _collect(
    module: Any, prefix: str, readers: dict[str, tuple[nn.Module, Callable[[], Tensor]]], seen: set[int]
) -> None:
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):  # PEFT: a trained copy of a module
        active = [name for name in module.active_adapters if name in module.modules_to_save]
        trained = active and not module.disable_adapters
        _collect(module.modules_to_save[active[0]] if trained else module.original_module, prefix, readers, seen)
        return
    adapted = hasattr(module, "get_base_layer") and hasattr(module, "merge")
    source = module.get_base_layer() if adapted else module
    for name, parameter in source.named_parameters(recurse=False):
        if id(parameter) not in seen:  # tied weights have their first name
            seen.add(id(parameter))
            read = _merged if adapted else _dequantised
            readers[f"{prefix}{name}"] = source, partial(read, module, name)
    for name, child in (source if adapted else module).named_children():
        _collect(child, f"{prefix}{name}.", readers, seen)


def _merged(layer: Any, name: str) -> Tensor:
    """A parameter of the layer that a PEFT adapter changes, with the change."""
    if layer.disable_adapters or layer.merged:
        return _dequantised(layer.get_base_layer(), name)
    twin = copy.deepcopy(layer)
    twin.merge()
    return _dequantised(twin.get_base_layer(), name)


def _dequantised(module: Any, name: str) -> Tensor:
    parameter = getattr(module, name)
    kind = type(parameter).__name__
    if kind == "Params4bit" and getattr(parameter, "quant_state", None) is not None:
        return _dequantised_4bit(parameter)
    if kind == "Int8Params":
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        return dequantize_bnb_weight(parameter, module.state)
    data = parameter.detach()
    return data.dequantize() if type(data) is not Tensor and hasattr(data, "dequantize") else data  # torchao's


def _dequantised_4bit(parameter: Any) -> Tensor:
    """A 4-bit weight of bitsandbytes, whose first forward on some CPUs lays it out anew and rounds its scales."""
    from bitsandbytes import functional

    codes, state = parameter.data, copy.copy(parameter.quant_state)
    if getattr(state, "packing_format_for_cpu", False):
        state.original_nested, scales = False, state.absmax.T.reshape(-1)
        codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
    elif state.nested:
        scales, state.nested = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset, False
    else:
        scales = state.absmax
    state.absmax = scales.bfloat16().float()  # as the new layout has them
    return functional.dequantize_4bit(codes, state)


def _loaded(module: nn.Module) -> Any:
    """A context in which accelerate has read the module's offloaded weights."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)
