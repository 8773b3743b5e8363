"""A layer's slots as tensors of a file, and what is expected of those in a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.live.holding import SLOT
from kv_gym.live.layer_state import Contents
from kv_gym.live.ragged import RaggedSlots, runs
from kv_gym.live.slots import EqualSlots


def stored_slots(slots: EqualSlots | RaggedSlots) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What to write of a layer's slots: numbers for the header, and tensors; room for tokens to come is zero."""
    tensors = {}
    if isinstance(slots, RaggedSlots):
        filled = runs(slots.starts, slots.lengths)
        for name, buffer in slots.buffers.items():
            tensors[f"slots.{name}"] = copy = torch.zeros_like(buffer)
            copy[filled.to(buffer.device)] = buffer[filled.to(buffer.device)]
        return {}, tensors | {"lengths": slots.lengths, "capacities": slots.capacities}
    for name, buffer in slots.buffers.items():
        tensors[f"slots.{name}"] = copy = buffer.clone()
        copy[:, :, slots.length :] = 0
    return {"length": slots.length, "foreign": slots.foreign}, tensors


def expected_slots(held: Contents, heads: int, head_dim: int) -> dict[str, tuple[list[int], torch.dtype | None]]:
    """Name of every buffer that a layer with these settings has -> sizes beyond the slots, dtype (None: the keys')."""
    one = torch.zeros(1, heads, 1, head_dim)
    positions = torch.zeros(1, heads, 1, dtype=torch.int64)
    view = CacheView(
        one, one, positions, torch.ones_like(positions, dtype=torch.bool), torch.ones(1, dtype=torch.int64),
        torch.ones(1, heads, dtype=torch.int64), held.index, held.scaling,
    )  # fmt: skip
    found: dict[str, tuple[list[int], torch.dtype | None]] = {
        "keys": ([head_dim], None), "values": ([head_dim], None), "positions": ([], torch.int64)
    }  # fmt: skip
    assert set(found) == set(SLOT)
    for place, policy in held.eviction.stateful:
        for name, tensor in policy.initial_state(view).items():
            found[f"{place}/{name}"] = list(tensor.shape[3:]), tensor.dtype
    return found | {name: ([], torch.float32) for name in held.eviction.scored}


def check_positions(
    slots: EqualSlots | RaggedSlots, rows: Sequence[int], damaged: Callable[[str], Exception]
) -> None:  # fmt: skip
    """Raise what `damaged(reason)` makes unless every head holds distinct tokens that its row has seen."""
    counts = slots.counts().flatten()
    if isinstance(slots, RaggedSlots):
        flat = slots.buffers["positions"].cpu()[runs(slots.starts, slots.lengths)]
    else:
        flat = slots["positions"].flatten().cpu()
    head = torch.arange(len(counts)).repeat_interleave(counts)
    seen = torch.tensor(rows).repeat_interleave(len(counts) // len(rows))[head]
    if bool(((flat < 0) | (flat >= seen)).any()):
        raise damaged("a position of a token that was never seen")
    both = (head * max(rows) + flat).sort().values
    if bool((both[1:] == both[:-1]).any()):
        raise damaged("a head holds a token twice")
