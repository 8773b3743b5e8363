"""Rows as a leaderboard writes them, with numbers that can be checked by hand."""

BAD_NAME = '<script>alert("owned")</script><img src=x onerror=alert(1)>|`'
VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0"}


def row(policy, budget, right, seed=None, task="multi_key 512", **more):
    """One row; `right` lists the right answers of each context, out of 4."""
    contexts = {f"context {i}": [count, 4, count * 0.5] for i, count in enumerate(right)}
    asked = 4 * len(right)
    known = {
        "cell": f"{policy} {budget} {seed} {task} {more.get('allocation')}", "policy": policy, "seed": seed,
        "budget": budget, "allocation": "uniform", "evicted": "drop", "sinks": None, "recent": None,
        "trigger": "prefill", "task": task, "n": len(right), "questions": asked, "accuracy": sum(right) / asked,
        "nll": sum(right) * 0.5 / asked, "parts": {}, "contexts": contexts, "cache_bytes": 1000 * budget,
        "policy_bytes": 0 if seed is None else 300, "milliseconds": 10 + 100 * budget, "slots": None,
        "utility_kept": None, "head_utility": None, "versions": VERSIONS, "command": "kv-gym leaderboard board.yml",
    }  # fmt: skip
    return known | more


def rows():
    """Two tasks, a learned policy of three training runs, heuristics, null hypotheses, a full cache, a bad name."""
    found = []
    for task, less in (("multi_key 512", 0), ("dialogue turns 512", 1)):
        found.append(row("full_cache", 1.0, [4, 4, 4 - less, 4], task=task))
        for share in (0.25, 0.125):
            fewer = less + (share == 0.125)
            for seed, right in enumerate(([4, 4, 3, 4], [4, 3, 4, 4], [4, 4, 4, 4])):
                grid = {"slots": [[10.0 + seed, 20.0], [30.0, 40.0]], "head_utility": [[0.9, 0.8], [0.7, 0.6]]}
                parts = {"turn 1": {"questions": 8, "correct": 8 - seed}, "turn 2": {"questions": 8, "correct": 4}}
                found.append(
                    row("joint", share, [n - fewer for n in right], seed, task, utility_kept=0.8, parts=parts, **grid)
                )
            grid = {"slots": [[25.0, 25.0], [25.0, 25.0]], "head_utility": [[0.5, 0.9], [0.7, 0.1]]}
            found.append(row("keydiff", share, [3 - fewer, 3, 2, 3], task=task, utility_kept=0.6, **grid))
            found.append(row("keydiff", share, [2, 2, 2, 2 - fewer], task=task, allocation="global:softmax"))
            found.append(row(BAD_NAME, share, [1, 2, 1, 2 - less], task=task))
            found.append(row("recency", share, [1, 0, 1, 0], task=task, utility_kept=0.3))
            found.append(row("random", share, [0, 0, 1, 0], task=task))
    return found


ABLATIONS = [
    {"variant": "everything", "budget": 0.125, "accuracy": 0.9, "interval": 0.02, "difference": 0.0},
    {"variant": "without values", "budget": 0.125, "accuracy": 0.7, "interval": [0.6, 0.75], "difference": -0.2},
]
