"""Statistics as slow loops, and rows to make them of."""

from statistics import mean, stdev


def row(policy, budget, right, seed=None, task="t", **more):
    """A row of contexts with four questions each, `right` of which are answered right."""
    contexts = {str(number): [value, 4, 0.5] for number, value in enumerate(right)}
    return {
        "policy": policy, "seed": seed, "budget": budget, "allocation": "uniform", "evicted": "drop", "task": task,
        "accuracy": sum(right) / 4 / len(right), "nll": 0.125, "n": len(right), "questions": 4 * len(right),
        "contexts": contexts, "cache_bytes": 100 * budget, "policy_bytes": 0, "milliseconds": 1.0,
    } | more  # fmt: skip


def slow_ranks(numbers):
    return [sum(y < x for y in numbers) + (1 + sum(y == x for y in numbers)) / 2 for x in numbers]


def slow_spearman(one, other):
    a, b = slow_ranks(one), slow_ranks(other)
    products = [(x - mean(a)) * (y - mean(b)) for x, y in zip(a, b, strict=True)]
    return sum(products) / ((len(a) - 1) * stdev(a) * stdev(b))


def slow_auc(scores, wanted):
    pairs = [(x, y) for x, a in zip(scores, wanted, strict=True) if a for y, b in zip(scores, wanted, strict=True)
             if not b]  # fmt: skip
    return mean(1.0 if x > y else 0.5 if x == y else 0.0 for x, y in pairs)
