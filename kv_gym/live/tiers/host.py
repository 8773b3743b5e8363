"""A copy of every evicted pair in the host's memory, from which the full context can be put back."""

from __future__ import annotations

from torch import Tensor

from kv_gym.live.tiers.tier import LayerTier, Leaving, all_of, picked


class HostLayer(LayerTier):
    """One layer's evicted pairs in the model's own precision, with their positions, on the CPU.

    Together with what the cache holds that is the whole context. Nobody attends to it.
    """

    def take(self, leaving: Leaving) -> None:
        tensors = picked(leaving, leaving.keys, leaving.values, leaving.positions)
        keys, values, positions = (tensor.cpu() for tensor in tensors)
        self.held = leaving.add_to(self.held, {"keys": keys, "values": values, "positions": positions})

    def padded(self) -> tuple[dict[str, Tensor], Tensor] | None:
        """Keys, values and positions `[batch, kv_heads, longest, ...]` and which are real, or None: nothing went."""
        return None if self.held is None else all_of(self.held)
