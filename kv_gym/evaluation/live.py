"""Judging policies on a decoding model: compress each context before the question is known, then answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby, product

import torch

from kv_gym.budgets import Allocation, parse_allocation
from kv_gym.budgets.budget import Budget
from kv_gym.budgets.uniform import Uniform
from kv_gym.evaluation.tasks import TaskContext
from kv_gym.live import EvictingCache, Panel
from kv_gym.live.tiers import Drop, Tier, parse_tier
from kv_gym.policies import Policy, make_policy

FULL = "full_cache"


@torch.no_grad()
def answer(
    model,
    contexts: Sequence[TaskContext],
    policies: Mapping[str, Policy],
    budgets: Iterable[Budget],
    sinks: int | None = None,
    recent: int | None = None,
    rows_at_once: int = 8,
    advance: Callable[[int], None] = lambda _: None,
    allocations: Iterable[str | Allocation] = ("uniform",),
    evicted: Iterable[str | Tier] = ("drop",),
) -> list[dict]:
    """One prefill per context, forked for every policy, budget and question.

    Greedy answers are judged in one pass: decoding greedily gives the expected answer exactly when the most likely
    token after each of its prefixes is the next one, so the answer is fed whole and every argmax must be right.

    Args:
        model: a transformers decoder that :class:`EvictingCache` serves.
        contexts: what to ask; contexts of equal length that stand together are prefilled together.
        policies: by the name that rows carry.
        budgets: slots per head or shares.
        sinks, recent: protection; None means each policy's own.
        rows_at_once: contexts per prefill.
        advance: called with the number of contexts done (progress).
        allocations: who gets the slots; every policy meets every one of them.
        evicted: what becomes of evicted pairs, see :func:`kv_gym.live.tiers.parse_tier`; the same.

    Returns:
        Rows of policy, budget, allocation, evicted, task, ``accuracy`` (greedy exact match of the whole answer),
        ``nll`` (mean over questions of the mean over answer tokens, nats), ``cache_bytes`` (mean per context, all that
        the compressed cache holds), ``policy_bytes`` (weights of a learned policy) and ``n`` (questions). The full
        cache is the row named ``full_cache``.
    """
    sums: dict[tuple, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0])  # right, nll, bytes, n
    sized: dict[tuple, int] = defaultdict(int)
    budgets, rules = list(budgets), [parse_allocation(allocation) for allocation in allocations]
    # recency keeps nothing but keys, values and positions: at budget 1.0 it is the plain full cache
    tiers = [parse_tier(tier) for tier in evicted]
    arms: list[tuple[str, Policy, Budget, Allocation, Tier]] = [(FULL, make_policy("recency"), 1.0, Uniform(), Drop())]
    arms += [(name, *rest) for name, policy in policies.items() for rest in product([policy], budgets, rules, tiers)]
    for _, policy, _, rule, _ in arms:
        rule.refuse_unfit(policy)
    panel = Panel(tuple({id(arm[1]): arm[1] for arm in arms}.values()))
    # nothing is cut before the forks: these only keep the queries that some rule or tier will ask for
    curious = max((Uniform(), *rules), key=lambda rule: rule.needs_queries)
    watching = max((Drop(), *tiers), key=lambda tier: tier.sees_queries)
    for _, group in groupby(contexts, lambda context: (len(context.context_ids), context.task)):
        same = list(group)
        for start in range(0, len(same), rows_at_once):
            batch = same[start : start + rows_at_once]
            ids = torch.tensor([context.context_ids for context in batch], device=model.device)
            with EvictingCache(model, policy=panel, budget=1.0, allocation=curious, evicted=watching) as cache:
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                for name, policy, budget, rule, tier in arms:
                    place = (name, budget, rule.name, tier.name, batch[0].task)
                    with cache.fork(policy, budget, sinks, recent, rule, tier) as fork:
                        fork.compress()
                        sums[place][2] += fork.nbytes()
                        sized[place] += len(batch)
                        for right, nll in _answers(model, fork, batch):
                            sums[place][0] += right
                            sums[place][1] += nll
                            sums[place][3] += 1
            advance(len(batch))
    weights = {name: getattr(policy, "nbytes", int)() for name, policy in policies.items()}
    return [
        {"policy": name, "budget": budget, "allocation": rule, "evicted": tier, "task": task, "accuracy": right / n,
         "nll": nll / n, "cache_bytes": held / sized[name, budget, rule, tier, task],
         "policy_bytes": weights.get(name, 0), "n": int(n)}
        for (name, budget, rule, tier, task), (right, nll, held, n) in sums.items()
    ]  # fmt: skip


def _answers(model, cache: EvictingCache, batch: Sequence[TaskContext]) -> Iterable[tuple[bool, float]]:
    """Exact match and NLL of every question of a batch of contexts; the cache itself stays as it is."""
    asked = [(row, question) for row, context in enumerate(batch) for question in context.questions]
    size = lambda item: (len(item[1].question_ids), len(item[1].answer_ids))  # noqa: E731
    for (question_size, _), items in groupby(sorted(asked, key=size), size):
        same = list(items)
        ids = torch.tensor([(*q.question_ids, *q.answer_ids) for _, q in same], device=model.device)
        with cache.fork() as fork:
            fork.batch_select_indices(torch.tensor([row for row, _ in same], device=model.device))
            logits = model(input_ids=ids[:, :-1], past_key_values=fork, use_cache=True).logits
        expected = ids[:, question_size:]
        likelihood = logits[:, question_size - 1 :].float().log_softmax(-1)
        right = (likelihood.argmax(-1) == expected).all(-1)
        nll = -likelihood.gather(-1, expected[..., None])[..., 0].mean(-1)
        yield from zip(right.tolist(), nll.tolist(), strict=True)
