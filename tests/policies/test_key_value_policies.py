"""Policies that read keys and values, or another policy's scores: hand-sized examples and slow references."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from slow_attention import slow_attention

from kv_gym import CacheView, list_policies, make_policy
from kv_gym.cache_view import Future
from kv_gym.errors import UserError
from kv_gym.evaluation.measure import replay
from kv_gym.policies import critical_kv, graph_kv
from kv_gym.policies.scoring.block_schedule import observe_blocks
from kv_gym.policies.wrapper import PolicyWrapper
from kv_gym.testing import check_policy
from kv_gym.traces.sequence import Continuation, Sequence

NAMES = [name for name in list_policies() if name != "scorer"]  # the learned one says it of its settings


def normal(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def one_head(keys, values=None, **rest):
    """A view of one head with these keys and values, rows of numbers (or numbers, where there is one channel)."""
    wide = lambda rows: torch.tensor(rows, dtype=torch.float32).reshape(1, 1, len(rows), -1)  # noqa: E731
    return CacheView.of(wide(keys), wide(keys if values is None else values), **rest)


def paying(weights, values, **rest):
    """A view of one head whose last query pays these weights: keys are the unit vectors, the query their logarithms."""
    n = len(weights)
    query = torch.tensor(weights).log().reshape(1, 1, 1, n)
    values = torch.tensor(values, dtype=torch.float32).reshape(1, 1, n, -1)
    return CacheView.of(torch.eye(n)[None, None], values, queries=query, scaling=1.0, **rest)


def ragged(query_heads=2, m=4, d=4, seed=1):
    """Two rows, two KV heads that hold different tokens in no order, padding."""
    positions = torch.tensor(
        [
            [[11, 1, 2, 5, 15, 10, 0, 12, 14, 8], [0, 15, 4, 9, 10, 11, 13, 3, -1, -1]],
            [[2, 8, 5, 6, 7, 4, -1, -1, -1, -1], [8, 1, 3, 0, -1, -1, -1, -1, -1, -1]],
        ]
    )
    return CacheView(
        keys=normal(seed, 2, 2, 10, d),
        values=normal(seed + 1, 2, 2, 10, d),
        positions=positions,
        valid=positions >= 0,
        seen=torch.tensor([16, 9]),
        budget=torch.tensor([[4, 6], [3, 2]]),
        queries=normal(seed + 2, 2, query_heads, m, d),
    )


def heads_of(view):
    """Row, head and its valid slots, oldest first."""
    for b, h in np.ndindex(*view.positions.shape[:2]):
        slots = [i for i in range(view.positions.shape[2]) if view.valid[b, h, i]]
        yield b, h, sorted(slots, key=lambda i: int(view.positions[b, h, i]))


def close(scores, expected, view, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(scores[view.valid].numpy(), expected[view.valid.numpy()], rtol=rtol, atol=atol)
    return True


@dataclass(frozen=True)
class Given(PolicyWrapper):
    """A base that scores by the layer input's first channel: whatever a test wants."""

    over: str = "recency"
    window: int = 0

    @property
    def protection(self):
        return 0, self.window

    def score(self, view):
        return view.hidden[:, None, :, 0].expand(view.positions.shape)


def given(scores, view, window=0):
    return Given(window=window), replace(view, hidden=torch.tensor(scores, dtype=torch.float32).reshape(1, -1, 1))


# -- keys and values alone ---------------------------------------------------------------------------------------


def test_value_norm_keeps_the_largest_values():
    view = one_head([[9, 9]] * 4, [[1, -2], [2, 2], [0, 0.5], [-3, 0]])
    assert make_policy("value_norm").score(view).flatten().tolist() == [3.0, 4.0, 0.5, 3.0]


