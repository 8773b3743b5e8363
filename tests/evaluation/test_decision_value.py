"""Decision value against slow loops in plain Python, and the figures that must not decide."""

import itertools
import json
import math
from statistics import mean, stdev

import numpy as np
import pytest
import torch
from slow_statistics import slow_auc, slow_spearman
from typer.testing import CliRunner

from kv_gym.budgets import parse_allocation
from kv_gym.cache_view import Future
from kv_gym.cli import app
from kv_gym.errors import UserError
from kv_gym.evaluation import decision_value
from kv_gym.evaluation.decision_value import MEASURES, NOT_DECISIVE, compare, decision_table, output_error
from kv_gym.evaluation.rows import read_result
from kv_gym.files import bundled
from kv_gym.policies import make_policy
from kv_gym.policies.oracle import Oracle
from kv_gym.traces.sequence import Continuation, Sequence

LAYERS, HEADS, TOKENS, DIM = 2, 2, 7, 3


def some_context(seed):
    """Two continuations, of 3 queries in blocks of 2 and of 1 query; some equal key norms, some zero attention."""
    rng = np.random.default_rng(seed)
    shape = (LAYERS, HEADS, TOKENS)
    keys, values = rng.normal(size=(2, *shape, DIM)).astype(np.float32)
    keys[:, :, 3] = keys[:, :, 1]
    continuations = []
    for queries, blocks in ((3, 2), (1, 1)):
        largest = rng.random((*shape, blocks)).astype(np.float32) ** 4 / TOKENS
        largest[:, 0, 2] = 0
        average = largest * rng.random(largest.shape).astype(np.float32)
        continuations.append(Continuation(np.zeros(queries, int), np.stack((largest, average), -1), 2))
    queries = np.zeros((LAYERS, HEADS, 1, DIM), np.float32)
    return Sequence(
        f"c{seed}", np.arange(TOKENS), keys, values, queries, tuple(continuations), (0, 1), (1.0, 1.0), task="hand"
    )


def slow_utility(context, layer, head, i):
    """Mean over continuations of the attention per query."""
    shares = [
        sum(float(c.future[layer, head, i, k, 0]) for k in range(c.future.shape[3])) / len(c.tokens)
        for c in context.continuations
    ]
    return sum(shares) / len(shares)


SCORES = {
    "knorm": lambda context, layer, head, i: -math.sqrt(sum(float(x) ** 2 for x in context.keys[layer, head, i])),
    "recency": lambda context, layer, head, i: i,
    "oracle": slow_utility,
}


def slots():
    return itertools.product(range(LAYERS), range(HEADS), range(TOKENS))


