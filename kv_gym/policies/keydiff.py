"""KeyDiff: keep the keys that differ most from the mean direction of the cached keys.

Paper: arXiv 2504.15364, section 3 (anchor: mean of the normalised keys).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Policy


@dataclass(frozen=True)
class KeyDiff(Policy):
    """Minus the cosine similarity to the anchor of the KV head."""

    def score(self, view: CacheView) -> Tensor:
        directions = F.normalize(view.keys.float(), dim=-1)
        anchor = torch.einsum("bhnd,bhn->bhd", directions, view.valid.float())
        return -torch.einsum("bhnd,bhd->bhn", directions, F.normalize(anchor, dim=-1))