def test_lagkv_ranks_deviations_in_a_chunk_on_the_scale_of_the_next():
    # one sink; chunks of two: tokens 1-2 on the scale of 3-4, 3-4 on that of 5-6; 5-6 and 7 have no reference yet
    keys = [[9, 9], [0, 4], [1, 2], [0, 0], [2, 4], [0, 0], [1, 1], [5, 5]]
    # chunk 1 over (min 0, 0; max 2, 4): (0, 1) and (.5, .5), so token 1 deviates, token 2 not at all
    # chunk 2 over (min 0, 0; max 1, 1): (0, 0) and (2, 4), so token 4 deviates
    policy = make_policy("lagkv", lag=2, first=1)
    scores = policy.score(one_head(keys, [[1, 1]] * 8))  # values are constant and say nothing
    assert scores.flatten().tolist() == [1.0, 0.5, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]
    assert policy.protection == (1, 2)


def slow_lagkv(view, lag, first):
    expected = np.ones(view.positions.shape)
    for b, h, slots in heads_of(view):
        body = [i for i in slots if view.positions[b, h, i] >= first]
        chunks = [body[c : c + lag] for c in range(0, len(body) - lag + 1, lag)]
        for chunk, reference in pairwise(chunks):
            total = np.zeros(lag)
            for states in (view.keys[b, h].double().numpy(), view.values[b, h].double().numpy()):
                low, high = states[reference].min(0), states[reference].max(0)
                scaled = (states[chunk] - low) / np.maximum(high - low, 1e-6)
                deviation = np.exp(scaled.std(1, ddof=1) - scaled.std(1, ddof=1).max())
                total += deviation / deviation.sum()
            for place, i in enumerate(np.argsort(total, kind="stable")):
                expected[b, h, chunk[i]] = place / lag
    return expected


@pytest.mark.parametrize(("lag", "first"), [(2, 0), (3, 1), (4, 2), (5, 0)])
def test_lagkv_equals_loops_over_chunks(lag, first):
    view = ragged()
    policy = make_policy("lagkv", lag=lag, first=first)
    assert close(policy.score(view), slow_lagkv(view, lag, first), view)
    assert check_policy(policy, tokens=23) is None


def test_expected_attention_by_hand():
    # queries 0 and 2 have mean 1 and variance 1, so the exponent of key k is k + k * k / 2
    view = one_head(
        [0.0, 1.0, -1.0], [3.0, 1.0, 2.0], queries=torch.tensor([0.0, 2.0]).reshape(1, 1, 2, 1), scaling=1.0
    )
    weights = [math.exp(x) for x in (0.0, 1.5, -0.5)]
    expected = [norm * w / sum(weights) for norm, w in zip((3, 1, 2), weights, strict=True)]  # .49, .73, .20
    assert make_policy("expected_attention").score(view).flatten().tolist() == pytest.approx(expected)
    plain = make_policy("expected_attention", covariance=False, value_norm=False).score(view)
    weights = [math.exp(x) for x in (0.0, 1.0, -1.0)]
    assert plain.flatten().tolist() == pytest.approx([w / sum(weights) for w in weights])


@pytest.mark.parametrize("window", [3, 12])
def test_expected_attention_equals_the_formula_with_matrices(window):
    view = replace(ragged(4, m=12), scaling=0.7)
    expected = np.zeros(view.positions.shape)
    for b, h, slots in heads_of(view):
        there = min(window, int(view.seen[b]))  # the second row has seen 9 tokens, so 9 of its 12 queries are real
        for query_head in (2 * h, 2 * h + 1):
            queries = view.queries[b, query_head, -there:].double().numpy()
            mu, sigma = queries.mean(0), np.cov(queries.T, bias=True)
            keys = view.keys[b, h].double().numpy()
            z = {i: 0.7 * keys[i] @ mu + 0.49 * keys[i] @ sigma @ keys[i] / 2 for i in slots}
            total = sum(math.exp(x) for x in z.values())
            for i in slots:
                norm = math.hypot(*view.values[b, h, i].tolist())
                expected[b, h, i] += (math.exp(z[i]) / total + 0.01) * norm / 2
    assert close(make_policy("expected_attention", window=window, epsilon=0.01).score(view), expected, view)


