"""Random eviction: the null hypothesis that every comparison carries.

Each slot's score is a hash of its layer, head and position, uniform in [0, 1): a random order that is the same
in replay and in live decoding, in every process and on every device.
Differs from "Random Attention" (arXiv 2609.03430) in: the prompt is not protected unless the caller says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Policy

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class RandomEviction(Policy):
    """Random order of slots; `seed` names the order."""

    paper = None
    comparable = True  # uniform in every head: one threshold keeps the same share of each, on average
    static = True
    seed: int = 0

    @property
    def name(self) -> str:
        return "random"

    def score(self, view: CacheView) -> Tensor:
        heads = torch.arange(view.keys.shape[1], device=view.keys.device)[:, None]
        x = view.positions * 0x9E3779B1 + heads * 0x85EBCA6B + view.layer * 0xC2B2AE35 + self.seed * 0x27D4EB2F
        for shift, factor in (
            (16, 0x7FEB352D),
            (15, 0x46A6B78B),
        ):  # a 32-bit mixer; int64 may wrap, its low bits are right
            x = x & _MASK
            x = ((x ^ (x >> shift)) & _MASK) * factor
        x = x & _MASK
        return (x ^ (x >> 16)).double() / 2**32
