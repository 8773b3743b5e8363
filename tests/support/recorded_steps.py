"""A CUDA graph on a CPU: operations recorded with their memory, and run again on the same memory.

As a graph does, a recording keeps what its own operations made alive, and nothing else that they read or write.
"""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class _Outside:
    """A tensor that was there before the recording: where it lies, without keeping that alive."""

    def __init__(self, tensor):
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.place = tensor.storage_offset(), tensor.size(), tensor.stride()
        self.dtype = tensor.dtype

    def tensor(self):
        assert not self.storage.expired(), "a replay reads or writes memory that was freed after the capture"
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.place)


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made, self.outside = [], [], {}, set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        for argument, given in zip(operation._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((given, given.clone()))
        out = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten.lift_fresh.default:  # a constant, as torch.tensor makes one
            self.made[id(out)] = out
            return out
        given = tree_map_only(Tensor, self._remembered, args)
        made = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        if all(_address(tensor) not in self.outside for tensor in made):  # no views of what was there, nor itself
            self.made |= {id(tensor): tensor for tensor in made}
        self.calls.append((operation, given, kwargs or {}, [t if id(t) in self.made else None for t in made]))
        return out

    def _remembered(self, tensor):
        if id(tensor) in self.made:
            return tensor
        self.outside.add(_address(tensor))
        return _Outside(tensor)


def _address(tensor):
    return tensor.untyped_storage().data_ptr()


def capture(step):
    """Record `step` without an effect; return what runs its operations, and its result's tensor."""
    with _Recorder() as recorder:
        result = step()
    for tensor, before in reversed(recorder.before):
        tensor.copy_(before)
    calls, made = recorder.calls, recorder.made
    del recorder

    def replay():
        for operation, args, kwargs, made in calls:
            again = operation(*tree_map_only(_Outside, _Outside.tensor, args), **kwargs)
            for old, new in zip(made, (t for t in tree_leaves(again) if isinstance(t, Tensor)), strict=True):
                if old is not None and _address(old) != _address(new):
                    old.copy_(new)

    assert result is made[id(result)]
    return replay, result