# -- the change of the attention output --------------------------------------------------------------------------


def test_caote_by_hand():
    # output 3; odds 1, 1/3, 1/3; distances 3, 1, 5
    view = paying([0.5, 0.25, 0.25], [0.0, 4.0, 8.0])
    base = make_policy("snapkv", window=1, kernel=1)
    assert make_policy("caote", over=base).score(view).flatten().tolist() == pytest.approx([3, 1 / 3, 5 / 3])
    # mean value 4: distances 4, 0, 4
    assert make_policy("fast_caote", over=base).score(view).flatten().tolist() == pytest.approx([4, 0, 4 / 3])


def output_change(view, b, h, query, gone):
    """How far one query's attention output moves when the slots `gone` leave, by attending twice."""
    outputs = []
    for valid in (view.valid[b, h].numpy(), [bool(v) and i not in gone for i, v in enumerate(view.valid[b, h])]):
        at = int(view.seen[b]) - view.queries.shape[2] + query
        weights = slow_attention(
            view.queries[b, h, query].numpy(), view.keys[b, h].numpy(), at, view.positions[b, h].numpy(), valid
        )
        outputs.append(np.array(weights) @ view.values[b, h].double().numpy())
    return np.linalg.norm(outputs[0] - outputs[1])


def test_caote_is_the_exact_change_of_the_output_when_a_token_goes():
    view = ragged(2, m=1)
    expected = np.zeros(view.positions.shape)
    for b, h, slots in heads_of(view):
        for i in slots:
            expected[b, h, i] = output_change(view, b, h, 0, {i})
    policy = make_policy("caote", over=make_policy("snapkv", window=1, kernel=1))
    assert close(policy.score(view), expected, view)
    # of a single query, and so of every query of a window: DropKV is the square
    dropkv = make_policy("dropkv", window=1, kernel=1)
    assert close(dropkv.score(view), expected**2, view, rtol=1e-4)
    assert close(dropkv.score(view), policy.score(view).numpy() ** 2, view, rtol=1e-4)


def test_dropkv_sums_over_the_window_and_averages_the_group():
    view = ragged(4, m=3)
    per_query_head = np.zeros((2, 4, 10))
    for b, h, slots in heads_of(view):
        for query_head in (2 * h, 2 * h + 1):
            alone = replace(view, queries=view.queries[:, [query_head] * 2])  # as if it were the only one
            for i in slots:
                changes = [output_change(alone, b, h, query, {i}) for query in range(3)]
                per_query_head[b, query_head, i] = sum(change**2 for change in changes)
    expected = per_query_head.reshape(2, 2, 2, 10).mean(2)
    assert close(make_policy("dropkv", window=3, kernel=1).score(view), expected, view, rtol=1e-4)
    pooled = np.zeros_like(expected)
    for b, h, slots in heads_of(view):
        for place, i in enumerate(slots):
            pooled[b, h, i] = sum(expected[b, h, j] for j in slots[max(0, place - 1) : place + 2]) / 3
    assert close(make_policy("dropkv", window=3, kernel=3).score(view), pooled, view, rtol=1e-4)


def test_dropkv_of_a_token_that_takes_all_attention_is_no_noise():
    # the newest query pays the first token all but 1e-7: without it the output moves from 1 to 5
    view = paying([1 - 1e-7, 0.5e-7, 0.5e-7], [[1.0, 1.0], [5.0, 5.0], [5.0, 5.0]])
    scores = make_policy("dropkv", window=1, kernel=1).score(view).flatten()
    assert scores[1:].max() < 1e-10 and scores[0] < 2 * 4**2


# -- over another score ------------------------------------------------------------------------------------------


