"""Data-parallel training: processes that ``torchrun`` starts, each with a share of every batch.

    torchrun --nproc-per-node 2 -m kv_gym train end_to_end --traces TRACES --model MODEL --out policies/mine

All processes draw the same batch, because a step seeds its draws by its own number. Each computes loss and gradient of
its share of the contexts, the gradients are summed, and all take the same optimiser step. So a run with several
processes is that of one with the same batch, up to the order in which gradients are added. The first process alone
validates, writes and shows progress.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from kv_gym.errors import UserError

_LONGEST_WAIT = timedelta(days=1)  # of the others while the first process validates; torchrun ends them when it dies


@dataclass(frozen=True)
class Processes:
    """The processes of a run, and which of them this is.

    Attributes:
        rank: number of this process, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def of_torchrun(cls, device: torch.device) -> Processes:
        """Those that torchrun started, joined over gloo on CPUs and NCCL on GPUs; this one alone without torchrun."""
        if not distributed.is_available() or int(os.environ.get("WORLD_SIZE", 1)) == 1 or "RANK" not in os.environ:
            return cls()
        if not distributed.is_initialized():
            distributed.init_process_group("gloo" if device.type == "cpu" else "nccl", timeout=_LONGEST_WAIT)
            atexit.register(distributed.destroy_process_group)
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def writes(self) -> bool:
        """Whether this is the process that validates, writes and shows progress."""
        return self.rank == 0

    @property
    def of_this_machine(self) -> int:
        """How many of them share this machine's memory."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if self.count > 1 else 1

    def own(self, contexts: int) -> slice:
        """Which contexts of a batch are this process's.

        Raises:
            UserError: there are fewer contexts than processes.
        """
        if contexts < self.count:
            raise UserError(
                f"{self.count} processes cannot share {contexts} contexts per step: start fewer, or set contexts to "
                f"{self.count} or more"
            )
        return slice(self.rank * contexts // self.count, (self.rank + 1) * contexts // self.count)

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter], loss: Tensor) -> Tensor:
        """Sum the gradients over all processes, in place, and the loss, which is returned."""
        if self.count == 1:
            return loss
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        joined = torch.cat([*(gradient.flatten() for gradient in gradients), loss.flatten().to(gradients[0].dtype)])
        distributed.all_reduce(joined)
        *parts, total = joined.split([*(gradient.numel() for gradient in gradients), 1])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return total[0]

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            distributed.barrier()
