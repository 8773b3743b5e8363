"""A CUDA graph on a CPU: operations recorded with their memory, and run again on the same memory."""

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before = [], []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        for argument, given in zip(operation._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((given, given.clone()))
        out = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, out))
        return out


def capture(step):
    """Record `step` without an effect; return what runs its operations, and its result's tensor."""
    with _Recorder() as recorder:
        result = step()
    for tensor, before in reversed(recorder.before):
        tensor.copy_(before)

    def replay():
        for operation, args, kwargs, out in recorder.calls:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)

    return replay, result
