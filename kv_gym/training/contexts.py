"""Training contexts in memory: what the networks see of every slot, and what each slot is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.policies.scorer import GroupedScorer
from kv_gym.policies.scoring.inputs import DEFAULT, HIDDEN, INPUTS, read_inputs, slot_inputs
from kv_gym.traces.sequence import Sequence


@dataclass
class Context:
    """One training context of A heads (all layers' KV heads), L layers.

    Attributes:
        inputs: `[A, n, f]` float32, without hidden states.
        worth: `[A, n]` float32, what the agent learns to rank by; non-negative.
        hidden: `[L, n, D]` float32, hidden states, held once for all heads of a layer; None where they are no input.
    """

    inputs: Tensor
    worth: Tensor
    hidden: Tensor | None = None

    def at(self, slots: Tensor | None = None) -> Tensor:
        """All that networks see of the slots `[m]` (None: of every one), `[A, m, f + D]`; hidden states come last."""
        narrow = self.inputs if slots is None else self.inputs.index_select(1, slots)
        if self.hidden is None:
            return narrow
        wide = self.hidden if slots is None else self.hidden.index_select(1, slots)
        return torch.cat((narrow, wide.repeat_interleave(len(narrow) // len(wide), 0)), -1)

    def open(self, sinks: int, recent: int) -> Context:
        """The slots that are not protected, so that there is something to decide about each (views, no copies)."""
        end = max(sinks + 1, self.worth.shape[1] - recent)
        hidden = None if self.hidden is None else self.hidden[:, sinks:end]
        return Context(self.inputs[:, sinks:end], self.worth[:, sinks:end], hidden)


def expected_utility(sequence: Sequence) -> np.ndarray:
    """Mean attention per query over the continuations, `[L, H, n]`: the worth that most agents learn."""
    return sequence.utility()


def inputs_of(sequence: Sequence, names: tuple[str, ...] = DEFAULT) -> Tensor:
    """What the networks see of every slot of a recorded context as it was at its end, `[heads, n, f]` float32.

    Args:
        sequence: the context.
        names: of the inputs.

    Raises:
        UserError: the context was recorded without what they need.
    """
    return read_context(sequence, _nothing, names).at()


def read_context(
    sequence: Sequence, worth: Callable[[Sequence], np.ndarray] = expected_utility, names: tuple[str, ...] = DEFAULT
) -> Context:
    """Inputs of a recorded context as it was at its end, and the worth of its slots.

    Raises:
        UserError: the context was recorded without what the inputs need.
    """
    hidden = None
    if names[-1] == HIDDEN:
        hidden = torch.from_numpy(np.stack([sequence.hidden_of(i) for i in range(len(sequence.layers))]))
    inputs = _narrow(sequence, tuple(name for name in names if name != HIDDEN))
    return Context(inputs, torch.from_numpy(worth(sequence)).flatten(0, 1), hidden)


def _narrow(sequence: Sequence, names: tuple[str, ...]) -> Tensor:
    """All inputs but the hidden states, `[heads, n, f]`; f may be 0."""
    wanted = max((INPUTS[name].queries for name in names), default=0)
    if wanted > sequence.queries.shape[2]:
        raise UserError(
            f"inputs {list(names)} need the last {wanted} queries and context {sequence.id} has "
            f"{sequence.queries.shape[2]}: record with --window {wanted}"
        )
    if wanted:
        layers = range(len(sequence.layers))
        return torch.cat([read_inputs(sequence.view(layer), names)[0] for layer in layers])
    # nothing belongs to one layer: all heads of the model at once
    keys, values = (torch.from_numpy(array).flatten(0, 1) for array in (sequence.keys, sequence.values))
    if names == DEFAULT:
        n = keys.shape[1]
        return slot_inputs(keys, values, torch.arange(n).expand(keys.shape[:2]), torch.tensor(n))
    if not names:
        return keys[..., :0].clone()
    return read_inputs(CacheView.of(keys[None], values[None]), names)[0]


def _nothing(sequence: Sequence) -> np.ndarray:
    return np.empty((*sequence.keys.shape[:2], 0), np.float32)


def standardise(contexts: list[Context], network: GroupedScorer) -> None:
    """Standardise the inputs in place, as `network` would at every step."""
    for context in contexts:
        narrow = context.inputs.shape[-1]
        context.inputs.sub_(network.mean[..., :narrow]).mul_(network.scale[..., :narrow])
        if context.hidden is not None:
            # all heads of a layer were standardised by the same hidden states: any of them will do
            first = slice(None, None, network.heads // len(context.hidden))
            context.hidden.sub_(network.mean[first, :, narrow:]).mul_(network.scale[first, :, narrow:])


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
