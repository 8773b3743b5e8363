"""What slots are worth, against loops over slots, finite differences and the divergence itself."""

import math

import numpy as np
import pytest
import torch
from traced_models import VOCABULARY, tiny_model

from kv_gym.errors import UserError
from kv_gym.traces import Prompt
from kv_gym.traces.recorder import record_sequence
from kv_gym.training import targets
from kv_gym.training.masked_context import RecordedContexts, continuation_logits, frozen_model
from kv_gym.training.targets import (
    FROM_MODEL,
    TARGETS,
    limit_continuations,
    loss_change,
    output_roots,
    utility_function,
)

LENGTHS = (5, 7, 5)


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def sequence(model):
    """24 tokens, with continuations of two lengths; 4 query heads share 2 KV heads."""
    draw = lambda seed, n: torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()  # noqa: E731
    prompt = Prompt("c", draw(0, 24), [draw(i + 1, n) for i, n in enumerate(LENGTHS)])
    return record_sequence(model, prompt)


def logits(model, sequence, gates, tokens):
    """Of one continuation, alone in its batch, `[m, vocabulary]` float64."""
    keys, values = (torch.from_numpy(array)[None] for array in (sequence.keys, sequence.values))
    contexts = RecordedContexts(keys, values, torch.tensor([keys.shape[3]]))
    with frozen_model(model), torch.no_grad():
        return continuation_logits(model, contexts, gates[None], torch.from_numpy(tokens)[None, None])[0, 0].double()


def nll(model, sequence, gates, tokens):
    log_probs = logits(model, sequence, gates, tokens).log_softmax(-1)
    return -sum(float(log_probs[i, int(token)]) for i, token in enumerate(tokens[1:])) / (len(tokens) - 1)


def projection(model, layer, query_head):
    """What the output of one query head is multiplied by, `[d, D]`, cut from the weight by hand."""
    weight = model.model.layers[layer].self_attn.o_proj.weight.detach().double()
    return weight[:, query_head * 16 : (query_head + 1) * 16].T


def norm(model, layer, head, vector):
    """Root mean square over the two query heads of a KV head."""
    vector = torch.from_numpy(np.asarray(vector, np.float64))
    squares = [float((vector @ projection(model, layer, 2 * head + g)).square().sum()) for g in range(2)]
    return math.sqrt(sum(squares) / 2)


def slots_of(sequence):
    return [(a, b, c) for a in range(3) for b in range(2) for c in range(24)]


def test_attention_alone(sequence):
    utility = utility_function("utility")(sequence), utility_function("mean")(sequence)
    for place in slots_of(sequence)[::7]:
        for i, reduced in enumerate(utility):
            each = [c.future[place][:, i].sum() / len(c.tokens) for c in sequence.continuations]
            assert reduced[place] == pytest.approx(sum(each) / 3, rel=1e-5)


def test_value_norms_through_the_output_projection(model, sequence):
    utility = utility_function("value", model)(sequence)
    for place in slots_of(sequence)[::5]:
        expected = sequence.utility()[place] * norm(model, *place[:2], sequence.values[place])
        assert utility[place] == pytest.approx(expected, rel=1e-4)


def test_the_outputs_error_when_one_slot_goes(model, sequence):
    utility = utility_function("output", model)(sequence)
    for layer, head, slot in slots_of(sequence)[::5]:
        values, error = sequence.values[layer, head].astype(float), 0.0
        for continuation in sequence.continuations:  # of one block each
            attention = continuation.future[layer, head, :, 0, 1].astype(float) / len(continuation.tokens)
            output = sum(a * v for a, v in zip(attention, values, strict=True)) / sum(attention)
            distance = norm(model, layer, head, values[slot] - output)
            error += attention[slot] / (1 - attention[slot]) * distance / 3
        assert utility[layer, head, slot] == pytest.approx(error, rel=1e-3)


def test_blocks_weigh_as_their_queries(model, sequence):
    """The same attention told in two blocks, of 4 queries and of 1, is the mean of their errors by 4 to 1."""
    from dataclasses import replace

    whole = sequence.continuations[0]
    parts = whole.future * np.array([0.9, 0.1], np.float32)[:, None]  # [L, H, n, 2, 2]
    two_blocks = replace(sequence, continuations=(replace(whole, future=parts, block=4),))
    roots = output_roots(model)
    each = [
        targets.output_change(
            replace(sequence, continuations=(replace(whole, tokens=whole.tokens[:n], future=part, block=n),)), roots
        )
        for part, n in ((parts[..., :1, :], 4), (parts[..., 1:, :], 1))
    ]
    np.testing.assert_allclose(
        targets.output_change(two_blocks, roots), 0.8 * each[0] + 0.2 * each[1], rtol=1e-4, atol=1e-7
    )