def test_graph_kv_by_hand():
    # scores .4 .3 .2 .1; the two sources, 0 and 1, lower their nearest neighbour: 2 is .8 like 0, 3 is .6 like 1
    base, view = given([0.4, 0.3, 0.2, 0.1], one_head([[1, 0, 0], [0, 2, 0], [8, 0, 6], [0, 3, 4]], budget=4))
    policy = make_policy("graph_kv", over=base, sources=0.5, neighbours=1)
    assert policy.score(view).flatten().tolist() == pytest.approx([0.4, 0.3, 0.2 * (1 - 0.8), 0.1 * (1 - 0.6)])
    # one source of two neighbours: 0 lowers 2, and 1 by nothing, since their keys are at right angles
    one = make_policy("graph_kv", over=base, sources=0.25, neighbours=2)
    assert one.score(view).flatten().tolist() == pytest.approx([0.4, 0.3, 0.04, 0.1])
    # every token a source, all of them neighbours: 0 and 2 lower each other, and 2 and 3 (.48)
    every = make_policy("graph_kv", over=base, sources=1.0, neighbours=3)
    expected = [0.4 * 0.2, 0.3 * 0.4, 0.2 * 0.2 * 0.52, 0.1 * 0.4 * 0.52]
    assert every.score(view).flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("chunk", [1, 60, 2**22])
def test_graph_kv_equals_loops_whatever_the_chunk(chunk, monkeypatch):
    monkeypatch.setattr(graph_kv, "CHUNK", chunk)
    view, expected = ragged(), np.zeros((2, 2, 10))
    base = make_policy("value_norm")
    for b, h, slots in heads_of(view):
        scores = {i: float(view.values[b, h, i].abs().sum()) for i in slots}
        keys = view.keys[b, h].double().numpy()
        sources = sorted(slots, key=lambda i: -scores[i])[: max(1, int(view.budget[b, h] * 0.5))]
        for i in slots:
            expected[b, h, i] = scores[i]
        for source in sources:
            cosine = {
                j: keys[source] @ keys[j] / np.linalg.norm(keys[source]) / np.linalg.norm(keys[j])
                for j in slots if j != source
            }  # fmt: skip
            for j in sorted(cosine, key=lambda j: -cosine[j])[:2]:
                expected[b, h, j] *= 1 - max(0.0, cosine[j])
    assert close(make_policy("graph_kv", over=base, sources=0.5, neighbours=2).score(view), expected, view)


def test_critical_kv_by_hand():
    # values times W: |1| + |1|, |4| + |0|, |0| + |8|, |2| + |2|; budget 2, so the base chooses one token: the first
    output = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    view = one_head([[0, 0]] * 4, [[1, 0.5], [4, 0], [0, 4], [2, 1]], budget=2, output=output)
    base, view = given([0.4, 0.3, 0.2, 0.1], view)
    scores = make_policy("critical_kv", over=base, epsilon=0.0).score(view).flatten().tolist()
    # stage 2: .4 * 2, .3 * 4, .2 * 8, .1 * 4 = .8, 1.2, 1.6, .4, over the largest
    assert scores == pytest.approx([3.0, 0.75, 1.0, 0.25])
    every = make_policy("critical_kv", over=base, first_stage=0.0, epsilon=0.1).score(view).flatten().tolist()
    assert every == pytest.approx([1.0 / 2.4, 1.6 / 2.4, 1.0, 0.8 / 2.4])


def test_critical_kv_counts_what_the_base_protects_in_its_first_stage():
    view = one_head([[0, 0]] * 4, budget=2, output=torch.ones(1, 2, 2))
    base, view = given([0.4, 0.3, 0.2, 0.1], view, window=1)
    scores = make_policy("critical_kv", over=base).score(view).flatten()
    assert scores[3] > 2 and scores[:3].max() <= 1


@pytest.mark.parametrize("chunk", [1, 100, 2**22])
def test_projected_norm_is_the_mean_over_query_heads_of_l1_norms(chunk, monkeypatch):
    monkeypatch.setattr(critical_kv, "CHUNK", chunk)
    values, output = normal(1, 2, 2, 5, 4), normal(2, 6, 4, 7)
    expected = np.zeros((2, 2, 5))
    for b, h, i in np.ndindex(2, 2, 5):
        for query_head in range(3 * h, 3 * h + 3):
            expected[b, h, i] += np.abs(values[b, h, i].numpy() @ output[query_head].numpy()).sum() / 3
    np.testing.assert_allclose(critical_kv.projected_norm(values, output).numpy(), expected, rtol=1e-5)


