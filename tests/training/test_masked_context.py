"""Masked contexts against the plain model and finite differences."""

import pytest
import torch
from live_models import tiny, tokens
from masked_reference import MaskedReference
from transformers import DynamicCache

from kv_gym.errors import UserError
from kv_gym.training.masked_context import RecordedContexts, continuation_logits, frozen_model

LENGTHS = (14, 20)


def contexts_of(model, family="llama"):
    """Two contexts of different lengths as the model caches them, padded, and their tokens."""
    ids = [tokens(1, n, seed=n) for n in LENGTHS]
    pairs = []
    for each in ids:
        cache = DynamicCache()
        with torch.no_grad():
            model(each, past_key_values=cache)
        pairs.append([torch.stack([getattr(layer, name)[0] for layer in cache.layers]) for name in ("keys", "values")])
    pad = lambda x: torch.nn.functional.pad(x, (0, 0, 0, max(LENGTHS) - x.shape[2]), value=7.0)  # noqa: E731
    keys, values = (torch.stack([pad(pair[i]) for pair in pairs]) for i in (0, 1))
    return RecordedContexts(keys, values, torch.tensor(LENGTHS)), ids


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_closed_gates_are_evicted_slots(family, attention):
    model = tiny(family, attention)
    contexts, ids = contexts_of(model)
    questions = torch.stack([tokens(3, 5, seed=1), tokens(3, 5, seed=2)])
    torch.manual_seed(0)
    gates = (torch.rand(contexts.keys.shape[:4]) < 0.5).double()
    for row, n in enumerate(LENGTHS):
        gates[row, ..., n:] = 0.0
    with frozen_model(model), torch.no_grad():
        gated = continuation_logits(model, contexts, gates, questions)
    assert model.config._attn_implementation == attention
    for row, n in enumerate(LENGTHS):
        for question in range(3):
            reference = MaskedReference(model)
            reference(ids[row])
            reference.hidden = {layer: gates[row, layer, :, :n][None] == 0 for layer in range(gates.shape[1])}
            expected = reference(questions[row, question][None])[0]
            torch.testing.assert_close(gated[row, question], expected, rtol=0, atol=1e-4)


def test_a_gates_gradient_is_what_its_slot_adds():
    model = tiny()
    contexts, _ = contexts_of(model)
    questions = torch.stack([tokens(1, 4, seed=1), tokens(1, 4, seed=2)])
    gates = torch.full(contexts.keys.shape[:4], 0.5, dtype=torch.float64)
    gates[0, ..., LENGTHS[0] :] = 0.0
    gates.requires_grad_(True)
    with frozen_model(model):
        continuation_logits(model, contexts, gates, questions).logsumexp(-1).sum().backward()
        for place in ((0, 0, 1, 3), (1, 2, 0, 11)):
            sides = []
            for step in (1e-3, -1e-3):
                shifted = gates.detach().clone()
                shifted[place] += step
                with torch.no_grad():
                    sides.append(continuation_logits(model, contexts, shifted, questions).logsumexp(-1).sum())
            slope = float(sides[0] - sides[1]) / 2e-3
            assert float(gates.grad[place]) == pytest.approx(slope, rel=0.05, abs=1e-3)
    assert not any(weight.grad is not None for weight in model.parameters())
    assert all(weight.requires_grad for weight in model.parameters())


def test_sliding_layers_are_refused():
    model = tiny("gemma3")
    with pytest.raises(UserError, match="layers without full attention"), frozen_model(model):
        pass