def test_the_gradient_is_the_slope_of_the_loss(model, sequence):
    utility = utility_function("gradient", model)(sequence)
    assert utility.shape == (3, 2, 24) and utility.dtype == np.float32
    order = np.argsort(-utility.ravel())
    for place in (np.unravel_index(order[i], utility.shape) for i in (0, 3, 40)):
        slopes = []
        for continuation in sequence.continuations:
            sides = []
            for gate in (1.02, 0.98):
                gates = torch.ones(utility.shape)
                gates[tuple(int(i) for i in place)] = gate
                sides.append(nll(model, sequence, gates, continuation.tokens))
            slopes.append(abs(sides[0] - sides[1]) / 0.04)
        assert utility[place] == pytest.approx(np.mean(slopes), rel=0.05, abs=2e-5)


def test_the_change_of_the_odds_of_what_the_model_would_say(model, sequence):
    utility = utility_function("odds", model)(sequence)
    order = np.argsort(-utility.ravel())
    for place in (np.unravel_index(order[i], utility.shape) for i in (0, 3, 40)):
        slopes = []
        for continuation in sequence.continuations:
            whole = logits(model, sequence, torch.ones(utility.shape), continuation.tokens).softmax(-1)
            predicted, sides = whole.argmax(-1).tolist(), []
            for gate in (1.02, 0.98):
                gates = torch.ones(utility.shape)
                gates[tuple(int(i) for i in place)] = gate
                shifted = logits(model, sequence, gates, continuation.tokens).softmax(-1)
                odds = [math.log(float(p[i] / (1 - p[i]))) for p, i in zip(shifted, predicted, strict=True)]
                sure = [float(p[i]) ** 2 for p, i in zip(whole, predicted, strict=True)]
                sides.append(sum(o * s for o, s in zip(odds, sure, strict=True)) / len(predicted))
            slopes.append((sides[0] - sides[1]) / 0.04)
        assert utility[place] == pytest.approx(math.sqrt(np.mean(np.square(slopes))), rel=0.05, abs=2e-5)


def test_the_models_weights_are_left_alone(model, sequence):
    utility_function("gradient", model)(sequence)
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())


def test_continuations_that_do_not_fit_in_one_batch_are_the_same(model, sequence, monkeypatch):
    together = loss_change(model, sequence)
    monkeypatch.setattr(targets, "MAX_BATCH_TOKENS", 1)
    np.testing.assert_allclose(loss_change(model, sequence), together, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("name", "plain"), [("layers", "mean"), ("output_layers", "output")])
def test_layers_weigh_what_a_unit_of_worth_is_to_the_loss(model, sequence, name, plain):
    unweighed = utility_function(plain, model)(sequence)
    ratio = [loss_change(model, sequence)[i].sum() / unweighed[i].sum() for i in range(3)]
    assert max(ratio) > 1.1 * min(ratio)
    expected = unweighed * (np.array(ratio) / np.mean(ratio))[:, None, None]
    np.testing.assert_allclose(utility_function(name, model, [sequence])(sequence), expected, rtol=1e-4)


def test_fewer_continuations(sequence):
    assert limit_continuations(sequence, None) is sequence and limit_continuations(sequence, 3) is sequence
    first = limit_continuations(sequence, 1)
    assert len(first.continuations) == 1
    np.testing.assert_allclose(first.utility(), sequence.continuations[0].future.sum(3)[..., 0] / 5, rtol=1e-6)
    with pytest.raises(UserError, match="context c has 3 continuations and 4 are asked for"):
        limit_continuations(sequence, 4)


@pytest.mark.parametrize("name", FROM_MODEL)
def test_without_a_model(sequence, name):
    with pytest.raises(UserError, match=f"target '{name}' reads the model"):
        utility_function(name)


def test_refusals(model, sequence):
    from dataclasses import replace

    with pytest.raises(UserError, match=f"unknown target 'attention'; known: {', '.join(TARGETS)}"):
        utility_function("attention")
    short = replace(sequence, continuations=tuple(replace(c, tokens=c.tokens[:1]) for c in sequence.continuations))
    with pytest.raises(UserError, match="continuations of one token"):
        utility_function("gradient", model)(short)
    with pytest.raises(UserError, match="there are none; expected at least one"):
        utility_function("layers", model, [])


def test_a_second_readings_score_is_a_teacher(model, sequence):
    draw = torch.randint(VOCABULARY, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    twice = record_sequence(model, Prompt("c", draw, [[1, 2, 3]]), stats=("kvzip:chunk=8",))
    utility = utility_function("kvzip")(twice)
    assert utility.shape == twice.keys.shape[:3] and utility.dtype == np.float32 and 0 < utility.max() <= 1
    assert np.array_equal(utility, next(iter(twice.stats.values()))["paid"])
    with pytest.raises(UserError, match="context c has none: record with --stats kvzip"):
        utility_function("kvzip")(sequence)
