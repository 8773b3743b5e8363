"""LazyEviction: keep tokens that come back after long gaps until they are overdue by their own longest gap.

The scores H1 + H2 of the paper's code: with D the tokens since the last hit and M the
longest gap between two hits, H1 = 2 sigmoid(-(1 + D / M)) and H2 = 2 sigmoid(1 - M), or 0 where M is 0.
Differs from the paper in: the prompt's queries count too (the code starts its clock after the prompt); a KV head
is hit when any of its query heads is (the code repeats the keys); when eviction happens is the caller's trigger
(the paper evicts every `window` steps: ``every:52``); threshold and window are those of Llama on MATH.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Paper, StatefulPolicy
from kv_gym.policies.scoring.attention_hits import above


@dataclass(frozen=True)
class LazyEviction(StatefulPolicy):
    """How likely a token is to come back; state `last` and `gap` are int64 `[batch, kv_heads, tokens]`.

    Attributes:
        threshold: attention that counts as a hit.
        window: newest tokens that are kept.
        offset: the 1 in H1; 0 gives 2 sigmoid(-D / M), as others have written it.
        gap_weight: factor on H2; 0 leaves it out.
    """

    paper = Paper(
        "LazyEviction: Lagged KV Eviction with Attention Pattern Observation for Efficient Long Reasoning",
        "2506.15969",
        venue="ACL 2026",
    )
    observed_with = ("threshold",)
    threshold: float = 5e-4
    window: int = 52
    offset: float = 1.0
    gap_weight: float = 1.0

    def __post_init__(self) -> None:
        self._require(self.window >= 0 and self.threshold > 0, "window from 0 and threshold above 0")

    @property
    def protection(self) -> tuple[int, int]:
        return 0, self.window

    def initial_state(self, view: CacheView) -> dict[str, Tensor]:
        return {"last": view.positions.clone(), "gap": torch.zeros_like(view.positions)}

    def observe(self, view: CacheView, attention: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        hits = above(attention, view, self.threshold)
        last, gap = state["last"], state["gap"]
        for row, when in enumerate(
            view.query_positions(hits.shape[2]).unbind(1)
        ):  # every hit depends on the one before
            hit, when = hits[:, :, row], when[:, None, None]
            gap = torch.where(hit, torch.maximum(gap, when - last), gap)
            last = torch.where(hit, when, last)
        return {"last": last, "gap": gap}

    def score(self, view: CacheView) -> Tensor:
        since = (view.seen[:, None, None] - 1 - view.state["last"]).float()
        gap = view.state["gap"].float()
        overdue = 2 * torch.sigmoid(-(self.offset + since / (gap + 1e-5)))
        return overdue + self.gap_weight * (2 * torch.sigmoid(1 - gap) * (gap > 0))
