"""The token view's data: one context, and how each policy ranks its slots in every layer and head.

Ranks are all that a page needs to cut at any budget as :mod:`kv_gym.budgets` does: protected tokens stay, and of the
others those of the best ranks, in each head (``uniform``) or in the whole model (one threshold, ``global``).
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kv_gym.budgets import format_budget, parse_allocation, protection_for, slots_after
from kv_gym.errors import UserError
from kv_gym.evaluation.tasks import TaskContext
from kv_gym.live import EvictingCache, PolicyGroup
from kv_gym.live.layer import EvictingLayer
from kv_gym.models.cache_name import with_cache
from kv_gym.policies import Policy

SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)  # the page's buttons
NORMALISATION = "softmax"  # how scores that heads cannot share are compared under one threshold
_OTHER = 1 / 8  # a second budget, at which a policy must score as it does at the first


@torch.no_grad()
def token_view(
    model,
    context: TaskContext,
    policies: Mapping[str, Policy],
    decode: Callable[[Sequence[int]], str],
    asked: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Read a context once and rank its slots with every policy, live.

    Args:
        model: a transformers decoder that :class:`~kv_gym.live.EvictingCache` serves.
        context: the text and its questions, which the policies do not see.
        policies: by the names that the page shows.
        decode: the text of token ids.
        asked: places of the tokens that answers are made of; None looks the answers up in the context.

    Returns:
        Plain data for the page: ``texts``, ``asked``, ``layers``, ``heads``, ``slots`` of the buttons, ``questions``,
        and for each policy ``name``, ``sinks``, ``recent``, ``rule`` (the allocation of one threshold) and ranks from
        0, best first, as base64 of unsigned little-endian numbers of ``bytes``: ``in_head`` among the tokens of a
        head, ``in_model`` among all slots; both in the order layer, head, token. Protection is left out of them.

    Raises:
        UserError: a policy that cannot run live, or one that scores differently at every budget.
    """
    group = PolicyGroup(tuple(policies.values()))
    ids = torch.tensor([context.context_ids], device=model.device)
    rankings: list[dict[str, Any]] = []
    layers = heads = 0
    with EvictingCache(model, policy=group, budget=1.0) as cache:
        model(input_ids=ids, **with_cache(cache), use_cache=True, logits_to_keep=1)
        for name, policy in policies.items():
            rule = "global" if policy.comparable else f"global:{NORMALISATION}"
            in_head = _ranks(_priorities(cache, policy, 1.0, "uniform"))
            if not torch.equal(in_head, _ranks(_priorities(cache, policy, _OTHER, "uniform"))):
                raise UserError(
                    f"policy {name} scores differently at every budget, so no one ranking tells what it keeps; leave "
                    "it out of the token view"
                )
            in_model = _priorities(cache, policy, 1.0, rule)
            layers, heads = in_model.shape[:2]
            sinks, recent = protection_for(policy, None, None)
            rankings.append(
                {"name": name, "sinks": sinks, "recent": recent, "rule": rule, "in_head": in_head,
                 "in_model": _ranks(in_model.flatten())}
            )  # fmt: skip
    size = len(context.context_ids)
    wide = {"in_head": _width(size), "in_model": _width(layers * heads * size)}
    for ranking in rankings:
        ranking |= {key: _packed(ranking[key], count) for key, count in wide.items()}
    questions = [{"question": decode(q.question_ids), "answer": decode(q.answer_ids)} for q in context.questions]
    compared = ", ".join(dict.fromkeys(str(one["rule"]) for one in rankings))
    return {
        "texts": token_texts(context.context_ids, decode),
        "asked": sorted(answer_places(context) if asked is None else asked), "layers": layers, "heads": heads,
        "bytes": wide, "policies": rankings, "questions": questions,
        "slots": [{"name": format_budget(share), "slots": slots_after(share, size)} for share in SHARES],
        "caption": (
            f"A context of {size} tokens, scored once by every policy with its questions unseen. The shade is a "
            f"token's rank among its head's, or among all slots of the model under one threshold ({compared})."
        ),
    }  # fmt: skip


def token_texts(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text of every token with the space before it: many tokenizers leave that out of a token that stands alone."""
    pairs = [list(ids[max(0, i - 1) : i + 1]) for i in range(len(ids))]
    return [decode(pair)[len(decode(pair[:-1])) :] if i else decode(pair) for i, pair in enumerate(pairs)]


def answer_places(context: TaskContext) -> set[int]:
    """Places in the context at which an answer stands, whole."""
    ids, found = list(context.context_ids), set[int]()
    for answer in {tuple(question.answer_ids) for question in context.questions}:
        for start in range(len(ids) - len(answer) + 1):
            if tuple(ids[start : start + len(answer)]) == answer:
                found.update(range(start, start + len(answer)))
    return found


def _priorities(cache: EvictingCache, policy: Policy, budget: float, allocation: str) -> Tensor:
    """What slots are kept by, without protection: `[layers, kv_heads, tokens]` int64."""
    rule = parse_allocation(allocation)
    rule.refuse_unfit(policy)
    fork = cache.fork(policy, budget, 0, 0, rule)
    scored = [layer.state.score_slots() for layer in fork.layers if isinstance(layer, EvictingLayer)]
    return torch.stack([layer.priorities[0] for layer in scored])


def _ranks(priorities: Tensor) -> Tensor:
    """Places from 0, the best first, among the last axis; ties go to the first, as in a cut."""
    order = priorities.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(priorities.shape[-1], device=priorities.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def _width(count: int) -> int:
    return 2 if count <= 2**16 else 4


def _packed(numbers: Tensor, width: int) -> str:
    return base64.b64encode(numbers.flatten().cpu().numpy().astype(f"<u{width}").tobytes()).decode()