def test_critical_kv_without_the_projection_is_refused_in_one_sentence():
    with pytest.raises(UserError, match="'critical_kv' weighs values by the output projection, which is not kept here"):
        make_policy("critical_kv", over="knorm").score(ragged())


@pytest.mark.parametrize("name", ["caote", "fast_caote", "graph_kv", "critical_kv"])
@pytest.mark.parametrize("base", ["h2o", "keydiff", "tova", "oracle", "caote"])
def test_a_policy_over_any_other_keeps_the_contract(name, base):
    policy, own = make_policy(name, over=base), make_policy(base)
    assert check_policy(policy, tokens=17) is None
    assert (policy.needs_queries, policy.protection) == (own.needs_queries, own.protection)
    assert (policy.needs_future, policy.needs_output) == (own.needs_future, name == "critical_kv")
    assert policy.comparable == (name == "graph_kv" and own.comparable)
    assert policy.statistics == own.statistics and (policy.statistics == "h2o") == (base == "h2o")


def test_bases_are_named_by_anything_that_names_a_policy():
    assert make_policy("caote", over="h2o") == make_policy("caote", over=make_policy("h2o"))
    assert make_policy("caote", over="h2o") != make_policy("caote", over="tova")
    with pytest.raises(UserError, match="unknown policy 'h20'; did you mean 'h2o'"):
        make_policy("caote", over="h20")


def test_negative_scores_of_a_head_become_their_softmax():
    base, view = given([-1.0, 0.0, 1.0], one_head([0.0, 0.0, 0.0]))
    weights = [math.exp(x) for x in (-1, 0, 1)]
    scores = Given(over=base).base_scores(replace(view, valid=torch.tensor([[[True, True, True]]])))
    assert scores.flatten().tolist() == pytest.approx([w / sum(weights) for w in weights])
    padded = Given(over=base).base_scores(replace(view, valid=torch.tensor([[[True, True, False]]])))
    assert padded.flatten().tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e), 0])
    nothing = Given(over=base).base_scores(replace(view, valid=torch.zeros(1, 1, 3, dtype=torch.bool)))
    assert nothing.flatten().tolist() == [0, 0, 0]


def test_the_state_is_the_bases_own():
    view = CacheView.of(normal(1, 1, 2, 9, 4), normal(2, 1, 2, 9, 4))
    queries, h2o = normal(3, 1, 4, 9, 4), make_policy("h2o")
    state = observe_blocks(h2o, view, queries, h2o.initial_state(view), 4)
    over = make_policy("graph_kv", over="h2o")
    observed = observe_blocks(over, view, queries, over.initial_state(view), 4)
    assert set(observed) == {"mass"} and torch.equal(observed["mass"], state["mass"])
    stateless = make_policy("graph_kv", over="knorm")
    assert stateless.initial_state(view) == {} == observe_blocks(stateless, view, queries, {})


def recorded(stats):
    """A recorded context of one layer and head; `mass` orders its tokens 2, 0, 1, 3."""
    keys = np.eye(4, dtype=np.float32)[None, None]
    future = np.zeros((1, 1, 4, 1, 2), np.float32)
    future[..., 0] = np.array([0.1, 0.2, 0.3, 0.4])[None, None, :, None]
    mass = np.array([[[0.3, 0.2, 0.4, 0.1]]], np.float32)
    continuation = Continuation(np.zeros(1, int), future, 1)
    named = {"h2o": {"mass": mass}} if stats else {}
    return Sequence("a", np.arange(4), keys, keys, keys[:, :, :1], (continuation,), (0,), (1.0,), stats=named)


