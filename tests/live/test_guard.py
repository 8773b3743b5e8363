"""The safety net: signals against a full cache with masked tokens, reactions, and what comes back from the host."""

import math

import pytest
import torch
from live_models import feed, tiny, tokens
from masked_reference import MaskedReference
from tier_reference import TieredReference, rounded

from kv_gym import EvictingCache
from kv_gym.errors import UserError
from kv_gym.evaluation.guard_metrics import auroc, guarded_answers, recall_at, threshold_at
from kv_gym.evaluation.tasks import TaskContext, TaskQuestion
from kv_gym.live import Guard

LAYERS = range(3)


def split(ids, *sizes):
    return torch.split(ids, sizes, 1)


def weight(query, key):
    return math.exp(sum(a * b for a, b in zip(query, key, strict=True)) * len(key) ** -0.5)


class SignalReference(MaskedReference):
    """Computes the signals of the last query by hand, in loops over heads and lists of positions."""

    def signals(self, kept, cut_at, bits=None, layers=LAYERS):
        """name -> `[batch]`, mean over layers and query heads; `kept[layer][row][head]` are positions at the cut."""
        batch, query_heads, _, d = self.queries[0].shape
        group = query_heads // self.keys[0].shape[1]
        sums = {name: torch.zeros(batch) for name in ("missing", "tier", "unmatched", "new")}
        for layer in layers:
            for row in range(batch):
                for head in range(query_heads):
                    query = self.queries[layer][row, head, -1].tolist()
                    keys = self.keys[layer][row, head // group].tolist()
                    stays = set(kept[layer][row, head // group].tolist())
                    there = {p: weight(query, keys[p]) for p in range(len(keys)) if p in stays or p >= cut_at}
                    gone = [weight(query, rounded(keys[p], bits or 2, d)) for p in range(cut_at) if p not in stays]
                    total = sum(there.values()) + (sum(gone) if bits else 0)
                    sums["missing"][row] += max(gone) / (total if bits else total + max(gone))
                    sums["tier"][row] += sum(gone) / total
                    sums["new"][row] += sum(w for p, w in there.items() if p >= cut_at) / total
                    sums["unmatched"][row] += 1 - max(w for p, w in there.items() if 0 < p < cut_at) / total
        return {name: value / (len(layers) * query_heads) for name, value in sums.items()}


@pytest.mark.parametrize("allocation", ["uniform", "global:zscore"])
@pytest.mark.parametrize("signal", ["missing", "unmatched", "new"])
def test_signals_of_attention(signal, allocation):
    model = tiny()
    reference = SignalReference(model)
    context, *rest = split(tokens(2, 28), 20, 4, 1, 3)
    with EvictingCache(model, "keydiff", 8, allocation, guard=Guard(signal)) as cache:
        feed(model, context, cache)
        assert cache.monitor.signal is None  # nothing was evicted when the context was read
        reference(context)
        kept = [cache.kept_positions(layer) for layer in LAYERS]
        for layer in LAYERS:
            reference.hide(layer, kept[layer])
        for piece in rest:
            feed(model, piece, cache)
            reference(piece)
            expected = reference.signals(kept, 20)[signal].double()
            torch.testing.assert_close(cache.monitor.signal.double(), expected, rtol=0, atol=1e-5)
        assert float(expected.min()) > 0.01


@pytest.mark.parametrize("allocation", ["uniform", "global:zscore"])
@pytest.mark.parametrize("signal", ["missing", "tier", "new"])
def test_signals_with_low_precision(signal, allocation):
    """Layer 0 alone: its queries and keys do not depend on what attention sees."""
    model = tiny()
    reference = SignalReference(model)
    with EvictingCache(model, "keydiff", 8, allocation, evicted="bits:4", guard=Guard(signal, layers=(0,))) as cache:
        for piece in split(tokens(2, 23), 20, 3):
            feed(model, piece, cache)
            reference(piece)
        expected = reference.signals([cache.kept_positions(0)], 20, 4, (0,))[signal]
        torch.testing.assert_close(cache.monitor.signal.double(), expected.double(), rtol=0, atol=1e-5)


def test_signals_of_the_output():
    model = tiny()
    pieces = split(tokens(2, 27), 20, 4, 1, 2)
    before = []
    for signal in ("entropy", "entropy_rise", "margin"):
        with EvictingCache(model, "keydiff", 8, guard=Guard(signal)) as cache:
            before.clear()
            for piece in pieces:
                likelihood = feed(model, piece, cache)[:, -1].softmax(-1)
                entropy = torch.tensor([-sum(p * math.log(p) for p in row) for row in likelihood.tolist()])
                first, second = likelihood.sort(descending=True).values[:, :2].unbind(1)
                mean = torch.stack(before).mean(0) if before else torch.tensor(math.nan)
                expected = {"entropy": entropy, "entropy_rise": entropy - mean, "margin": (second - first).float()}
                torch.testing.assert_close(
                    cache.monitor.signal, expected[signal].expand(2), rtol=0, atol=1e-5, equal_nan=True
                )
                before.append(entropy)


@pytest.mark.parametrize("signal", ["missing", "unmatched", "new", "entropy_rise"])
def test_a_padded_row_raises_what_it_raises_alone(signal):
    model = tiny()
    ids, mask = tokens(2, 22), torch.ones(2, 22, dtype=torch.int64)
    mask[0, :7] = 0
    mask[0, 18:20] = 0
    together, alone = [], {0: [], 1: []}
    with EvictingCache(model, "h2o", 0.5, recent=1, guard=Guard(signal)) as cache, torch.no_grad():
        for a, b in ((0, 16), (16, 20), (20, 21), (21, 22)):
            positions = (mask[:, :b].cumsum(1) - 1).clamp(min=0)[:, a:]
            model(ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions, past_key_values=cache)
            together.append(cache.monitor.signal)
    for row in range(2):
        with EvictingCache(model, "h2o", 0.5, recent=1, guard=Guard(signal)) as cache:
            for a, b in ((0, 16), (16, 20), (20, 21), (21, 22)):
                feed(model, ids[row : row + 1, a:b][:, mask[row, a:b].bool()], cache)
                alone[row].append(cache.monitor.signal)
    # output of a row that ends in padding is of that padding, as with any cache
    steps = (2, 3) if signal != "entropy_rise" else ()
    for step in steps:
        for row in range(2):
            torch.testing.assert_close(together[step][row], alone[row][step][0], rtol=0, atol=1e-5)
    if steps:  # the row whose piece ends in padding answers with its last real query
        torch.testing.assert_close(together[1][0], alone[0][1][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("allocation", ["uniform", "global:zscore"])
@pytest.mark.parametrize("policy", ["keydiff", "h2o"])
def test_what_is_restored_is_the_context(policy, allocation, attention):
    """A full cache from there on, in which later tokens were computed while others were hidden."""
    model = tiny("qwen3", attention)
    reference = MaskedReference(model)
    pieces = split(tokens(2, 40), 20, 1, 1, 1, 5, 1, 4, 1, 6)
    with EvictingCache(model, policy, 6, allocation, "every:3", recent=1, offload=True) as cache:
        for number, piece in enumerate(pieces):
            torch.testing.assert_close(feed(model, piece, cache), reference(piece), rtol=0, atol=1e-5)
            for layer in LAYERS:
                if number < 5:
                    reference.hide(layer, cache.kept_positions(layer))
            if number == 5:
                assert int(cache.kept().max()) < 29
                cache.restore()
                reference.hidden.clear()
                for layer in LAYERS:
                    assert torch.equal(cache.kept_positions(layer), torch.arange(29).expand(2, 2, 29))
        assert cache.kept().unique().tolist() == [40]


def test_what_is_restored_is_not_taken_for_new():
    model = tiny()
    with EvictingCache(model, "keydiff", 6, offload=True) as cache:
        feed(model, tokens(1, 20), cache)
        feed(model, tokens(1, 2), cache)
        taken = cache.fork()
        taken.crop(-1)
        cache.restore()
        with pytest.raises(UserError, match="cannot be cropped"):
            cache.crop(-1)


def test_low_precision_pairs_return_in_full():
    model = tiny()
    reference = TieredReference(model, "bits", bits=2)
    with EvictingCache(model, "keydiff", 6, trigger="every:3", evicted="bits:2", offload=True) as cache:
        for number, piece in enumerate(split(tokens(1, 30), 20, 3, 3, 2, 1, 1)):
            torch.testing.assert_close(feed(model, piece, cache), reference(piece), rtol=0, atol=1e-5)
            for layer in LAYERS:
                if number < 3:
                    reference.evict(layer, cache.kept_positions(layer))
            if number == 3:
                cache.restore()
                reference.changed.clear()
                assert cache.layers[0].state.tier.inner.stored is None


@pytest.mark.parametrize("evicted", ["drop", "bits:4"])
def test_bytes_of_host_and_sketch(evicted):
    model = tiny()
    heads, d, itemsize = 3 * 2 * 2, 8, 8
    with (
        EvictingCache(model, "knorm", 10, evicted=evicted) as plain,
        EvictingCache(model, "knorm", 10, evicted=evicted, guard=Guard("missing"), offload=True) as cache,
        EvictingCache(model, "knorm", 1.0) as full,
    ):
        for each in (plain, cache, full):
            feed(model, tokens(2, 50), each)
        sketch = heads * 40 * (d * 2 // 8 + 4) if evicted == "drop" else 0
        assert cache.nbytes() == plain.nbytes() + sketch
        assert cache.host_nbytes() == heads * 40 * (2 * d * itemsize + 8)
        assert plain.host_nbytes() == 0
        cache.restore()
        assert cache.host_nbytes() == 0
        assert cache.kept().unique().tolist() == [50]
        again = cache.fork()  # without room
        assert again.nbytes() == full.nbytes()


def test_layers_that_do_not_count_cost_nothing():
    model = tiny()
    ids, question = tokens(2, 50), tokens(2, 3, seed=1)
    with EvictingCache(model, "knorm", 10) as plain, EvictingCache(model, "knorm", 10, guard=Guard(layers=(1,))) as one:
        for each in (plain, one):
            feed(model, ids, each)
        assert one.nbytes() == plain.nbytes() + 2 * 2 * 40 * (8 * 2 // 8 + 4)
        with EvictingCache(model, "knorm", 10, guard=Guard()) as whole:
            feed(model, ids, whole)
            part = whole.fork(guard=Guard(layers=(1,)))
            for each in (one, whole, part):
                feed(model, question, each)
        values = [layer.state.tier.signal for layer in whole.layers]
        torch.testing.assert_close(one.monitor.signal, values[1])
        torch.testing.assert_close(part.monitor.signal, values[1])
        torch.testing.assert_close(whole.monitor.signal, sum(values) / 3)
        with pytest.raises(UserError, match="did not sketch them"):
            one.fork(guard=Guard(layers=(1, 2)))


def test_warn_and_count():
    model = tiny()
    with EvictingCache(model, "keydiff", 8, guard=Guard("missing", threshold=0.0)) as cache:
        feed(model, tokens(1, 20), cache)
        assert cache.monitor.alarms == 0
        with pytest.warns(UserWarning, match="'missing' is above 0, so what was evicted"):
            feed(model, tokens(1, 2), cache)
        assert cache.monitor.alarms == 1
        quiet = cache.fork()
        with pytest.warns(UserWarning, match="guard"):
            feed(model, tokens(1, 1), quiet)
        assert (cache.monitor.alarms, quiet.monitor.alarms) == (1, 2)
    with EvictingCache(model, "keydiff", 8, guard=Guard("missing", threshold=1.0)) as cache:
        for piece in split(tokens(1, 24), 20, 2, 2):
            feed(model, piece, cache)
        assert cache.monitor.alarms == 0


def test_the_budget_grows():
    model = tiny()
    guard = Guard("missing", threshold=0.0, then="enlarge", growth=1.5)
    with EvictingCache(model, "keydiff", 8, trigger="every:4", guard=guard) as cache:
        held = []
        for piece in split(tokens(1, 44), 20, 4, 4, 4, 4, 4, 4):
            feed(model, piece, cache)
            held.append(int(cache.kept().max()))
        # each alarm comes after its forward's own cut
        assert held == [8, 8, 12, 16, 20, 24, 28]
        assert cache.config.budget == 93  # 8, 12, 18, 27, 41, 62, 93


def test_alarms_restore_by_themselves():
    model = tiny()
    guard = Guard("entropy", threshold=0.0, then="restore")
    with (
        EvictingCache(model, "keydiff", 8, guard=guard, offload=True) as cache,
        EvictingCache(model, "keydiff", 1.0) as full,
    ):
        ids, more = tokens(1, 20), tokens(1, 5, seed=3)
        feed(model, ids, cache)
        feed(model, ids, full)
        torch.testing.assert_close(feed(model, more, cache), feed(model, more, full), rtol=0, atol=1e-9)
        assert cache.monitor.alarms == 2
    hooks = len(model._forward_hooks)
    assert hooks == 0  # nothing stays on the model


def test_rows_and_forks_follow():
    model = tiny()
    guard = Guard("missing")
    with EvictingCache(model, "h2o", 6, guard=guard, offload=True) as cache:
        feed(model, tokens(2, 20), cache)
        question = tokens(2, 3, seed=1)
        one, swapped, twice = cache.fork(), cache.fork(), cache.fork()
        feed(model, question, one)
        swapped.reorder_cache(torch.tensor([1, 0]))
        feed(model, question.flip(0), swapped)
        twice.batch_repeat_interleave(2)
        feed(model, question.repeat_interleave(2, 0), twice)
        torch.testing.assert_close(swapped.monitor.signal.flip(0), one.monitor.signal)
        torch.testing.assert_close(twice.monitor.signal[1::2], one.monitor.signal)
        for each in (one, swapped, twice):
            each.restore()
        expected = feed(model, question, one)
        torch.testing.assert_close(feed(model, question.flip(0), swapped).flip(0), expected)
        torch.testing.assert_close(feed(model, question.repeat_interleave(2, 0), twice)[::2], expected)
        assert cache.host_nbytes() > 0  # the fork's restoring took nothing from the first one


def test_a_fork_may_have_another_guard():
    model = tiny()
    ids, question = tokens(1, 20), tokens(1, 3, seed=1)
    with EvictingCache(model, "keydiff", 1.0, evicted="bits:2") as base:
        feed(model, ids, base)
        for signal in ("missing", "tier", "new"):
            fork = base.fork(budget=6, guard=Guard(signal))
            fork.compress()
            feed(model, question, fork)
            with EvictingCache(model, "keydiff", 6, evicted="bits:2", guard=Guard(signal)) as alone:
                feed(model, ids, alone)
                feed(model, question, alone)
                assert torch.equal(alone.monitor.signal, fork.monitor.signal)
            for other in ("missing", "tier", "unmatched"):  # of a fork that has evicted already
                fork.fork(guard=Guard(other)).detach()
                late = base.fork(budget=6, guard=Guard(signal))
                late.compress()
                late = late.fork(guard=Guard(other))
                feed(model, question, late)
                with EvictingCache(model, "keydiff", 6, evicted="bits:2", guard=Guard(other)) as alone:
                    feed(model, ids, alone)
                    feed(model, question, alone)
                    assert torch.equal(alone.monitor.signal, late.monitor.signal)
    with EvictingCache(model, "keydiff", 6, guard=Guard("missing")) as sketched:
        feed(model, ids, sketched)
        unsketched = sketched.fork(guard=Guard("new"))
        assert unsketched.nbytes() < sketched.nbytes()
        feed(model, question, sketched)
        with pytest.raises(UserError, match="did not sketch them"):
            unsketched.fork(guard=Guard("missing"))
        with pytest.raises(UserError, match="did not sketch them"):
            sketched.fork(guard=Guard("missing", bits=4))


def test_guard_metrics_by_hand():
    values = torch.tensor([0.1, 0.4, 0.4, 0.8, 0.2, 0.4, 0.9])
    events = torch.tensor([False, False, False, False, True, True, True])
    # 0.2 beats one of four, 0.4 beats one and ties with two, 0.9 beats all
    assert auroc(values, events) == pytest.approx((1 + 2 + 4) / 12)
    assert math.isnan(auroc(values, events & False))
    fine = torch.arange(100) / 100
    assert threshold_at(fine, 0.05) == pytest.approx(0.94)
    assert int((fine > threshold_at(fine, 0.05)).sum()) == 5
    assert int((fine > threshold_at(fine, 0.0)).sum()) == 0
    hurt = torch.tensor([0.5, 0.945, 0.99, 2.0])
    both, which = torch.cat((fine, hurt)), torch.arange(104) >= 100
    assert recall_at(both, which, 0.05) == 0.75
    with pytest.raises(UserError, match="got 0 signals"):
        threshold_at(fine[:0])


def test_guarded_answers():
    """Answers are those of greedy generation; signals are the largest of the forwards that predict an answer token."""
    model = tiny()
    ids = tokens(2, 20)
    questions = tokens(4, 3, seed=1).tolist()
    with EvictingCache(model, "keydiff", 6, guard=Guard("missing")) as cache:
        feed(model, ids, cache)
        expected, answers = [], []
        for number, question in enumerate(questions):
            fork = cache.fork()
            fork.batch_select_indices(torch.tensor([number // 2]))
            signals, said = [], []
            for step in (*question, None):
                token = feed(model, torch.tensor([[said[-1] if step is None else step]]), fork)[0, -1].argmax()
                signals.append(float(fork.monitor.signal))
                said.append(int(token))
            expected.append(max(signals[2:]))
            answers.append(tuple(said[2:]))
        answers[1] = (answers[1][0], (answers[1][1] + 1) % 61)
        asked = [TaskQuestion(tuple(q), a) for q, a in zip(questions, answers, strict=True)]
        batch = [TaskContext(tuple(row.tolist()), tuple(asked[2 * i : 2 * i + 2])) for i, row in enumerate(ids)]
        watched = guarded_answers(model, cache, batch)
        assert watched.correct.tolist() == [True, False, True, True]
        assert watched.row.tolist() == [0, 0, 1, 1]
        torch.testing.assert_close(watched.signal, torch.tensor(expected, dtype=torch.float64))
        assert watched.layers.shape == (3, 4)
        assert cache.seen == 20
    with EvictingCache(model, "keydiff", 1.0, guard=Guard("missing")) as full:
        feed(model, ids, full)
        assert guarded_answers(model, full, batch).signal.tolist() == [0.0] * 4
    with EvictingCache(model, "keydiff", 6) as plain:
        feed(model, ids, plain)
        with pytest.raises(UserError, match="has no guard"):
            guarded_answers(model, plain, batch)


def test_refusals():
    model = tiny()
    for settings, message in (
        ({"signal": "mood"}, "signal 'mood' is unknown; expected one of missing, tier"),
        ({"then": "panic"}, "cannot 'panic'; expected one of warn"),
        ({"threshold": math.nan}, "threshold is NaN"),
        ({"threshold": "0.5"}, "threshold is '0.5'; expected a number"),
        ({"growth": 1.0}, "expected one above 1"),
        ({"layers": 1}, "layers are 1; expected numbers of layers"),
        ({"bits": 3}, "expected 2, 4 or 8"),
    ):
        with pytest.raises(UserError, match=message):
            Guard(**settings)
    for settings, message in (
        ({"guard": Guard(then="restore")}, "give offload=True"),
        ({"guard": Guard("tier")}, "evicted='drop' keeps none"),
        ({"evicted": "merge", "offload": True}, "changes survivors"),
        ({"evicted": "merge:values", "offload": True}, "changes survivors"),
        ({"guard": Guard(layers=(3,))}, "averages layer 3, and 3 layers evict"),
    ):
        with pytest.raises(UserError, match=message):
            EvictingCache(model, **settings)
    with EvictingCache(model, "keydiff", 6) as cache:
        feed(model, tokens(1, 20), cache)
        with pytest.raises(UserError, match="no copy of what was evicted"):
            cache.restore()
