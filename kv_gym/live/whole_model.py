"""Cuts for which an allocation needs every layer at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kv_gym.live.contents import Contents


@torch.no_grad()
def cut_all(layers: Sequence[Contents], due: list[bool] | None, exact: bool = False) -> None:
    """Cut all evicting layers of a model together.

    Args:
        layers: what they hold.
        due: which rows to cut; None means all.
        exact: keep no room for tokens to come.
    """
    if all(contents.fits(due) for contents in layers):
        for contents in layers:
            contents.mark(due)
        return
    judged = [contents.judged(due) for contents in layers]
    for contents, kept in zip(layers, layers[0].eviction.allocation.kept(judged), strict=True):
        contents.cut(kept, exact)