def shielded(i, budget, sinks, recent):
    """Protected slots fill half the budget at most, recent ones give way first."""
    first = min(sinks, budget // 2)
    return i < first or i >= TOKENS - min(recent, budget // 2 - first)


def slow_cut(context, name, budget, pooled, sinks=0, recent=0):
    """The set of (layer, head, token) that stay; ties go to the newer token."""
    score = {slot: np.float32(SCORES[name](context, *slot)) for slot in slots()}
    better = lambda slot: (shielded(slot[2], budget, sinks, recent), score[slot], slot[2])  # noqa: E731
    if pooled:
        return set(sorted(slots(), key=better)[-budget * LAYERS * HEADS :])
    kept = set()
    for layer, head in itertools.product(range(LAYERS), range(HEADS)):
        kept |= set(sorted([(layer, head, i) for i in range(TOKENS)], key=better)[-budget:])
    return kept


def slow_error(context, kept):
    """Sum over heads of the output's error, divided by that of its norm."""
    lost = whole = 0.0
    for layer, head in itertools.product(range(LAYERS), range(HEADS)):
        for c in context.continuations:
            for k, queries in enumerate(c.block_queries):
                share = queries / len(c.tokens) / len(context.continuations)
                w = [float(c.future[layer, head, i, k, 1]) / queries for i in range(TOKENS)]
                v = context.values[layer, head].astype(float)
                stays = [i for i in range(TOKENS) if (layer, head, i) in kept]
                evicted = [i for i in range(TOKENS) if i not in stays]
                left = sum(w[i] for i in stays)
                of_kept = sum((w[i] * v[i] for i in stays), np.zeros(DIM)) / left if left else np.zeros(DIM)
                error = sum((w[i] * v[i] for i in evicted), np.zeros(DIM)) - sum(w[i] for i in evicted) * of_kept
                lost += share * math.sqrt(sum(error**2))
                whole += share * math.sqrt(sum(sum(w[i] * v[i] for i in range(TOKENS)) ** 2))
    return lost / whole


def slow_measures(context, name, baseline, budget, pooled, *ends):
    ours, theirs, best = (slow_cut(context, who, budget, pooled, *ends) for who in (name, baseline, "oracle"))
    utility = {slot: slow_utility(context, *slot) for slot in slots()}
    kept = lambda which: sum(utility[slot] for slot in which)  # noqa: E731
    total = kept(slots())
    heads = list(itertools.product(range(LAYERS), range(HEADS)))
    groups = [list(slots())] if pooled else [[(*head, i) for i in range(TOKENS)] for head in heads]
    groups = [[slot for slot in group if not shielded(slot[2], budget, *ends)] for group in groups]
    score = {slot: np.float32(SCORES[name](context, *slot)) for slot in slots()}
    return {
        "gain_per_slot": (kept(ours) - kept(theirs)) / len(ours),
        "gain": (kept(ours) - kept(theirs)) / total,
        "changed_slots": len(ours - theirs) / len(ours),
        "changed_heads": mean(any(slot[:2] == head for slot in ours ^ theirs) for head in heads),
        "changed_contexts": float(ours != theirs),
        "output_error": slow_error(context, ours),
        "output_error_change": slow_error(context, ours) - slow_error(context, theirs),
        "regret": (kept(best) - kept(ours)) / total,
        "spearman": mean(slow_spearman([score[s] for s in g], [utility[s] for s in g]) for g in groups),
        "auc": mean(slow_auc([score[s] for s in g], [s in best for s in g]) for g in groups),
        "utility_kept": kept(ours) / total,
    }


@pytest.mark.parametrize("ends", [(0, 0), (1, 1)], ids=["open", "protected"])
@pytest.mark.parametrize(("allocation", "pooled"), [("uniform", False), ("global:raw", True)])
def test_rows_equal_slow_loops(allocation, pooled, ends):
    contexts = [some_context(seed) for seed in range(3)]
    policies = {name: make_policy(name) for name in SCORES}
    rows = compare(policies, ("knorm", make_policy("knorm")), contexts, [2, 4], *ends, [allocation])
    assert len(rows) == 2 * len(policies)
    for row in rows:
        assert (row["allocation"], row["baseline"], row["task"], row["n"]) == (allocation, "knorm", "hand", 3)
        assert row["kept_share"] == pytest.approx(row["budget"] / TOKENS)
        slow = [slow_measures(c, row["policy"], "knorm", row["budget"], pooled, *ends) for c in contexts]
        for name in (*MEASURES, *NOT_DECISIVE):
            told = row["not_decisive"] if name in NOT_DECISIVE else row
            values = [one[name] for one in slow]
            assert told[name] == pytest.approx(mean(values), abs=1e-6), (row["policy"], row["budget"], name)
            half = 4.302653 * stdev(values) / math.sqrt(3)
            assert told[f"{name}_interval"] == pytest.approx(half, abs=1e-5), (row["policy"], row["budget"], name)


def test_the_baseline_against_itself_is_exactly_nothing():
    policies = {name: make_policy(name) for name in ("knorm", "random")}
    for name, policy in policies.items():
        (row,) = compare({name: policy}, (name, policy), [some_context(0), some_context(1)], [3], sinks=1, recent=1)
        same = ("gain_per_slot", "gain", "changed_slots", "changed_heads", "changed_contexts", "output_error_change")
        assert [row[measure] for measure in same] == [0.0] * len(same)
        assert [row[f"{measure}_interval"] for measure in same] == [0.0] * len(same)
        assert row["output_error"] > 0 and row["regret"] > 0


def test_an_oracle_regrets_nothing_and_nothing_evicted_is_no_error():
    baseline = ("knorm", make_policy("knorm"))
    rows = compare({"oracle": make_policy("oracle")}, baseline, [some_context(4)], [1, 3, 1.0])
    assert [row["regret"] for row in rows] == [0.0] * 3
    assert [row["not_decisive"]["spearman"] for row in rows] == pytest.approx([1.0] * 3)
    assert [row["not_decisive"]["auc"] for row in rows[:2]] == [1.0] * 2
    whole = rows[2]
    assert whole["output_error"] == 0.0 and whole["gain"] == 0.0
    assert whole["not_decisive"]["auc"] is None, "all slots are kept: there is nobody to rank below them"
    assert whole["gain_interval"] is None, "one context tells nothing of the spread"


def test_a_better_prediction_can_be_the_worse_action():
    """Ten slots, two are kept: ranking eight worthless ones well is worth nothing, missing the best one is."""
    utility = np.array([0.6, 0.05, 0.04, 0.03, 0.02, 0.01, 0.01, 0.01, 0.01, 0.01], np.float32)
    future = np.stack((utility, utility), -1)[None, None, :, None]
    order = {
        "predictor": [7, 8, 9, 6, 5, 4, 3, 2, 1, 0],  # one swap of the best with middling ones, the rest in order
        "actor": [9, 0, 1, 2, 3, 4, 5, 6, 7, 8],  # the best first, and all others upside down
    }
    keys = {name: np.zeros((1, 1, 10, 1), np.float32) for name in order}
    for name, scores in order.items():
        keys[name][..., 0] = 10 - np.array(scores)  # knorm keeps small keys
    values = np.ones((1, 1, 10, 1), np.float32)
    queries = np.zeros((1, 1, 1, 1), np.float32)
    told = {}
    for name in order:
        context = Sequence(
            name, np.arange(10), keys[name], values, queries, (Continuation(np.zeros(1, int), future, 1),), (0,), (1.0,)
        )
        (told[name],) = compare({"knorm": make_policy("knorm")}, ("recency", make_policy("recency")), [context], [2])
    # by hand: kept are {1, 2} and {0, 9}; the baseline keeps {8, 9}; the oracle {0, 1}, which is .65 of .79
    assert told["predictor"]["gain"] == pytest.approx((0.09 - 0.02) / 0.79, abs=1e-6)
    assert told["actor"]["gain"] == pytest.approx((0.61 - 0.02) / 0.79, abs=1e-6)
    assert told["predictor"]["not_decisive"]["auc"] == pytest.approx((6 + 8) / 16)
    assert told["actor"]["not_decisive"]["auc"] == pytest.approx((8 + 0) / 16)
    assert told["predictor"]["regret"] > told["actor"]["regret"]


def test_output_error_by_hand():
    # one head, one block: w = .5, .25, .25 and v = 4, 0, -4; without the last: .5 * 4 * (1 / .75) = 8/3 instead of 1
    future = Future(torch.tensor([0.5, 0.25, 0.25])[None, None, :, None, None].expand(1, 1, 3, 1, 2), torch.ones(1))
    values = torch.tensor([4.0, 0.0, -4.0])[None, None, :, None]
    error, norm = output_error(future, values, torch.tensor([[[True, True, False]]]))
    assert (error.item(), norm.item()) == pytest.approx((5 / 3, 1.0))
    error, norm = output_error(future, values, torch.zeros(1, 1, 3, dtype=torch.bool))
    assert (error.item(), norm.item()) == pytest.approx((1.0, 1.0)), "a head that keeps nothing loses all"


def test_output_error_is_exact_for_a_lone_query():
    """What the formula says is what a softmax over the kept slots really gives."""
    generator = torch.Generator().manual_seed(0)
    logits, values = torch.randn(1, 2, 9, generator=generator), torch.randn(1, 2, 9, 4, generator=generator)
    kept = torch.rand(1, 2, 9, generator=generator) < 0.5
    weights = logits.softmax(-1)
    error, norm = output_error(Future(weights[..., None, None].expand(1, 2, 9, 1, 2), torch.ones(1)), values, kept)
    full = (weights[..., None] * values).sum(2)
    cut = (logits.masked_fill(~kept, -torch.inf).softmax(-1)[..., None] * values).sum(2)
    torch.testing.assert_close(error, (full - cut).norm(dim=-1)[0].double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm, full.norm(dim=-1)[0].double(), rtol=1e-5, atol=1e-6)


def test_rows_are_a_table_and_a_file(tmp_path):
    data = decision_value(
        ["keydiff", "oracle"], "recency", None, ["1/4"], split=None, json=tmp_path / "value.json", progress=False
    )
    assert json.loads((tmp_path / "value.json").read_text()) == json.loads(json.dumps(data))
    assert {row["task"] for row in data["rows"]} == {"multi_key", "dialogue"} and data["baseline"] == "recency"
    table = decision_table(data["rows"])
    assert all(f"\n| oracle ({task}) | uniform | 1/4 |" in table for task in ("dialogue", "multi_key"))
    assert "(AUC)" in table and "no ground to choose by" in table and "recency (uniform)" in table


def test_the_case_on_the_sample_that_the_docstring_tells():
    rows = decision_value(["keydiff", "streaming_llm"], "recency", None, ["1/2"], split=None, progress=False)["rows"]
    keydiff, streaming = (
        next(row for row in rows if row["policy"] == name and row["task"] == "multi_key")
        for name in ("keydiff", "streaming_llm")
    )
    assert streaming["not_decisive"]["auc"] > keydiff["not_decisive"]["auc"] + 0.02
    assert keydiff["gain"] > streaming["gain"] + 0.1 and keydiff["regret"] < streaming["regret"]


def test_the_command_needs_traces(tmp_path):
    run = lambda *options: CliRunner().invoke(app, ["evaluate", "--decision-value", "recency", *options])  # noqa: E731
    asked = ["--policies", "oracle", "--budgets", "1/4", "--no-progress"]
    done = run(*asked, "--traces", str(bundled("traces")), "--split", "all", "--json", str(tmp_path / "value.json"))
    assert done.exit_code == 0 and "| oracle (dialogue) | uniform | 1/4 |" in done.output
    assert len(read_result(tmp_path / "value.json")["rows"]) == 2
    refused = run(*asked, "--model", "reference")
    assert isinstance(refused.exception, UserError) and "give --traces" in str(refused.exception)


def test_the_baseline_may_have_an_allocation_of_its_own():
    contexts = [some_context(2)]
    policies = {"oracle": Oracle()}
    with pytest.raises(UserError, match="not comparable across heads"):
        compare(policies, ("knorm", make_policy("knorm")), contexts, [2], allocations=["global"])
    (row,) = compare(
        policies, ("knorm", make_policy("knorm")), contexts, [2], allocations=[parse_allocation("global")],
        baseline_allocation="uniform",
    )  # fmt: skip
    ours, theirs = slow_cut(contexts[0], "oracle", 2, True), slow_cut(contexts[0], "knorm", 2, False)
    assert row["changed_slots"] == len(ours - theirs) / len(ours) and row["baseline_allocation"] == "uniform"


def test_what_cannot_be_judged_is_refused():
    bare = some_context(0)
    bare = Sequence(
        "bare", *(getattr(bare, n) for n in ("tokens", "keys", "values", "queries")), (), (0, 1), (1.0, 1.0)
    )
    with pytest.raises(UserError, match="no continuations"):
        compare({"knorm": make_policy("knorm")}, ("knorm", make_policy("knorm")), [bare], [2])
    with pytest.raises(UserError, match="no context in split"):
        decision_value(["knorm"], "knorm", None, [2], split="none", progress=False)
