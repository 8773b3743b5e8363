"""Evicted pairs are merged into their most similar survivor, which keeps its position.

Similarity is the cosine of keys as they are cached, after the rotary embedding. Sources: D2O (arXiv 2406.13035,
section on dynamic token merging, and its code for the running threshold); for values alone kvpress.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kv_gym.errors import UserError
from kv_gym.live.slots import take
from kv_gym.live.tiers.base import EvictedPairs, LayerTier, Tier
from kv_gym.policies.base import Paper

CHUNK = 256  # evicted keys whose similarities to all survivors are held at a time


@dataclass(frozen=True)
class Merge(Tier):
    """D2O's merging: keys and values of evicted pairs that resemble a survivor enough join it; the others are dropped.

    Evicted pair i joins its most similar survivor j, of similarity u, where u is at or above the head's threshold.
    That is the mean of u over the first eviction, and from then on ``decay`` times itself plus ``1 - decay`` times
    the mean of u over the new one. A survivor becomes the mean of itself with weight e^1 and of what joins it with
    weight e^u.

    Differs from the paper in: every KV head decides for itself (the code averages u over query heads, which keep the
    same tokens there); weights are those of the paper, of which the code keeps only the numerators.

    Attributes:
        decay: weight of the past in the threshold, in [0, 1].

    Raises:
        UserError: a decay outside [0, 1].
    """

    paper = Paper(
        "D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of Large Language Models",
        "2406.13035", venue="ICLR 2025",
    )  # fmt: skip
    decay: float = 0.5
    name = "merge"
    changes_keys = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise UserError(f"the threshold's decay is {self.decay}; expected a number from 0 to 1")

    def begin(self, ordinal: int = 0) -> LayerTier:
        return MergingLayer(self)


@dataclass(frozen=True)
class MergeValues(Tier):
    """Values alone are merged: every evicted one joins the survivor whose key is most similar; keys stay.

    With weight w = max(cos, 0) * |v_evicted| / (|v_evicted| + |v_survivor|) against the survivor's 1.
    Source: kvpress's MergingPress.
    """

    name = "merge:values"

    def begin(self, ordinal: int = 0) -> LayerTier:
        return ValueMergingLayer()


class MergingLayer(LayerTier):
    """One layer's thresholds.

    Attributes:
        settings: the decay.
        threshold: `[batch, kv_heads]`, NaN where a head has evicted nothing yet; None before the first eviction.
    """

    row_tensors = ("threshold",)

    def __init__(self, settings: Merge):
        self.settings = settings
        self.threshold: Tensor | None = None

    def take(self, pairs: EvictedPairs) -> dict[str, Tensor]:
        indices, similarity, nearest, real = nearest_survivors(pairs)
        counts = real.sum(2)
        mean = similarity.masked_fill(~real, 0).sum(2) / counts.clamp(min=1)
        mean = mean.masked_fill(counts == 0, math.nan)
        before = mean if self.threshold is None else self.threshold
        mixed = self.settings.decay * before + (1 - self.settings.decay) * mean
        self.threshold = torch.where(mixed.isnan(), torch.where(mean.isnan(), before, mean), mixed)
        joins = real & (similarity >= self.threshold[..., None])
        weights = similarity.exp().masked_fill(~joins, 0)
        return {
            name: _averaged(tensor, take(tensor, indices), nearest, weights, math.e)
            for name, tensor in (("keys", pairs.keys), ("values", pairs.values))
        }


class ValueMergingLayer(LayerTier):
    """Merges values and stores nothing."""

    def take(self, pairs: EvictedPairs) -> dict[str, Tensor]:
        indices, similarity, nearest, real = nearest_survivors(pairs)
        evicted, survivors = take(pairs.values, indices), take(pairs.values, nearest)
        size, other = (_exact(values).norm(dim=-1) for values in (evicted, survivors))
        weights = similarity.clamp(min=0) * size / (size + other).clamp(min=1e-30)
        return {"values": _averaged(pairs.values, evicted, nearest, weights.masked_fill(~real, 0), 1.0)}


def nearest_survivors(pairs: EvictedPairs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For every evicted pair, the survivor of its head whose key is most similar.

    Returns:
        Four `[batch, kv_heads, most]`: indices of the evicted pairs; their cosine similarities; the survivors'
        indices; and bool: a pair that is really evicted, from a head where something stays.
    """
    indices = pairs.indices()
    real = pairs.evicted.gather(2, indices) & pairs.kept.any(2, keepdim=True)
    unit = F.normalize(_exact(pairs.keys), dim=-1, eps=1e-30)
    best = []
    for part in take(unit, indices).split(CHUNK, 2):
        products = part @ unit.transpose(-1, -2)
        best.append(products.masked_fill_(~pairs.kept[:, :, None], -math.inf).max(-1))
    similarity = torch.cat([part.values for part in best], 2).masked_fill(~real, 0)
    return indices, similarity, torch.cat([part.indices for part in best], 2), real


def _averaged(tensor: Tensor, evicted: Tensor, nearest: Tensor, weights: Tensor, own_weight: float) -> Tensor:
    """Every slot with weight `own_weight` and what joins it with `weights`, divided by the sum of weights."""
    exact = _exact(tensor)
    total = torch.full_like(exact[..., 0], own_weight).scatter_add_(2, nearest, weights)
    index = nearest[..., None].expand_as(evicted)
    joined = (own_weight * exact).scatter_add_(2, index, _exact(evicted) * weights[..., None])
    # untouched slots keep their bits
    return torch.where((total > own_weight)[..., None], (joined / total[..., None]).to(tensor.dtype), tensor)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
