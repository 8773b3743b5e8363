"""Same tokens: one set of tokens for all heads of a layer, chosen by another policy's scores in each head.

For paged engines, whose blocks hold a token's keys of all heads: nothing is freed before every head evicts it.
A token's score is log(mean over the KV heads of exp(score)); a head that no longer holds it counts as zero. Where
the base's scores are logits of the future attention (the learned agents) that is the log of the mean attention
expected, and small numbers such as attention are averaged almost as they are.
On twelve recorded contexts of the reference model (512 tokens, an eighth and a quarter of the slots, eight bases) the
utility kept was the largest of this rule, the mean score, the mean rank and the largest score, or within 0.025 of it.
Heads of one layer only: a policy sees one layer at a time, while others are not computed yet, so the same tokens for
the whole model would need a second pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Policy
from kv_gym.policies.scoring.neighbours import number_tokens
from kv_gym.policies.wrapper import PolicyWrapper


@dataclass(frozen=True)
class SameTokens(PolicyWrapper):
    """Log of the mean of the exponentials of the base's scores; with equal budgets all heads keep the same tokens.

    Attributes:
        over: the base; its protection, queries and state are taken over.
    """

    paper = None
    comparable = True
    over: str | Policy = "keydiff"

    def score(self, view: CacheView) -> Tensor:
        scores = self.base.score(view).double().masked_fill(~view.valid, 0.0)
        count, tokens = number_tokens(view)
        flat, index = scores.flatten(), tokens.flatten()
        highest = flat.new_full((count,), float("-inf")).scatter_reduce_(0, index, flat, "amax")
        # from the highest on, so that no exponential is too large or all of them zero
        total = torch.zeros_like(highest).index_add_(0, index, (flat - highest[index]).exp())
        return (highest + (total / scores.shape[1]).log())[tokens].float()