def test_replay_reads_the_statistics_of_the_base():
    # keys at right angles: GraphKV changes nothing, so H2O's two best stay, tokens 2 and 0
    rows = replay({"g": make_policy("graph_kv", over="h2o")}, [recorded(True)], [2], sinks=0, recent=0)
    assert rows[0]["utility_kept"] == pytest.approx(0.4)
    with pytest.raises(UserError, match="no statistics of policy 'h2o': record with --stats h2o"):
        replay({"g": make_policy("graph_kv", over="h2o")}, [recorded(False)], [2])
    # over a policy without memory there is nothing to record, and nothing is asked for: the newest two stay
    rows = replay({"g": make_policy("graph_kv", over="recency")}, [recorded(False)], [2])
    assert rows[0]["utility_kept"] == pytest.approx(0.7)


# -- oracles -----------------------------------------------------------------------------------------------------


def seen_future(attention, weights, starts=None, values=None, **rest):
    """A view of one head whose later blocks pay `attention [blocks][tokens]`."""
    paid = torch.tensor(attention, dtype=torch.float32).T[None, None, :, :, None].expand(-1, -1, -1, -1, 2)
    n = paid.shape[2]
    future = Future(paid, torch.tensor(weights), None if starts is None else torch.tensor(starts))
    return one_head([0.0] * n, [0.0] * n if values is None else values, future=future, **rest)


def test_blocks_are_numbered_within_their_continuation():
    future = Future(torch.zeros(1, 1, 1, 5, 2), torch.full((5,), 0.2))
    assert future.block_numbers.tolist() == [0, 1, 2, 3, 4]
    starts = torch.tensor([True, False, True, True, False])
    assert replace(future, starts=starts).block_numbers.tolist() == [0, 1, 0, 0, 1]


def test_a_recorded_context_says_where_continuations_start():
    future = np.ones((1, 1, 2, 2, 2), np.float32)
    parts = (Continuation(np.zeros(3, int), future, 2), Continuation(np.zeros(2, int), future[:, :, :, :1], 2))
    keys = np.zeros((1, 1, 2, 2), np.float32)
    seen = Sequence("a", np.arange(2), keys, keys, keys, parts, (0,), (1.0,)).future(0)
    assert seen.starts.tolist() == [True, False, True] and seen.weights.tolist() == pytest.approx([1 / 3, 1 / 6, 1 / 2])


def test_golden_counts_the_blocks_that_remain():
    view = seen_future([[0.9, 0.1, 0.2], [0.2, 0.4, 0.1], [0.3, 0.1, 0.8]], [0.25, 0.25, 0.5], [True, False, True])
    assert make_policy("golden").score(view).flatten().tolist() == pytest.approx([0.9, 0.4, 0.8])
    # before block 1 of each continuation only the middle one is left
    assert make_policy("golden", block=1).score(view).flatten().tolist() == pytest.approx([0.2, 0.4, 0.1])
    assert make_policy("golden", block=2).score(view).flatten().tolist() == [0, 0, 0]
    with pytest.raises(UserError, match="block=-1"):
        make_policy("golden", block=-1)


def test_next_use_waits_until_the_first_request():
    # two continuations of equal weight, of blocks (.3, .2) and (.5); a request is .25 or more
    attention = [[0.5, 0.1, 0.1, 0.2], [0.0, 0.3, 0.1, 0.2], [0.1, 0.1, 0.25, 0.1]]
    view = seen_future(attention, [0.3, 0.2, 0.5], [True, False, True])
    # 0: at once, then never (.5); 1: after .3, then never; 2: never (.5), then at once; 3: never
    expected = [-0.5, -0.8, -0.5, -1.0]
    assert make_policy("next_use", threshold=0.25).score(view).flatten().tolist() == pytest.approx(expected)
    assert make_policy("next_use").score(view).flatten().tolist() == pytest.approx(expected)  # an even share of four
    one = replace(view, future=replace(view.future, starts=None))
    # as one continuation: at once; after .3; after .5; never
    assert make_policy("next_use").score(one).flatten().tolist() == pytest.approx([0, -0.3, -0.5, -1])


