"""Training contexts in memory: what the networks see of every slot, and what each slot is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kv_gym.errors import UserError
from kv_gym.policies.scorer import GroupedScorer, slot_inputs
from kv_gym.traces.sequence import Sequence


@dataclass
class Context:
    """One training context of A heads (all layers' KV heads).

    Attributes:
        inputs: `[A, n, f]` float32.
        worth: `[A, n]` float32, what the agent learns to rank by; non-negative.
    """

    inputs: Tensor
    worth: Tensor

    def open(self, sinks: int, recent: int) -> Context:
        """The slots that are not protected, so that there is something to decide about each (views, no copies)."""
        end = max(sinks + 1, self.worth.shape[1] - recent)
        return Context(self.inputs[:, sinks:end], self.worth[:, sinks:end])


def expected_utility(sequence: Sequence) -> np.ndarray:
    """Mean attention per query over the continuations, `[L, H, n]`: the worth that most agents learn."""
    return sequence.utility()


def inputs_of(sequence: Sequence) -> Tensor:
    """What the networks see of every slot of a recorded context as it was at its end, `[heads, n, f]`."""
    keys, values = torch.from_numpy(sequence.keys).flatten(0, 1), torch.from_numpy(sequence.values).flatten(0, 1)
    n = keys.shape[1]
    return slot_inputs(keys, values, torch.arange(n).expand(keys.shape[:2]), torch.tensor(n))


def read_context(sequence: Sequence, worth: Callable[[Sequence], np.ndarray] = expected_utility) -> Context:
    """Inputs of a recorded context as it was at its end, and the worth of its slots."""
    return Context(inputs_of(sequence), torch.from_numpy(worth(sequence)).flatten(0, 1))


def standardise(contexts: list[Context], network: GroupedScorer) -> None:
    """Standardise the inputs in place, as `network` would at every step."""
    for context in contexts:
        context.inputs.sub_(network.mean).mul_(network.scale)


def held_out(sequences: list[Sequence], share: float) -> tuple[list[Sequence], list[Sequence]]:
    """Contexts to train on and to choose the best checkpoint with.

    Split by document, or, where there are too few documents for that, the last contexts are for validation.

    Raises:
        UserError: fewer than 4 contexts.
    """
    if len(sequences) < 4:
        raise UserError(
            f"training needs at least 4 contexts in the split 'train', and the traces hold {len(sequences)}"
        )
    documents = sorted({s.text_hash for s in sequences})
    if len(documents) < 4:
        last = max(1, round(share * len(sequences)))
        return sequences[:-last], sequences[-last:]
    chosen = set(documents[:: max(2, round(1 / max(share, 1e-6)))])
    return [s for s in sequences if s.text_hash not in chosen], [s for s in sequences if s.text_hash in chosen]
