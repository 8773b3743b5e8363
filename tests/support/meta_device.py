"""An accelerator without one: on the meta device tensors have shapes and no numbers, so every look at a number raises.

:class:`OneDevice` refuses what the meta device lets through: operations on tensors of two devices, and copies from the
host that an accelerator would make it wait for. :func:`count_reads` lets the one allowed wait pass, and counts it.
"""

from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import LlamaConfig, LlamaForCausalLM

from kv_gym.devices import HostCopy

META = torch.device("meta")
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class OneDevice(TorchDispatchMode):
    """Refuses operations that mix the host with the device, and copies between them that make the host wait.

    The meta device infers shapes in Python, so the result of an operation is remembered by the shapes it was given.
    """

    shapes: ClassVar[dict] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves, tree = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.dim() or tensor.device.type == "meta"}
        target = torch.device(kwargs.get("device") or tensors[0].device) if tensors else META
        if operation in COPIES:
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            assert devices | {target.type} in ({"cpu"}, {"meta"}) or not waits, f"{operation} makes the host wait"
        else:
            assert devices != {"cpu", "meta"}, f"{operation} has tensors on two devices"
        schema = operation._schema
        if devices != {"meta"} or schema.is_mutable or any(result.alias_info for result in schema.returns):
            return operation(*args, **kwargs)
        key = (operation, str(tree), *map(_shape, leaves))
        if key not in self.shapes:
            results, result_tree = tree_flatten(operation(*args, **kwargs))
            self.shapes[key] = list(map(_shape, results)), result_tree
        found, result_tree = self.shapes[key]
        results = [torch.empty_strided(*shape[:2], dtype=shape[2], device=META) for shape in found]
        return tree_unflatten(results, result_tree)


def _shape(leaf):
    """What a result depends on: shape, strides, type and device of a tensor, type and value of anything else."""
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return type(leaf), repr(leaf)


def meta_model(layers=2, **changes):
    """A Llama of shapes alone: 4 query heads, 2 KV heads of 8 channels."""
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, bos_token_id=1, **changes,
    )  # fmt: skip
    with META:
        return LlamaForCausalLM(config).eval()


def count_reads(monkeypatch, length=4):
    """Replace reads of lengths by a guess, every head `length` slots; returns the list of the shapes that were read."""
    reads = []

    def read(tensor):
        reads.append(tuple(tensor.shape))
        return torch.full(tensor.shape, length)

    monkeypatch.setattr(HostCopy, "read", staticmethod(read))
    monkeypatch.setattr(HostCopy, "__init__", lambda self, tensor: None)
    monkeypatch.setattr(HostCopy, "has_arrived", lambda self: False)
    return reads
