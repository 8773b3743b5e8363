"""Tensors between host and accelerator, without one waiting for the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; where that is an accelerator, the host does not wait for the copy."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def number_tensor(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Whole numbers that the host knows, as int64 `[len(numbers)]` on a device."""
    if len(set(numbers)) == 1:
        return torch.full((len(numbers),), numbers[0], device=device)
    return to_device(torch.tensor(numbers, dtype=torch.int64), device)


def resident_limit(device: torch.device) -> int:
    """Bytes that contexts may take of an accelerator's memory, so that they need not be sent again: half of what is
    free, which several processes share. 0 on a CPU, where they are already.
    """
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free // 2


class HostCopy:
    """A small tensor of an accelerator on its way to the host, for which nobody waits.

    Attributes:
        tensor: on the CPU; not to be read before :meth:`has_arrived`.
    """

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.to("cpu", non_blocking=True)
        self._event = torch.Event(tensor.device)
        self._event.record()

    def has_arrived(self) -> bool:
        """Whether the copy is complete."""
        return self._event.query()

    @staticmethod
    def read(tensor: Tensor) -> Tensor:
        """The tensor on the CPU at once: the host waits for all that the accelerator was given to do."""
        return tensor.cpu()
