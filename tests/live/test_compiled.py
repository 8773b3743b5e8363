"""torch.compile around a model with an evicting cache."""

import pytest
import torch
from live_models import tiny, tokens

from kv_gym import EvictingCache
from kv_gym.live import CapturedSteps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "policy", "settings"),
    [
        ("eager", "keydiff", {"trigger": "every:4"}),
        ("aot_eager", "h2o", {"allocation": "global:zscore"}),
    ],
)
@torch.no_grad()
def test_a_compiled_forward_gives_the_same_logits(backend, policy, settings):
    torch._dynamo.reset()
    logits = []
    for compiled in (False, True):
        model = tiny("llama")
        forward = torch.compile(model.forward, backend=backend) if compiled else model.forward
        with EvictingCache(model, policy, 0.3, **settings) as cache:
            forward(tokens(2, 24), past_key_values=cache)
            steps = tokens(2, 6, seed=1).split(1, 1)
            logits.append(torch.cat([forward(token, past_key_values=cache).logits for token in steps], 1))
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-9)


@pytest.mark.slow
@torch.no_grad()
def test_steps_of_a_compiled_model_give_the_same_logits(monkeypatch):
    """Where steps cannot be captured, the compiled model still runs them; a GPU runs the rest (benchmarks/gpu)."""
    torch._dynamo.reset()
    compile_model = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_model(function, backend="eager"))
    model = tiny("llama")
    with EvictingCache(model, "keydiff", 0.3, trigger="every:4") as cache:
        model(tokens(2, 24), past_key_values=cache)
        with cache.fork() as fork:
            steps = CapturedSteps(model, fork, compiled=True)
            for token in tokens(2, 6, seed=1).split(1, 1):
                expected = model(token, past_key_values=cache).logits[:, -1]
                torch.testing.assert_close(steps(token), expected, rtol=0, atol=1e-9)
