"""Cuts that come when every layer has read a forward: they need all layers at once, or what was read, again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kv_gym.live.layer_state import Contents
from kv_gym.models.second_reading import read_again
from kv_gym.policies import StatefulPolicy


def repeat(model, cached: Sequence[Any], layers: Sequence[Contents]) -> None:
    """The second reading of what the policy has not had read again yet, where it asks for one; arguments as below."""
    first, policy = layers[0], layers[0].eviction.policy
    if isinstance(policy, StatefulPolicy) and policy.repetition and first.unread is not None and first.unread.shape[1]:
        held = {contents.index: contents for contents in layers}
        read_again(model, policy, first.unread, held, cached, cached[first.index].seen)
        first.unread = None


@torch.no_grad()
def cut_all(
    model, cached: Sequence[Any], layers: Sequence[Contents], due: list[bool] | None, exact: bool = False
) -> None:
    """Cut all evicting layers of a model, after a second reading where the policy asks for one.

    Args:
        model: the cache's.
        cached: the cache's layers, as transformers knows them.
        layers: what the evicting ones hold.
        due: which rows to cut; None means all.
        exact: keep no room for tokens to come.
    """
    if all(contents.fits(due) for contents in layers):
        for contents in layers:
            contents.mark(due)
        return
    repeat(model, cached, layers)
    eviction = layers[0].eviction
    if not eviction.allocation.whole_model:
        for contents in layers:
            contents.evict(due, exact)
        return
    judged = [contents.judged(due) for contents in layers]
    for contents, kept in zip(layers, eviction.allocation.kept(judged), strict=True):
        contents.cut(kept, exact)