def slow_greedy(attention, values, weights):
    """Tokens in the order in which they go, by the definition of the error of the set that is gone."""
    attention, values = np.array(attention, float), np.array(values, float)
    means = [(block[:, None] * values).sum(0) / block.sum() for block in attention]
    gone = []
    while len(gone) < len(values):
        errors = {}
        for j in set(range(len(values))) - set(gone):
            out = [*gone, j]
            errors[j] = sum(
                weight * np.sum(sum(block[i] * (mean - values[i]) for i in out) ** 2) / (1 - block[out].sum()) ** 2
                for block, mean, weight in zip(attention, means, weights, strict=True)
            )
        gone.append(min(errors, key=errors.get))
    return gone


def test_greedy_error_by_hand():
    # one block reads 0, 2 and 2 with .4, .2 and .3, so 10/9 in the mean: of the two equal values the lighter goes
    # first (.2 * 8/9 over .8), then the heavier would move it more than 0 itself, which weighs .4 * 10/9:
    # {1, 2}: -.5 * 8/9 / .5 = -.89, {1, 0}: (.4 * 10/9 - .2 * 8/9) / .4 = .67
    view = seen_future([[0.4, 0.2, 0.3]], [1.0], values=[0.0, 2.0, 2.0])
    assert make_policy("greedy_error").score(view).flatten().tolist() == [-1, -2, 0]


@pytest.mark.parametrize("seed", range(4))
def test_greedy_error_equals_the_definition(seed):
    random = np.random.RandomState(seed)
    attention = random.dirichlet(np.ones(9), 3)[:, :8]  # the ninth share goes to the continuation's own tokens
    values, weights = random.standard_normal((8, 3)), [0.5, 0.3, 0.2]
    view = seen_future(attention, weights, values=values.tolist())
    gone = slow_greedy(attention, values, weights)
    scores = make_policy("greedy_error").score(view).flatten().tolist()
    assert scores == [gone.index(i) - 7 for i in range(8)]


# -- what a class says of itself ---------------------------------------------------------------------------------

STATIC = [name for name in NAMES if make_policy(name).static]


def test_who_is_static():
    assert set(STATIC) >= {"knorm", "value_norm", "recency", "streaming_llm", "random"}
    assert not set(STATIC) & {"keydiff", "lagkv", "h2o", "snapkv", "caote", "expected_attention"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STATIC)
def test_static_scores_are_the_same_to_the_digit_alone_and_later(name, dtype):
    policy = make_policy(name)
    n = 37
    keys, values = normal(1, 2, 2, n, 8).to(dtype), normal(2, 2, 2, n, 8).to(dtype)
    whole = CacheView.of(keys, values, budget=9, layer=3)
    scores = policy.score(whole)
    assert policy.needs_queries == 0 and not policy.statistics and not policy.needs_hidden
    later = replace(whole, seen=whole.seen + 1000, budget=whole.budget + 5)
    assert torch.equal(policy.score(later), scores)
    for some in ([0], [n - 1], [4, 30, 11], list(range(5, 21))):
        part = replace(
            whole, **{key: getattr(whole, key)[:, :, some] for key in ("keys", "values", "positions", "valid")}
        )
        assert torch.equal(policy.score(part), scores[:, :, some])
    as_they_came = replace(
        whole,
        **{key: getattr(whole, key)[:, :, :20] for key in ("keys", "values", "positions", "valid")},
        seen=whole.seen - 17,
    )
    assert torch.equal(policy.score(as_they_came), scores[:, :, :20])


def test_the_static_check_can_fail():
    view = CacheView.of(normal(1, 1, 1, 9, 8), normal(2, 1, 1, 9, 8))
    part = CacheView.of(view.keys[:, :, :4], view.values[:, :, :4])
    policy = make_policy("keydiff")
    assert not torch.equal(policy.score(part), policy.score(view)[:, :, :4])
